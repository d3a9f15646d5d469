"""What a step of the head may touch: every operation of torch's is looked at."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partialfc import ArcFace, RowAdagrad, RowAdamW, RowSGD, SubCenterArcFace
from partialfc.head.tiles import passes
from tests.support.heads import flat_head

IDENTITIES, DIM, BATCH = 100_000, 16, 8
BY_ROWS = {"index_select", "index_copy_", "index_fill_", "detach", "view"}
"""What may be given all rows: it reads or writes those of an index, or makes a view."""


class Sizes(TorchDispatchMode):
    """Names of the operations that take or make a tensor of ``limit`` elements or more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.large, self.largest_made = limit, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        taken = [t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if max([*made, *taken], default=0) >= self.limit:
            self.large.add(function.overloadpacket.__name__)
        if not function.is_view:
            self.largest_made = max([self.largest_made, *made])
        return result


def train(head, *, identities, parts=1):
    generator = torch.Generator().manual_seed(0)
    for fixed in (False, True):
        labels = torch.randint(0, identities, (BATCH,), generator=generator)
        embeddings = torch.randn(BATCH, DIM, generator=generator, requires_grad=True)
        head.prefetch(labels)
        if fixed:
            head.sample_step(labels)
        for piece, own in zip(embeddings.chunk(parts), labels.chunk(parts), strict=True):
            head(piece, own).backward()
        head.optimizer.step()
        with torch.no_grad():
            head(embeddings, labels)


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize(
    ("rule", "center_format"),
    [
        (RowSGD(unsampled="stay"), "fp32"),
        (RowSGD(), "fp32"),
        (RowSGD(momentum_format="int8"), "fp16"),
        (RowSGD(momentum_format="bf16", unsampled="stay"), "bf16"),
        (RowAdamW(), "fp32"),
        (RowAdagrad(), "bf16"),
    ],
    ids=str,
)
def test_nothing_of_a_sampled_step_is_as_large_as_the_shard(rule, center_format, where):
    """One pass over all rows, even to zero a byte of each, would cost more than the step."""
    margins = [ArcFace(label_smoothing=0.1), SubCenterArcFace()]
    for margin, weight in zip(margins, (0.1, 0.0), strict=True):
        head = flat_head(
            IDENTITIES,
            DIM,
            margin,
            sample_rate=1e-3,
            optimizer=rule,
            center_format=center_format,
            centers_in=where,
            states_in=where,
            center_weight=weight,
            inter_class_weight=weight,
        )
        head.optimizer.states()  # made once in a run
        with Sizes(IDENTITIES // 4) as step:
            train(head, identities=IDENTITIES, parts=2)
        assert step.large <= BY_ROWS


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("keep_mib", [0, None])
def test_neither_logits_nor_gradient_of_all_centers_is_ever_one_tensor(
    compute, keep_mib, monkeypatch
):
    """At rate 1 too; what is made is a tile at most."""
    monkeypatch.setitem(passes.TILE_BYTES, "cpu", 1)  # 128 rows
    head = flat_head(4096, DIM, ArcFace(), compute=compute, keep_mib=keep_mib)
    head.optimizer.states()
    with Sizes(1 << 60) as step:
        train(head, identities=4096)
    assert step.largest_made <= 128 * max(DIM, BATCH)


def test_exponentials_of_every_size_stay_within_the_budget(monkeypatch):
    """Those of the last step are held for the next: of another batch size, they were beside it."""
    monkeypatch.setitem(passes.TILE_BYTES, "cpu", 1)
    budget = 1 << 20
    head = flat_head(4096, DIM, ArcFace(), keep_mib=budget / 2**20)
    for batch in (64, 64, 48, 64, 96, 40):
        head(torch.randn(batch, DIM, requires_grad=True), torch.arange(batch)).backward()
        held = head.optimizer.workspace._returned.values()
        unused = sum(tensor.nbytes for tensors in held for tensor in tensors)
        assert 0 < head.optimizer.kept_bytes <= budget - unused
        head.optimizer.step()
    taken = sum(map(len, head.optimizer.workspace._returned.values()))
    with torch.no_grad():
        head(torch.randn(40, DIM), torch.arange(40))
    assert sum(map(len, head.optimizer.workspace._returned.values())) == taken, "none to look at"
