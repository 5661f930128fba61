"""`python -m rxllm` is the command line."""

from rxllm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
