"""The parser of a command: its module's docstring is its help."""

import argparse


def command_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """Return a parser of ``partialfc NAME`` that shows the text as it is written."""
    return argparse.ArgumentParser(
        prog=f"partialfc {name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
