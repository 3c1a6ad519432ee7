"""`python -m raylava.cli`: what jobs and torchrun call."""

import sys

from raylava.cli import main

if __name__ == "__main__":
    sys.exit(main())
