"""What the commands have in common: how they read their words, and how they end."""

import argparse
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from typing import TypeVar

from partialfc.definitions import plugins
from partialfc.errors import (
    ConfigError,
    Preempted,
    exit_code_of,
    extra_of,
    in_words,
    record_for_torchrun,
)

Item = TypeVar("Item")


def command_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """Return a parser of ``partialfc NAME`` that shows the text's lines, without backticks."""
    return argparse.ArgumentParser(
        prog=f"partialfc {name}",
        description=text and text.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--plugin MODULE``, which imports the code that a run of the user's was trained with."""
    parser.add_argument(
        "--plugin",
        action=_Load,
        metavar="MODULE",
        help="import it: code of your own that the settings of the run name; may be repeated",
    )


class _Load(argparse.Action):
    """At once, so that all that follows knows it."""

    def __call__(
        self, parser: object, namespace: object, values: object, option: object = None
    ) -> None:
        plugins.load([str(values)])


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
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
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


def in_pieces(name: str, work: Callable[[], int]) -> int:
    """Do work whose finished pieces are kept; return its exit status, also where it is stopped."""
    try:
        return work()
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    except BrokenExecutor:
        print(f"{name}: a worker was killed (memory?); the same command goes on.", file=sys.stderr)
        return 1


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone, as after ``| head``."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _say(error: Exception) -> None:
    """What every rank finds, as a mistake in the settings, one says; all else its own rank."""
    rank = os.environ.get("RANK")
    of_all = isinstance(error, ConfigError | Preempted) or extra_of(error) is not None
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if of_all and several and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    whose = "" if of_all or rank is None else f"rank {rank}: "
    print(f"{whose}{in_words(error)}", file=sys.stderr, flush=True)


def tracked(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Go through items with a bar on stderr, which leaves nothing; without one off a terminal."""
    from rich.console import Console  # 50 ms that --help can do without
    from rich.markup import escape
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        return iter(items)
    return iter(track(items, escape(what), console=console, transient=True))
