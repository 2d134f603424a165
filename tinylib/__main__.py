"""Run the command line: ``python -m tinylib``."""

import sys

from tinylib.cli import main

if __name__ == "__main__":
    sys.exit(main())
