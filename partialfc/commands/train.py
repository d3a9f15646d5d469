"""Train: torchrun --nproc-per-node=N launch/train.py CONFIG.toml [key.sub=value ...].

Without torchrun it is one process. ``--help`` prints every setting.
"""

import os
import sys
from typing import NoReturn

from partialfc.config import ConfigError, help_text, load
from partialfc.errors import Preempted
from partialfc.runtime import preemption

_USAGE = "usage: torchrun --nproc-per-node=N launch/train.py CONFIG.toml [key.sub=value ...]"


def main(arguments: list[str]) -> int:
    """Run; return the exit code: 0, 130 when interrupted, or that of the error's kind."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{_USAGE}\n\n{help_text()}")
        return 0 if arguments else 2
    preemption.listen()
    try:
        config = load(arguments[0], arguments[1:])
        from partialfc.runtime.process import running
        from partialfc.training.run import train

        with running(config) as runtime:
            train(config, runtime)
        preemption.ignore()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        _record(error)
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        _say(error)
        return int(code)
    return 0


def _record(error: Exception) -> None:
    """Torchrun's summary then shows the first error of all ranks, whatever its exit code."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from partialfc.runtime.watchdog import record_for_torchrun

        record_for_torchrun(error)


def _say(error: Exception) -> None:
    """What every rank finds, as a mistake in the settings, one says; all else its own rank."""
    rank = os.environ.get("RANK", "0")
    if not isinstance(error, ConfigError | Preempted):
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(error, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End the process at once: all is closed, and nothing of it is worth its teardown.

    That of torch, gloo and DALI takes seconds, and one of their threads may abort in it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
