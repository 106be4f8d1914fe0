"""``python -m mpishard``: the command line."""

import sys

from mpishard.cli import main

if __name__ == "__main__":
    sys.exit(main())
