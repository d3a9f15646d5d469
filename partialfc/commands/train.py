"""Train a model: the command's settings file decides how."""

import sys

from partialfc.commands._command import status_of
from partialfc.config import help_text, load
from partialfc.runtime import preemption

_USAGE = """usage: partialfc train CONFIG.toml [key.sub=value ...]

    torchrun --nproc-per-node=N -m partialfc train CONFIG.toml    # on N GPUs of this machine

The same command goes on from the newest checkpoint of the run."""


def main(arguments: list[str]) -> int:
    """Run; return the exit code: 0, 130 when interrupted, or that of the error's kind."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{_USAGE}\n\n{help_text()}")
        return 0 if arguments else 2
    preemption.listen()
    try:
        return status_of(lambda: _train(arguments))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _train(arguments: list[str]) -> int:
    config = load(arguments[0], arguments[1:])
    from partialfc.runtime.place import refuse_unusable
    from partialfc.runtime.process import running
    from partialfc.training.run import train

    refuse_unusable(config)
    with running(config) as runtime:
        train(config, runtime)
    preemption.ignore()
    return 0
