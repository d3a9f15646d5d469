"""Submit training to Slurm: ``partialfc slurm``."""

import sys

from partialfc.slurm.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
