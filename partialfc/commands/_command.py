"""What the commands have in common: how they read their words, and how they end."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from partialfc.errors import (
    ConfigError,
    Preempted,
    exit_code_of,
    extra_of,
    in_words,
    record_for_torchrun,
)


def command_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """Return a parser of ``partialfc NAME`` that shows the text's lines, without backticks."""
    return argparse.ArgumentParser(
        prog=f"partialfc {name}",
        description=text and text.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def status_of(work: Callable[[], int], *mistakes: type[Exception]) -> int:
    """Do the work of a command; return its exit status, and say in words what ended it.

    Args:
        work: Returns an exit status.
        mistakes: Kinds of errors that a user can mend and that end with 2, beside those with an
            exit code of their own. Any other error is shown with its stack, and ends with 1.
    """
    try:
        return work()
    except Exception as error:
        code = exit_code_of(error)
        if code == 1 and isinstance(error, mistakes):
            code = 2
        stack = traceback.format_exc() if code == 1 else ""
        record_for_torchrun(error, stack)
        if stack:
            print(stack, end="", file=sys.stderr, flush=True)
        else:
            _say(error)
        return code


def _say(error: Exception) -> None:
    """What every rank finds, as a mistake in the settings, one says; all else its own rank."""
    rank = os.environ.get("RANK")
    of_all = isinstance(error, ConfigError | Preempted) or extra_of(error) is not None
    if of_all and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    whose = "" if of_all or rank is None else f"rank {rank}: "
    print(f"{whose}{in_words(error)}", file=sys.stderr, flush=True)
