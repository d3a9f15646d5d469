"""Submit training to Slurm: ``partialfc slurm``."""

from partialfc.__main__ import command_line

if __name__ == "__main__":
    command_line("slurm")
