"""usage: partialfc preflight CONFIG.toml [key.sub=value ...]

    torchrun ... -m partialfc preflight CONFIG.toml    # on all hosts of the run, as it would start

Look at the machines of a run: measure the collectives, the images and the disk on all ranks,
compare versions and clocks, and say what would make the run fail or slow. Exit code 2 if something
would make it fail. ``run.preflight=true`` does the same as a run's first phase.
"""

from partialfc.commands._command import status_of
from partialfc.config import load


def main(arguments: list[str]) -> int:
    """Look; return the exit code: 0, or 2 for what would make the run fail."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    return status_of(lambda: _look(arguments))


def _look(arguments: list[str]) -> int:
    config = load(arguments[0], arguments[1:])
    from partialfc.runtime.place import refuse_unusable
    from partialfc.runtime.process import running
    from partialfc.training.preflight import report
    from partialfc.training.run import look_before

    refuse_unusable(config)
    with running(config) as runtime:
        report(look_before(config, runtime), runtime)
    return 0
