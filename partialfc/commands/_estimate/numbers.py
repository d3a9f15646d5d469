"""Numbers as the words of the command give them."""

import argparse
from collections.abc import Callable


def counts_of_heads(text: str) -> dict[str, int]:
    """Return the number of each head by name, of N or NAME=N,NAME=N."""
    number = positive(int)
    if "=" not in text:
        return {"": int(number(text))}
    pairs = (one.partition("=") for one in text.split(","))
    return {name.strip(): int(number(count)) for name, _, count in pairs}


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return what reads a number above 0 of this kind."""

    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
        return value

    return read
