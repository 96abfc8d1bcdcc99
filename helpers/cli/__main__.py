"""`python -m helpers.cli` is the `course` command."""

import sys

from helpers.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
