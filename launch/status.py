"""Serve a page on a run: ``partialfc status``."""

from partialfc.__main__ import command_line

if __name__ == "__main__":
    command_line("status")
