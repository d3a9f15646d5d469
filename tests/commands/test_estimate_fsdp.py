"""Memory of a divided backbone, measured in its ranks against what partialfc estimate says."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.backbones import build_backbone
from partialfc.commands._estimate.backbone import backbone_parts, count_backbone
from partialfc.model.build import assemble
from partialfc.model.step import train_step
from tests.support.models import runtime, settings
from tests.support.ranks import run_on_ranks

EACH = 2
"""Images of a rank."""


def config_of(shard, ranks):
    return settings(
        data={"train": "unused.rec", "global_batch": EACH * ranks},
        backbone={"name": "vit_t", "embedding_dim": 64, "shard": shard, "channels_last": False},
        optimizer={"name": "adamw"},
    )


def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def train(config, name, image_size):
    backbone = build_backbone(name, embedding_dim=64, image_size=image_size)
    head = PartialFC(40, 64, ArcFace(), optimizer=RowSGD(lr=0.1))
    model = assemble(config, runtime(), backbone, head)
    for _ in range(2):
        images = torch.randn(EACH, 3, image_size, image_size)
        train_step(model, config, images, torch.arange(EACH), 1e-3)


def peak_on_rank(_, world_size, shard):
    """Bytes beyond a process that has trained a small network in the same way."""
    ctypes.CDLL(None).mallopt(-3, 100_000)  # M_MMAP_THRESHOLD: what is freed goes back at once
    config = config_of(shard, world_size)
    train(config, "convnet_s", 32)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident
    before = resident("VmRSS")
    train(config, "vit_t", 112)
    gc.collect()
    return resident("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets VmHWM")
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shard"), [(2, "fsdp2"), (4, "fsdp2"), (2, "none")])
def test_memory_of_a_divided_backbone_is_within_15_percent(ranks, shard):
    """ViT-T and AdamW with few images, so that weights and what belongs to them are most."""
    config = config_of(shard, ranks)
    parts = backbone_parts(config, count_backbone(config, ranks), ranks, "cpu")
    *in_a_step, _ = (sum(sizes) for sizes in zip(*(part.bytes for part in parts), strict=True))
    measured = run_on_ranks(ranks, peak_on_rank, shard)
    assert max(in_a_step) == pytest.approx(max(measured), rel=0.15)
