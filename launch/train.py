"""Train: ``torchrun --nproc-per-node=N launch/train.py CONFIG.toml`` is ``partialfc train``."""

from partialfc.__main__ import command_line

if __name__ == "__main__":
    command_line("train")
