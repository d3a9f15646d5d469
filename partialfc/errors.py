"""The causes that end a run, each with its exit code.

2 settings (:class:`~partialfc.errors.ConfigError`), 3 not finite, 4 checkpoint, 5 data,
6 hang, 7 lost rank, 8 crash loop, 75 preempted
(:class:`~partialfc.runtime.process.preemption.Preempted`), 130 stopped; 1 is everything that nobody
foresaw.
"""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; no weights were changed by it."""

    exit_code = 3


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what this run can go on from."""

    exit_code = 4


class DataError(RuntimeError):
    """Too many images cannot be used; the message names one."""

    exit_code = 5


class HangError(RuntimeError):
    """A rank stands still; the message names it."""

    exit_code = 6


class LostRankError(RuntimeError):
    """Another rank is gone; the message names it, and its own error where it told it."""

    exit_code = 7


class CrashLoopError(RuntimeError):
    """The run was started again and again, and came no further."""

    exit_code = 8


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that an error ends."""
    return 130 if isinstance(error, KeyboardInterrupt) else int(getattr(error, "exit_code", 1))


def in_words(error: Exception) -> str:
    """Return what a user is told: a file by its name, a package by how it is installed."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install -e '.[export,search]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class ConfigError(ValueError):
    """Settings that cannot be used; the message names file, key, value, rule and remedy."""

    exit_code = 2


class Preempted(RuntimeError):
    """The run was asked to stop; its checkpoint is complete and the same command goes on."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again later."""


class ForeignError(ValueError):
    """A file of another program that cannot be used; the message names it."""

    exit_code = 4
