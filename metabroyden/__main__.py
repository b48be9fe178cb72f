"""`python -m metabroyden`: the command line, see `metabroyden.cli`."""

import sys

from metabroyden.cli import main

if __name__ == "__main__":
    sys.exit(main())
