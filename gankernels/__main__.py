"""`python -m gankernels`: the command line, also if its script is not on the path."""

import sys

from gankernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
