"""Look at the machines of a run: torchrun ... launch/preflight.py CONFIG.toml."""

import sys

from partialfc.commands.preflight import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
