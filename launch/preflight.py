"""Look at the machines of a run: ``torchrun ... launch/preflight.py CONFIG.toml``."""

from partialfc.__main__ import command_line

if __name__ == "__main__":
    command_line("preflight")
