"""What outlives a process: quotas that are kept in a file, or shared between processes and machines."""
