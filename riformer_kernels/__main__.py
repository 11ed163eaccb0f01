"""``python -m riformer_kernels`` is the command line."""

import sys

from riformer_cli import main

if __name__ == "__main__":
    sys.exit(main())
