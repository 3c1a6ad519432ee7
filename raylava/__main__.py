"""`python -m raylava`, the command line without its console script."""

import sys

from raylava.cli import main

if __name__ == "__main__":
    sys.exit(main())
