"""``make bench``: `python -m xorz.bench`, and with ``--pairs`` layers of real fine-tunes from beside the repository."""

import sys

from tunes import pairs
from xorz.bench.__main__ import main

if __name__ == "__main__":
    sys.exit(main(pairs=pairs))
