"""`python -m raylava.cli`, the entry point of cluster jobs and torchrun."""

import sys

from raylava.cli import main

if __name__ == "__main__":
    sys.exit(main())
