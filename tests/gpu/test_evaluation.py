"""Evaluation on a GPU: the same numbers as on the CPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")

from partialfc.backbones import build_backbone
from partialfc.distributed.ranks import Ranks
from partialfc.evaluation.embedding import embed_images
from partialfc.protocols.all_to_all import combine, search
from partialfc.runtime.process import Runtime
from tests.support.embeddings import clustered
from tests.support.gpu import needs_a_gpu, needs_a_real_gpu

pytestmark = needs_a_gpu


def test_all_to_all_is_exact_on_a_gpu():
    """Its bf16 products are others than the CPU's; what comes out is fp64 all the same."""
    embeddings, identity = clustered(3000, 300)
    targets = (1e-3, 1e-5)
    parts = [search(embeddings, identity, targets, device=d) for d in ("cpu", "cuda")]
    assert combine(parts[:1], identity, targets) == combine(parts[1:], identity, targets)


@needs_a_real_gpu("cuDNN, whose bits these are")
def test_batch_does_not_change_a_bit_on_a_gpu():
    backbone = build_backbone("iresnet18", embedding_dim=128).cuda().eval()
    images = np.random.default_rng(0).integers(0, 256, (70, 112, 112, 3), dtype=np.uint8)
    runtime = Runtime(Ranks(), torch.device("cuda"))
    found = [
        embed_images(backbone, "set", 70, images.__getitem__, runtime, size=112, batch=batch)
        for batch in (1, 256)
    ]
    assert np.array_equal(*found)
