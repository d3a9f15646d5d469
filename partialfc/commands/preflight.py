"""Look at the machines of a run: torchrun … launch/preflight.py CONFIG.toml [key=value …].

Start it as the run would be, on all its hosts. It measures the collectives, the images and the disk
on all ranks, compares versions and clocks, and says what would make the run fail or slow. Exit code
2 if something would make it fail. ``run.preflight=true`` does the same as a run's first phase.
"""

import os
import sys

from partialfc.config import ConfigError, load


def main(arguments: list[str]) -> int:
    """Look; return the exit code: 0, or 2 for what would make the run fail."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    try:
        config = load(arguments[0], arguments[1:])
        from partialfc.runtime.process import running
        from partialfc.training.preflight import report
        from partialfc.training.run import look_before

        with running(config) as runtime:
            report(look_before(config, runtime), runtime)
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        return 2
    return 0
