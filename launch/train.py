"""Train: torchrun --nproc-per-node=N launch/train.py CONFIG.toml [key.sub=value ...]."""

import sys

from partialfc.commands.train import leave, main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
