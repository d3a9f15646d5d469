"""Serve a page on a run: ``partialfc status``."""

import sys

from partialfc.status.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
