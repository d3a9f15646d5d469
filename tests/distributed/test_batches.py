"""Batches of all ranks in real gloo processes: whatever their size, and refused if unequal."""

import pytest
import torch

from partialfc import ArcFace
from partialfc.distributed.batches import Batches
from partialfc.distributed.ranks import Ranks, sum_to_owner
from partialfc.distributed.shares import Shares
from partialfc.losses import LOSSES
from partialfc.losses.over_ranks import EmbeddingLosses, Weighted
from tests.support.collectives import Collectives
from tests.support.heads import flat_head
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed


def rows_of(rank, size, dtype):
    generator = torch.Generator().manual_seed(100 * rank + size)
    queries = torch.randn(3, size, generator=generator).T.to(dtype)  # column by column
    return queries, torch.randint(-9, 2**40, (size,), generator=generator), queries[:, 0].float()


def gather_on_rank(rank, world_size, sizes, dtype):
    batches = Batches(Ranks.of())
    counts = []
    for size in sizes:
        every = [rows_of(one, size, dtype) for one in range(world_size)]
        with Collectives() as seen:
            gathered = batches.gather(*every[rank])
        for found, parts in zip(gathered, zip(*every, strict=True), strict=True):
            assert torch.equal(found, torch.cat(parts))
            assert found.is_contiguous()
        assert torch.equal(batches.gather_identities(every[rank][1]), gathered[1])
        counts.append([name for name, _ in seen.seen])
    return [len(names) for names in counts]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_may_grow_and_shrink_together(world_size, dtype):
    """One gather each; two for the first and for one that is larger than the last."""
    sizes = [4, 4, 7, 2, 2, 1, 3]
    for counts in run_on_ranks(world_size, gather_on_rank, sizes, dtype):
        assert counts == [2, 1, 2, 1, 1, 1, 2]


def shares_on_rank(rank, world_size, every_sizes):
    batches = Batches(Ranks.of())
    for sizes in every_sizes:
        every = [rows_of(one, size, torch.float32) for one, size in enumerate(sizes)]
        gathered = batches.gather(*every[rank], Shares(sizes))
        for found, parts in zip(gathered, zip(*every, strict=True), strict=True):
            assert torch.equal(found, torch.cat(parts))
        gradient = torch.arange(2.0 * sum(sizes)).view(-1, 2) * (rank + 1)
        owned = sum_to_owner(gradient, Ranks.of(), Shares(sizes))
        whole = torch.arange(2.0 * sum(sizes)).view(-1, 2) * 6
        assert torch.equal(owned, whole[Shares(sizes).rows(rank)])
    try:
        batches.gather(*every[rank], Shares((3, 3, 3)))
    except ValueError as error:
        return str(error)
    return ""


def test_shares_may_differ_and_are_what_was_said():
    """Nothing of what fills a smaller share up on the way is seen."""
    sizes = [(4, 3, 3), (1, 5, 2), (2, 2, 2), (3, 3, 2)]
    messages = run_on_ranks(3, shares_on_rank, sizes)
    assert {*messages} == {
        "batches must have the sizes of the shares, got 2 on rank 2 instead of 3."
    }


def refused_on_rank(rank, world_size, what, before, sizes):
    head = flat_head(
        50, 8, ArcFace(), sample_rate=0.5, states_in="host" if what == "prefetch" else "device"
    )
    losses = EmbeddingLosses({"one": Weighted(next(iter(LOSSES.values()))())})

    def take(size):
        embeddings = torch.randn(size, 8, requires_grad=True)
        identities = torch.randint(0, 50, (size,))
        if what == "head":
            return head(embeddings, identities)
        if what == "losses":
            return losses(embeddings, identities)
        return getattr(head, what)(identities)

    for size in before:
        take(size)
    try:
        take(sizes[rank])
    except ValueError as error:
        take(3)  # all of them refused it, so all can go on
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["head", "losses", "sample_step", "prefetch"])
@pytest.mark.parametrize("before", [(), (4,), (9, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(4, 3), (3, 4)], ids=str)
def test_unequal_batches_are_refused_on_every_rank(what, before, sizes):
    """A rank read what nobody had sent as an identity."""
    messages = run_on_ranks(2, refused_on_rank, what, before, sizes)
    assert messages[0] == messages[1]
    assert f"got {sizes[1]} on rank 1 and {sizes[0]} on rank 0" in messages[0]
    assert "drop_last=True" in messages[0]
