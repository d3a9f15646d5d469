"""One leg of a run that changes its number of ranks, started by torchrun.

``torchrun --nproc-per-node=W tools/bench/_faults/elastic.py FOLDER STEPS OUT`` goes on from the
newest checkpoint of FOLDER to STEPS and saves there. OUT/rank_<R>.json gets sample ids, sampled
identities and loss of every step; with "again" as a fourth argument, nothing is trained and what
was loaded is saved once more under the step + 1.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from partialfc.checkpoint import loading as checkpoint
from partialfc.distributed.batches import Batches
from partialfc.distributed.ranks import Ranks
from partialfc.runtime.process import Runtime
from tools.bench._faults.model import FACTS, batch_of, settings, small_model, take_step

Step = dict[str, Any]


def leg(folder: Path, last: int) -> list[Step]:
    """Go on from the newest checkpoint, train to ``last`` and save there. Collective.

    Returns:
        Sample ids and sampled identities of this rank, and the loss, of every step.
    """
    runtime = Runtime(Ranks.of(), torch.device("cpu"))
    ranks = runtime.ranks
    model = small_model(runtime)
    found = checkpoint.newest(folder, runtime)
    first = checkpoint.load(found, model, FACTS, runtime) if found else 0
    batches, record = Batches(ranks), []
    for step in range(first, last):
        _, identities, ids = batch_of(step, ranks.rank, ranks.size)
        every = batches.gather_identities(identities, settings().shares(ranks.size))
        sample = model.head.sampler(step, every)
        assert sample.rows is not None
        sampled = (sample.rows + model.head.owned.start).sort().values.tolist()
        loss = take_step(model, step, runtime)
        record.append({"step": step, "ids": ids, "sampled": sampled, "loss": loss})
    checkpoint.save(folder, last, model, FACTS, runtime, keep=9)
    return record


def again(folder: Path) -> None:
    """Load the newest checkpoint and save it under the next step. Collective."""
    runtime = Runtime(Ranks.of(), torch.device("cpu"))
    model = small_model(runtime)
    found = checkpoint.newest(folder, runtime)
    assert found is not None
    step = checkpoint.load(found, model, FACTS, runtime)
    checkpoint.save(folder, step + 1, model, FACTS, runtime, keep=9)


def joined(parts: Sequence[Sequence[Step]]) -> list[Step]:
    """The steps of all ranks, by rank, as one rank would have seen them."""
    return [
        {
            "ids": [number for part in step for number in part["ids"]],
            "sampled": [row for part in step for row in part["sampled"]],
            "loss": step[0]["loss"],
        }
        for step in zip(*parts, strict=True)
    ]


def main(arguments: list[str]) -> int:
    """Run the leg of this rank."""
    folder, last, out = Path(arguments[0]), int(arguments[1]), Path(arguments[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if arguments[3:] == ["again"]:
        again(folder)
    else:
        record = leg(folder, last)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"rank_{dist.get_rank()}.json").write_text(json.dumps(record), encoding="utf-8")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
