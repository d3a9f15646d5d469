"""launch/train.py that stands before a step until it is asked to stop, or killed.

    python tests/support/held_run.py STEP SETTINGS [key=value ...]

So a run is not over before a test acts on it, however late that is; up to the step it runs freely.
"""

import os
import sys
import time

import partialfc.training.run
from partialfc.commands.train import main
from partialfc.distributed.ranks import moved
from partialfc.runtime import preemption

_step = partialfc.training.run.train_step


def stands(model, *words):
    while model.heads.steps == int(sys.argv[1]) and not preemption.asked():
        moved()  # it is no hang
        time.sleep(0.01)
    return _step(model, *words)


if __name__ == "__main__":
    partialfc.training.run.train_step = stands
    os._exit(main(sys.argv[2:]))
