"""Numbers among the words of a command, read for argparse."""

import argparse
import math


def positive(word: str) -> int:
    """Read an integer >= 1, for argparse."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be an integer >= 1")
    return int(word)


def cosine(word: str) -> float:
    """Read a cosine, for argparse."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{word}: must be a cosine, in [-1, 1]; a squared distance d has the cosine 1 - d / 2"
        )
    return value


def rate(word: str) -> float:
    """Read a rate in (0, 1), for argparse."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be a number in (0, 1)")
    return value
