"""What a sample rate does to the gradient: bias and variance against the whole softmax in fp64.

    python tools/bench/sampled_gradients.py configs/omniglot.toml --at 300,1000 --json OUT.json \\
        data.global_batch=64 run.steps=1000
    python tools/bench/sampled_gradients.py --identities 100000 --json OUT.json

A model is trained as by tools/sampling.py. Before each step of --at its gradient is taken from all
centers and, for every rate and kind of negatives, from --samples samples of the keyed sampler: for
the embeddings of the batch, and behind them for the weights of the backbone. Neighbours are
searched among the centers of that step. With --identities there is no model: centers are random
directions in families, and embeddings stand at given cosines to theirs.

With G of all centers, G_k of sample k of K, their mean M and squares summed over all elements,

    variance = sum_k |G_k - M|² / (K - 1) / |G|²
    bias = sqrt(|M - G|² / |G|² - variance / K), or 0 below 0

and the angle is what is between M and G whatever their lengths. Other batches of the same size give
the variance of the weights' gradient that is there without sampling; "of the noise" is what
sampling adds to it, as a share. A bound picks the smallest rate whose bias and variance, and those
of all higher rates, do not exceed it.

Shape suffixes: B = rows of the batch, C = all centers, D = embedding, F = families, K = samples,
n = sampled rows, P = elements of all weights.
"""

import argparse
import copy
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from partialfc import ArcFace, Nearest, RowSGD
from partialfc.config import Config
from partialfc.distributed.ranks import Ranks
from partialfc.head.nearest import NearestCenters
from partialfc.head.options import NegativesName
from partialfc.head.rows.optimizer import RowOptimizer
from partialfc.head.sampling import KeyedSampler, Sample
from partialfc.head.sharding import Sharding, default_canonical_shards
from partialfc.margins import Margin
from partialfc.model.build import Model, build
from partialfc.model.step import train_step
from partialfc.runtime.process import running
from partialfc.training.schedule import learning_rate
from partialfc.writing import write_json
from tools import sampling
from tools.bench.conditions import conditions
from tools.bench.text import table

Row = dict[str, Any]

KINDS: tuple[NegativesName, ...] = ("uniform", "weighted", "nearest")
BOUNDS = (0.03, 0.1, 0.3, 1.0)
OTHER_BATCHES = 16
"""That tell how much gradients differ without sampling."""

COSINES = (0.3, 0.5, 0.7)
"""Of embeddings to their centers, without a model."""
FAMILY, DIM, BATCH = 10, 128, 32
"""Without a model: centers of a family, at a cosine of 0.5 to each other; D; B."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A batch against all centers, in fp64.

    Attributes:
        query_BD: Unit embeddings.
        length_B: Of the embeddings.
        unit_CD: Unit centers.
        power_BC: exp(logit - the row's largest).
        slope_B: Of the positive's logit by its cosine.
        scale: s.
    """

    query_BD: Tensor
    length_B: Tensor
    unit_CD: Tensor
    power_BC: Tensor
    slope_B: Tensor
    scale: float

    @classmethod
    def of(cls, row_BD: Tensor, center_CD: Tensor, identity_B: Tensor, margin: Margin) -> "Whole":
        """Compare all with all; the margin is one that tests/support/reference.py has."""
        reference = importlib.import_module("tests.support.reference")
        row_BD, unit_CD = row_BD.double(), torch.nn.functional.normalize(center_CD.double())
        query_BD = torch.nn.functional.normalize(row_BD)
        logit_BC = query_BD @ unit_CD.T
        with torch.enable_grad():
            own_B = logit_BC.gather(1, identity_B[:, None])[:, 0].requires_grad_()
            positive_B = reference.positive_logit(margin)(own_B)
            (slope_B,) = torch.autograd.grad(positive_B.sum(), own_B)
        scale = cast(Any, margin).scale
        logit_BC.mul_(scale).scatter_(1, identity_B[:, None], positive_B.detach()[:, None])
        logit_BC.sub_(logit_BC.amax(1, keepdim=True)).exp_()
        return cls(query_BD, row_BD.norm(dim=1), unit_CD, logit_BC, slope_B, scale)

    def gradient(self, sample: Sample) -> Tensor:
        """Return that of the mean loss by the embeddings, fp64 [B, D]."""
        weight_Bn, unit_nD, target_B1 = self.power_BC, self.unit_CD, sample.target_B[:, None]
        if sample.rows is not None:
            weight_Bn, unit_nD = weight_Bn[:, sample.rows], unit_nD[sample.rows]
        if sample.log_weight_n is not None:
            weight_Bn = weight_Bn * sample.log_weight_n.double().exp()
        share_Bn = weight_Bn / weight_Bn.sum(1, keepdim=True)
        own_B1 = (share_Bn.gather(1, target_B1) - 1) * self.slope_B[:, None]
        along_BD = (share_Bn * self.scale).scatter_(1, target_B1, own_B1) @ unit_nD
        along_BD -= (along_BD * self.query_BD).sum(1, keepdim=True) * self.query_BD
        return along_BD / self.length_B[:, None] / len(along_BD)


def compared(whole: Tensor, tried: list[Tensor]) -> dict[str, float]:
    """Return bias, variance and angle of gradients of any shape, as above."""
    samples, square = len(tried), whole.square().sum()
    mean = torch.stack(tried).mean(0)
    spread = sum(float((one - mean).square().sum()) for one in tried) / (samples - 1)
    away = float((mean - whole).square().sum()) - spread / samples
    length = max(float(mean.square().sum()) - spread / samples, 1e-300) * float(square)
    cosine = float((mean * whole).sum()) / math.sqrt(length)
    return {
        "bias": math.sqrt(max(away, 0.0) / float(square)),
        "variance": spread / float(square),
        "angle_degrees": math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
    }


def errors(
    whole: Whole,
    identity_B: Tensor,
    near: NearestCenters,
    rates: list[float],
    samples: int,
    shards: int | None,
    to_weights: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Row]:
    """Yield what every rate and kind of negatives does to the gradient.

    Args:
        whole: The batch.
        identity_B: Its identities.
        near: Of :func:`searched`.
        rates: Sample rates below 1.
        samples: K.
        shards: Canonical shards; ``None`` for the default.
        to_weights: Takes the embeddings' gradient to that of the weights, fp64 [P].
    """
    true_BD = whole.gradient(Sample(None, identity_B))
    for kind, rate in product(KINDS, rates):
        sampler = KeyedSampler(
            cut(len(whole.unit_CD), shards, None if kind == "uniform" else rate),
            0,
            sample_rate=rate,
            seed=1,
            negatives=near.options if kind == "nearest" else kind,
            nearest=near if kind == "nearest" else None,
        )
        tried = [whole.gradient(sampler(number, identity_B)) for number in range(samples)]
        row: Row = {"negatives": kind, "rate": rate, "embeddings": compared(true_BD, tried)}
        if to_weights is not None:
            true_P = to_weights(true_BD)
            row["weights"] = compared(true_P, [to_weights(one) for one in tried])
        yield row


def searched(center_CD: Tensor) -> NearestCenters:
    """Return the neighbours of these very centers."""
    near = NearestCenters(
        Nearest(), cut(len(center_CD)), Ranks(), dim=center_CD.shape[1], device=center_CD.device
    )
    centers = nn.Parameter(center_CD.clone(), requires_grad=False)
    near.refresh(RowOptimizer(centers, RowSGD(), every_row=True))
    return near


def cut(identities: int, shards: int | None = None, weighted_rate: float | None = None) -> Sharding:
    """Return the cut of identities on one rank; ``None`` for the default number of shards."""
    shards = shards or default_canonical_shards(identities, weighted_rate=weighted_rate)
    return Sharding(num_identities=identities, canonical_shards=shards, world_size=1)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables and write the record."""
    options = _parser().parse_intermixed_args(arguments)
    if options.samples < 2:
        raise SystemExit(f"--samples {options.samples}: a variance needs 2.")
    rates = [float(rate) for rate in options.rates.split(",")]
    started = time.process_time()
    if options.identities:
        found = without_model(options.identities, rates, options.samples)
    elif options.config:
        config = sampling.followed(options.config, options.words, 1, 1.0, "uniform")
        found = in_training(config, {*map(int, options.at.split(","))}, rates, options.samples)
    else:
        raise SystemExit("give a settings file, or --identities.")
    record: Row = {**conditions(), "states": []}
    for state in found:
        record["states"].append({**state, "picked": picked(state)})
        print(shown(record["states"][-1]), flush=True)
        if options.json:
            write_json(options.json, {**record, "cpu_seconds": time.process_time() - started})
    return 0


def without_model(identities: int, rates: list[float], samples: int) -> Iterator[Row]:
    """Yield a state for every cosine of embeddings to their centers."""
    draw = torch.Generator().manual_seed(1)
    family_FD = torch.randn(-(-identities // FAMILY), DIM, generator=draw)
    center_CD = torch.randn(identities, DIM, generator=draw)
    center_CD += family_FD.repeat_interleave(FAMILY, 0)[:identities]
    identity_B = torch.randint(0, identities, (BATCH,), generator=draw)
    own_BD = torch.nn.functional.normalize(center_CD[identity_B].double())
    side_BD = torch.randn(BATCH, DIM, generator=draw).double()
    side_BD -= (side_BD * own_BD).sum(1, keepdim=True) * own_BD
    side_BD = torch.nn.functional.normalize(side_BD)
    near = searched(center_CD)
    for cosine in COSINES:
        row_BD = cosine * own_BD + math.sqrt(1 - cosine**2) * side_BD
        whole = Whole.of(row_BD, center_CD, identity_B, ArcFace())
        rows = [*errors(whole, identity_B, near, rates, samples, None)]
        yield {"cosine": cosine, **_of_batch(whole, identity_B), "rows": rows}


def in_training(config: Config, at: set[int], rates: list[float], samples: int) -> Iterator[Row]:
    """Train at a rate of 1 and yield a state before every step of ``at``."""
    data = sampling.decoded(config)
    with running(config) as runtime:
        model = build(config, runtime, data.count)
        an_epoch = len(data.images) // config.data.global_batch
        steps = config.run.steps or round((config.run.epochs or 1) * an_epoch)
        if unknown := {step for step in at if not 0 <= step < steps}:
            raise SystemExit(f"--at {sorted(unknown)}: must be in [0, {steps}).")

        def batch(step: int) -> tuple[Tensor, Tensor]:
            which = sampling._images_of(config, step, an_epoch, len(data.images))
            images = sampling._changed(data.images, which, step, config)
            return images, torch.from_numpy(data.identities[which])

        for step in range(max(at) + 1):
            if step in at:
                yield {"step": step, **_state(model, batch, step, config, rates, samples)}
            peak = config.optimizer.lr
            plan = config.schedule.model_dump()
            rate = learning_rate(step, peak=peak, total_steps=steps, **plan)
            train_step(model, config, *batch(step), rate)


def _state(
    model: Model,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    step: int,
    config: Config,
    rates: list[float],
    samples: int,
) -> Row:
    """Compare the gradients of one batch, and those of other batches by all centers."""
    head = model.heads[""]
    backbone = copy.deepcopy(model.backbone).train()  # whose statistics may move
    weights = [one for one in backbone.parameters() if one.requires_grad]

    def taken(number: int) -> tuple[Whole, Tensor, Callable[[Tensor], Tensor]]:
        images, identity_B = batch(number)
        row_BD = model.embed(images, backbone)
        whole = Whole.of(row_BD.detach(), head.centers.detach(), identity_B, head.margin)

        def to_weights(gradient_BD: Tensor) -> Tensor:
            found = torch.autograd.grad(
                row_BD, weights, gradient_BD.to(row_BD.dtype), retain_graph=True
            )
            return torch.cat([one.flatten() for one in found]).double()

        return whole, identity_B, to_weights

    whole, identity_B, to_weights = taken(step)
    others = []
    for number in range(step + 1, step + 1 + OTHER_BATCHES):
        other, of_other_B, to_its_weights = taken(number)
        others.append(to_its_weights(other.gradient(Sample(None, of_other_B))))
    mean_P = torch.stack(others).mean(0)
    square = float(to_weights(whole.gradient(Sample(None, identity_B))).square().sum())
    noise = sum(float((one - mean_P).square().sum()) for one in others) / (len(others) - 1) / square
    shards = config.head.canonical_shards
    near = searched(head.centers.detach())
    rows = [*errors(whole, identity_B, near, rates, samples, shards, to_weights)]
    for row in rows:
        row["of_the_noise"] = row["weights"]["variance"] / noise
    return {**_of_batch(whole, identity_B), "variance_of_batches": noise, "rows": rows}


def _of_batch(whole: Whole, identity_B: Tensor) -> Row:
    """How sure the softmax is: the median over rows of the own center's share."""
    own_B = whole.power_BC.gather(1, identity_B[:, None])[:, 0] / whole.power_BC.sum(1)
    return {"identities": len(whole.unit_CD), "own_share": float(np.median(own_B))}


def picked(state: Row) -> list[Row]:
    """Return the rate that each bound picks, of each kind of negatives; 1 where none is within."""
    found = []
    for kind, bound in product(KINDS, BOUNDS):
        rate = 1.0
        for row in sorted(state["rows"], key=lambda row: -row["rate"]):
            if row["negatives"] != kind:
                continue
            error = row["embeddings"]
            if max(error["bias"], error["variance"]) > bound:
                break
            rate = row["rate"]
        found.append({"negatives": kind, "bound": bound, "rate": rate})
    return found


def shown(state: Row) -> str:
    """Return the tables of a state."""
    lines = [
        (
            row["negatives"],
            f"{row['rate']:g}",
            *(f"{row['embeddings'][name]:.3f}" for name in ("bias", "variance")),
            f"{row['embeddings']['angle_degrees']:.1f}",
            *(f"{row['weights'][name]:.3f}" for name in ("bias", "variance") if "weights" in row),
            *([f"{row['of_the_noise']:.3f}"] if "of_the_noise" in row else []),
        )
        for row in state["rows"]
    ]
    where = f"step {state['step']}" if "step" in state else f"cosine {state['cosine']}"
    title = f"{where}: {state['identities']:,} identities, own share {state['own_share']:.2f}"
    names = ("negatives", "rate", "bias", "variance", "angle")
    of_weights = ("weights: bias", "variance", "of the noise") if "step" in state else ()
    picks = [(one["negatives"], f"{one['bound']:g}", f"{one['rate']:g}") for one in state["picked"]]
    return "\n".join(
        (
            table(title, (*names, *of_weights), lines, left=("negatives",)),
            table("Picked", ("negatives", "bound", "rate"), picks, left=("negatives",)),
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument(
        "--at", default="300,1000", help="steps before which it is measured; a list"
    )
    parser.add_argument("--identities", type=int, metavar="C", help="of no model")
    parser.add_argument("--rates", default="0.5,0.25,0.125,0.0625,0.03125", help="a list")
    parser.add_argument("--samples", type=int, default=16, metavar="K", help="of each rate, >= 2")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
