"""The fused passes on two ranks, in Triton's interpreter: each has the keys of its own shard."""

import importlib.util

import pytest
import torch

from partialfc import ArcFace, RowSGD
from tests.support.heads import flat_head, small_tiles
from tests.support.ranks import run_on_ranks

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: NO Triton kernel is tested", allow_module_level=True)

pytestmark = pytest.mark.distributed


def trained(rank, world_size, fused):
    with small_tiles(kernels=fused):
        head = flat_head(
            151,
            20,
            ArcFace(scale=128, label_smoothing=0.1),
            sample_rate=0.6,
            optimizer=RowSGD(),
            fused=fused,
        )
        losses = []
        for step in range(2):
            generator = torch.Generator().manual_seed(10 * step + rank)
            embeddings = torch.randn(35, 20, generator=generator).requires_grad_()
            labels = torch.randint(0, 151, (35,), generator=generator)
            loss = head(embeddings, labels)
            loss.backward()
            head.optimizer.step()
            losses.append(loss.item())
    return losses, embeddings.grad.numpy(), head.centers.detach().numpy()


def test_two_ranks_train_as_tile_by_tile():
    """A row maximum, a sum or a pull that is one rank's only."""
    fused, tiles = (run_on_ranks(2, trained, kernels) for kernels in (True, False))
    for mine, theirs in zip(fused, tiles, strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
        for one, other in zip(mine[1:], theirs[1:], strict=True):
            difference, size = (torch.from_numpy(x).norm() for x in (one - other, other))
            assert difference < 1e-4 * size
