"""``python -m jobs`` is ``hllm``."""

from jobs.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
