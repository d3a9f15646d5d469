"""launch/train.py whose rank 1 is ill: ``faulty_rank.py FOLDER CONFIG.toml [key=value ...]``.

It is 50 ms late in each of the first 50 steps, and then a gradient of it is NaN. Every rank writes
FOLDER/rank_<R>.json: whether the step with the NaN changed anything that it trains.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

import partialfc.training.run
from partialfc.commands.train import main
from partialfc.model.batch_norm import statistics

LATE_STEPS, LATE_SECONDS = 50, 0.05
_step = partialfc.training.run.train_step


def ill(model, *words):
    rank, step = int(os.environ["RANK"]), model.head.optimizer.steps
    if rank == 1 and step < LATE_STEPS:
        time.sleep(LATE_SECONDS)
    if step != LATE_STEPS:
        return _step(model, *words)
    before = trained(model)
    factor = torch.nan if rank == 1 else 1.0
    hook = next(model.backbone.parameters()).register_hook(lambda gradient: gradient * factor)
    done = _step(model, *words)
    hook.remove()
    unchanged = all(map(torch.equal, before, trained(model)))
    (Path(sys.argv[1]) / f"rank_{rank}.json").write_text(json.dumps(unchanged))
    return done


def trained(model):
    tensors = [*model.backbone.parameters(), *statistics(model.backbone).values()]
    tensors += [model.head.centers, *model.head.optimizer.states().values()]
    for state in model.optimizer.state.values():
        tensors += state.values()
    return [tensor.detach().clone() for tensor in tensors]


if __name__ == "__main__":
    partialfc.training.run.train_step = ill
    os._exit(main(sys.argv[2:]))
