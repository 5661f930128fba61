"""What outlives a process: quotas that are kept in a file, or shared between processes and machines."""

from rxllm.stores.base import OutsideMeter

__all__ = ["OutsideMeter"]
