"""The fused passes on a GPU against passes tile by tile, at the sizes that they are made for."""

import pytest
import torch

from partialfc import ArcFace, RowSGD
from partialfc.head.rows.formats import decode
from partialfc.margins import CurricularFace, Margin
from tests.support.gpu import needs_a_real_gpu
from tests.support.heads import flat_head

pytestmark = [
    pytest.mark.gpu,
    needs_a_real_gpu("warps, and would take hours for so many rows"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="no tensor cores for bf16",
    ),
]


def trained(fused: bool, margin: Margin, formats: tuple[str, str], dim: int, **settings):
    """Three steps with a sample, one of them of two micro-batches."""
    centers, momentum = formats
    head = flat_head(
        100_000,
        dim,
        margin,
        sample_rate=0.7,  # more than two tiles
        optimizer=RowSGD(momentum_format=momentum),
        center_format=centers,
        compute="bf16",
        fused=fused,
        device="cuda",
        **settings,
    )
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        embeddings = torch.randn(1000, dim, generator=generator).cuda().requires_grad_()
        labels = torch.randint(0, 100_000, (1000,), generator=generator).cuda()
        head.sample_step(labels)
        parts = 1 + step % 2
        for part, label in zip(embeddings.chunk(parts), labels.chunk(parts), strict=True):
            loss = head(part, label)
            loss.backward()
            losses.append(loss.item())
        head.optimizer.step()
    head.optimizer.settle()
    states = head.optimizer.states()
    velocity = decode(states["momentum"], states.get("momentum_scale"))
    return (
        losses,
        embeddings.grad,
        decode(head.centers.detach(), states.get("centers_scale")),
        velocity,
    )


@pytest.mark.parametrize("dim", [128, 500, 512])
@pytest.mark.parametrize(
    ("margin", "formats", "settings"),
    [
        (ArcFace(), ("fp32", "fp32"), {}),
        (ArcFace(), ("fp16", "int8"), {"keep_mib": 0, "states_in": "host"}),
        (ArcFace(scale=128, label_smoothing=0.1), ("fp32", "fp32"), {}),
        (CurricularFace(), ("bf16", "bf16"), {"keep_mib": 0}),
    ],
    ids=["kept", "fp16 int8 host", "row maximum", "curricular"],
)
def test_fused_trains_as_tile_by_tile(margin, formats, settings, dim):
    """A race between warps, a mask, or a barrier that the interpreter does not need."""
    mine, theirs = (trained(fused, margin, formats, dim, **settings) for fused in (True, False))
    assert mine[0] == pytest.approx(theirs[0], rel=1e-3)
    for one, other in zip(mine[1:], theirs[1:], strict=True):
        assert (one - other).norm() / other.norm() < 2e-2


def test_the_same_inputs_give_the_same_bits():
    runs = [trained(True, ArcFace(), ("fp16", "int8"), 512) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(*pair) for pair in zip(runs[0][1:], runs[1][1:], strict=True))
