"""``partialfc COMMAND ...``, also as ``python -m partialfc`` and ``torchrun -m partialfc``."""

import difflib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import partialfc
from partialfc.commands._command import status_of

COMMANDS = {
    "train": "train a model; under torchrun, on many GPUs",
    "slurm": "submit training to Slurm, and look after it",
    "status": "serve a page on how a run is doing",
    "preflight": "look at the machines of a run before it starts",
    "align": "cut the faces out of photos",
    "pack": "make a pack of images",
    "show": "say what is in a pack",
    "validate": "check every image of a pack",
    "convert": "change, merge and cut packs and sets of pairs",
    "split": "split a folder by identity",
    "overlap": "find the people that two data sets have in common",
    "clean": "list the images that a run doubts",
    "augment": "draw what augmentation does to images",
    "estimate": "say what a run needs: memory, time, GPUs",
    "explain": "draw a margin and say what it asks for",
    "evaluate": "measure a model on verification and identification sets",
    "report": "make the page of one run or of several",
    "embed": "turn images into embeddings",
    "search": "find faces in files of embeddings",
    "cluster": "group embeddings into clusters to train on",
    "export": "write a model as ONNX, INT8, torch.export or safetensors",
    "identities": "carry class centers over to other identities",
    "convert-checkpoint": "read and write checkpoints of arcface_torch",
}
"""Every command and what it does, in the order in which a project needs them."""

_ROOM = {"slurm": "partialfc.slurm.command", "status": "partialfc.status.command"}

_USAGE = """usage: partialfc COMMAND ...

{commands}

partialfc COMMAND --help says more of one. Several GPUs train, evaluate and embed together:

    torchrun --nproc-per-node=N -m partialfc train CONFIG.toml"""

_of_strangers = warnings.formatwarning


def main(arguments: Sequence[str]) -> int:
    """Run the command that the first word names, and return its exit status.

    0 is done, and ``partialfc.errors`` has the others; validate, export and estimate return 1 for
    what they find wanting.
    """
    try:
        return status_of(lambda: _command(*arguments), ValueError, OSError)
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # argparse's
        return int(end.code or 0)


def command_line(*first: str) -> NoReturn:
    """Run the command of this process's words, ``first`` before them, and end the process.

    At once: all is closed then, and nothing is worth the teardown of torch, gloo and DALI. It takes
    seconds, and one of their threads may abort in it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that a locale lacks ends no training
            with suppress(OSError):  # of a pipe that nobody reads
                stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _in_words
    status = main([*first, *sys.argv[1:]])
    try:
        if sys.stdout is not None:  # as after ``>&-``
            sys.stdout.flush()
    except BrokenPipeError:  # of ``| head``
        pass
    except OSError as error:  # of a full disk; the status of what failed before stays
        print(f"standard output: {error.strerror}", file=sys.stderr)
        status = status or 1
    with suppress(OSError, AttributeError):
        sys.stderr.flush()
    os._exit(status)


def _in_words(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning of ours as a user reads it; a stranger's says where it comes from, as ever."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"warning: {message}\n"
    return _of_strangers(message, category, filename, lineno, line)


def _command(name: str = "", *words: str) -> int:
    if name in COMMANDS:
        module = import_module(_ROOM.get(name, f"partialfc.commands.{name.replace('-', '_')}"))
        return int(module.main([*words]))
    if name == "--version":
        print(f"partialfc {partialfc.__version__}")
        return 0
    if name in ("", "-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {does}" for command, does in COMMANDS.items()]
        print(_USAGE.format(commands="\n".join(lines)))
        return 0 if name else 2
    near = " or ".join(difflib.get_close_matches(name, COMMANDS))
    remedy = f"Did you mean {near}?" if near else "partialfc --help names them all."
    print(f"partialfc: there is no command {name!r}. {remedy}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    command_line()
