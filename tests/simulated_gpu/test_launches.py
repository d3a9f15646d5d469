"""How many operators and kernels a step gives a GPU: each is 3 to 6 us of the host's time.

A bound is what there is. Who needs more than that raises it here, and sees what it costs.
"""

from itertools import pairwise

import pytest
import torch

from partialfc import RowAdagrad, RowAdamW, RowSGD
from partialfc.backbones.iresnet import DEPTHS
from partialfc.distributed.ranks import Ranks
from partialfc.head.tiles import passes
from partialfc.model.build import build
from partialfc.model.heads import Numbering
from partialfc.model.step import train_step
from partialfc.runtime.process import Runtime
from tests.support.every_margin import EVERY_MARGIN
from tests.support.gpu import INTERPRETED
from tests.support.heads import flat_head
from tests.support.models import settings
from tests.support.places import ROOT

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="make test-interpreted runs it: it counts Triton's kernels"
)

if INTERPRETED:
    from tests.simulated_gpu.watch import Watch

ROWS, DIM, BATCH = 60, 16, 16
RULES = {
    "sgd stay": RowSGD(unsampled="stay"),
    "sgd move": RowSGD(unsampled="move"),
    "adamw": RowAdamW(),
    "adagrad": RowAdagrad(),
}
OF_RULES = {
    ("sgd stay", 1.0): (82, 6, 10),
    ("sgd stay", 0.1): (94, 6, 10),
    ("sgd move", 1.0): (82, 6, 10),
    ("sgd move", 0.1): (95, 6, 18),
    ("adamw", 1.0): (82, 6, 48),
    ("adamw", 0.1): (94, 6, 56),
    ("adagrad", 1.0): (82, 6, 36),
    ("adagrad", 0.1): (94, 6, 40),
}
"""Of ArcFace: forward, backward, step."""
OF_MARGINS = {
    "cosface": (74, 6, 10),
    "softmax": (86, 6, 23),
    "uniface": (95, 6, 10),
    "combined": (105, 6, 10),
    "elasticface": (109, 6, 10),
    "arcface s 128": (110, 6, 14),
    "arcface smoothed": (113, 7, 11),
    "adacos": (120, 7, 11),
    "sub-center arcface": (121, 6, 10),
    "adaface": (122, 6, 10),
    "curricularface": (166, 6, 14),
    "mv-arc-softmax": (168, 6, 14),
    "magface": (180, 7, 11),
    "sphereface": (183, 7, 15),
    "l-softmax": (206, 7, 23),
}
A_TILE = 11
A_BLOCK, BESIDE_BLOCKS = 25, 201
"""Of a residual network, forward and backward; beside them the head and both optimizers."""


def launches(margin, rule, rate, compute="bf16"):
    """Of forward, backward and step, once all is there that stays."""
    generator = torch.Generator().manual_seed(0)
    head = flat_head(
        ROWS, DIM, margin, sample_rate=rate, optimizer=rule, compute=compute, device="cuda"
    )
    given = [torch.randint(0, ROWS, (BATCH,), generator=generator) for _ in range(4)]
    own = torch.randn(BATCH, DIM, generator=generator).cuda().requires_grad_()
    with Watch() as watch:
        for labels, ahead in pairwise(given):
            there = labels.pin_memory().cuda(non_blocking=True)
            if rate < 1:
                head.sample_step(ahead, ahead=True)
            counts = [watch.launches]
            loss = head(own, there)
            counts.append(watch.launches)
            loss.backward()
            counts.append(watch.launches)
            head.optimizer.step()
            counts.append(watch.launches)
    return tuple(after - before for before, after in pairwise(counts))


def within(found, bound):
    return all(one <= most for one, most in zip(found, bound, strict=True))


@pytest.mark.parametrize(("name", "rate"), OF_RULES)
def test_a_step_of_each_rule(name, rate):
    found = launches(EVERY_MARGIN["arcface"], RULES[name], rate)
    assert within(found, OF_RULES[name, rate]), found


@pytest.mark.parametrize("name", OF_MARGINS)
def test_a_step_of_each_margin(name):
    found = launches(EVERY_MARGIN[name], RULES["sgd move"], 1.0)
    assert within(found, OF_MARGINS[name]), found


def test_one_more_tile(monkeypatch):
    """What a matrix of centers costs the host, by the tile of a hundred microseconds."""
    found = []
    for tiles in (1, 2):
        monkeypatch.setattr(passes, "TILE_BYTES", {"cuda": 1})
        monkeypatch.setattr(passes, "_TILE_ROWS", ROWS // tiles)
        found.append(sum(launches(EVERY_MARGIN["arcface"], RULES["sgd move"], 1.0)))
    assert found[1] - found[0] <= A_TILE


def test_a_step_of_a_residual_network():
    """One more block of it, and all that is not a block."""

    def of(depth):
        size = {"train": "unused.rec", "global_batch": 8, "image_size": 32}
        backbone = {"name": f"iresnet{depth}", "embedding_dim": 16}
        config = settings(
            data=size, backbone=backbone, precision={"compute": "bf16"}, head={"sample_rate": 0.3}
        )
        runtime = Runtime(Ranks(), torch.device("cuda"))
        model = build(config, runtime, {"": Numbering((range(ROWS),))})
        generator = torch.Generator().manual_seed(0)
        given = [torch.randint(0, ROWS, (8,), generator=generator) for _ in range(4)]
        images = torch.randn(8, 3, 32, 32, generator=generator).cuda()
        with Watch() as watch:
            for labels, ahead in pairwise(given):
                model.heads.sample_step(config, ahead, ahead=True)
                before = watch.launches
                train_step(model, config, images, labels, 0.1)
        return watch.launches - before

    small, large = of(18), of(34)
    assert (large - small) / 8 <= A_BLOCK
    assert small - 8 * A_BLOCK <= BESIDE_BLOCKS


def test_the_page_has_these_numbers():
    """kernels.md: who waits for the host reads there what a step gives a GPU."""
    page = (ROOT / "partialfc/head/kernels.md").read_text()
    for rule in ("sgd move", "adamw"):
        assert f"| {sum(OF_RULES[rule, 1.0])}; {sum(OF_RULES[rule, 0.1])} |" in page
    names = "cosface", "adaface", "curricularface", "magface", "l-softmax"
    assert f"| {'; '.join(str(sum(OF_MARGINS[name])) for name in names)} |" in page
    assert f"| each further tile, SGD | {A_TILE} |" in page
    blocks = sum(DEPTHS["iresnet50"])
    assert f"forward to update | {BESIDE_BLOCKS + blocks * A_BLOCK} |" in page
