"""Train a model: the command's settings file decides how."""

import os
import sys

from partialfc.checkpoint.folder import steps
from partialfc.commands._command import status_of
from partialfc.config import help_text, load
from partialfc.errors import exit_code_of
from partialfc.records.unessential import unessential_streams
from partialfc.runtime import preemption
from partialfc.runtime.place import refuse_unusable, use_large_pages

_USAGE = """usage: partialfc train CONFIG.toml [key.sub=value ...]

    torchrun --nproc-per-node=N -m partialfc train CONFIG.toml    # on N GPUs of this machine

The same command goes on from the newest checkpoint of the run. Ctrl-C and SIGTERM save one before
they end it; a second one ends it at once."""


def main(arguments: list[str]) -> int:
    """Run; return the exit code: 0, or that of what ended it (:mod:`partialfc.errors`)."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{_USAGE}\n\n{help_text()}")
        return 0 if arguments else 2
    with unessential_streams():
        try:
            with preemption.listening():
                return status_of(lambda: _train(arguments))
        except KeyboardInterrupt as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"stopped by {error}", file=sys.stderr)
            return exit_code_of(error)


def _train(arguments: list[str]) -> int:
    config = load(arguments[0], arguments[1:])
    use_large_pages(config)  # before torch
    try:
        from partialfc.runtime.process import running
        from partialfc.training.run import train

        refuse_unusable(config)
        with running(config) as runtime:
            train(config, runtime)
    except KeyboardInterrupt as error:
        from partialfc.records.console import from_here

        saved = steps(config.run.folder / "checkpoints")
        newest = f"goes on from {from_here(saved[-1])}" if saved else "begins: no checkpoint yet"
        error.args = (f"{error}. The same command {newest}.",)
        raise
    preemption.ignore()
    return 0
