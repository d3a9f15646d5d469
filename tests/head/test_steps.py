"""Steps whose samples are drawn beside the step before."""

import copy
import functools

import pytest
import torch

from partialfc import ArcFace, PartialFC, RowSGD, Sets, Several, SubCenterArcFace
from partialfc.distributed.shares import Shares
from partialfc.head.steps import StepSamples
from tests.support.heads import flat_head
from tests.support.ranks import run_on_ranks
from tests.support.staging import HOST, IDENTITIES, RULES, assert_equal, batches, head_of, trained


def ahead(head: PartialFC) -> PartialFC:
    """Let a test that brings the rows of the next step fix the next step."""
    head.prefetch = functools.partial(head.sample_step, ahead=True)
    return head


@pytest.mark.parametrize("placement", [None, HOST], ids=["device", "host"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("margin", [None, SubCenterArcFace(scale=16, sub_centers=2)], ids=str)
def test_a_step_that_is_fixed_ahead_is_the_same_step(placement, parts, margin):
    given = batches(9)
    expected = head_of(*RULES["sgd move"], placement, margin=margin)
    found = ahead(head_of(*RULES["sgd move"], placement, margin=margin))
    assert_equal(*(trained(head, parts=parts, given=given) for head in (found, expected)))


@pytest.mark.parametrize(
    "more",
    [
        {"negatives": "weighted"},
        {"sets": Sets(sizes=(150, 250))},
        {"positives": Several(most=2, without="leave_out")},
        {"sample_rate": 1.0},
    ],
    ids=["weighted", "sets", "several", "all"],
)
def test_every_option_has_the_same_step(more):
    results = []
    for fix in (False, True):
        settings = {"sample_rate": 0.3, "optimizer": RowSGD(lr=0.1), **more}
        head = flat_head(IDENTITIES, 16, ArcFace(scale=16), **settings)
        given = [
            (own, _some(labels)) if "positives" in more else (own, labels)
            for own, labels in batches(6)
        ]
        results.append(trained(ahead(head) if fix else head, given=given))
    assert_equal(*results)


def _some(labels):
    """The same with a second identity, and with none."""
    both = torch.stack([labels, labels.roll(1)], dim=1)
    both[::5] = -1
    return both


def trained_on_rank(rank, world_size, fix):
    head = flat_head(50, 8, ArcFace(scale=16), sample_rate=0.3, optimizer=RowSGD(lr=0.1), **HOST)
    shares, losses = Shares((3, 5)), []
    given = [
        torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(step))
        for step in range(5)
    ]
    for step, labels in enumerate(given):
        if fix and step + 1 < len(given):
            head.sample_step(given[step + 1][shares.rows(rank)], shares, ahead=True)
        own = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))[shares.rows(rank)]
        loss = head(own.requires_grad_(), labels[shares.rows(rank)], shares)
        loss.backward()
        head.optimizer.step()
        losses.append(loss.item())
    head.optimizer.settle()
    return losses, head.centers.detach().clone()


def test_ranks_draw_the_same_step_ahead():
    """Of unequal batches, with rows in host memory."""
    plain, fixed = (run_on_ranks(2, trained_on_rank, fix) for fix in (False, True))
    for one, other in zip(plain, fixed, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_an_unknown_identity_is_refused_by_its_own_step():
    head = flat_head(100, 8, ArcFace(), sample_rate=0.2)
    head.sample_step(torch.tensor([3, 100]), ahead=True)
    head(torch.randn(2, 8), torch.tensor([1, 2]))
    head.optimizer.step()
    with pytest.raises(ValueError, match="got 100 at position 1"):
        head(torch.randn(2, 8), torch.tensor([3, 4]))


def test_other_identities_than_those_of_the_step_ahead_are_refused():
    head = flat_head(100, 8, ArcFace(), sample_rate=0.2)
    head.sample_step(torch.tensor([3, 4]), ahead=True)
    head.optimizer.step()
    with pytest.raises(ValueError, match="identity 5 was not given to sample_step"):
        head(torch.randn(2, 8), torch.tensor([3, 5]))


@pytest.mark.parametrize("loaded", ["head", "optimizer"])
def test_a_step_that_was_fixed_ahead_is_forgotten_with_the_state_it_was_of(loaded):
    """It would have the identities of another batch, and centers that were near to others."""
    head = flat_head(100, 8, ArcFace(), sample_rate=0.2)
    saved = copy.deepcopy({"head": head.state_dict(), "optimizer": head.optimizer.state_dict()})
    head.sample_step(torch.tensor([3, 4]), ahead=True)
    part = head if loaded == "head" else head.optimizer
    part.load_state_dict(saved[loaded])
    head.optimizer.step()
    head.sample_step(torch.tensor([7, 8]))
    head(torch.randn(2, 8), torch.tensor([7, 8]))


def test_a_step_is_drawn_once_if_ahead_and_anew_each_time_if_not(monkeypatch):
    """What accumulates fixes its step, whether the loop has done so before or not."""
    head = flat_head(100, 8, ArcFace(), sample_rate=0.2)
    drawn = []
    real = StepSamples._drawn
    monkeypatch.setattr(
        StepSamples, "_drawn", lambda self, *given: drawn.append(given[0]) or real(self, *given)
    )
    head.sample_step(torch.tensor([3, 4]), ahead=True)
    head.optimizer.step()
    head.sample_step(torch.tensor([3, 4]))
    head(torch.randn(1, 8), torch.tensor([3]))
    head(torch.randn(1, 8), torch.tensor([4]))
    assert drawn == [1]
    head.sample_step(torch.tensor([7, 8]))
    head(torch.randn(1, 8), torch.tensor([8]))
    assert drawn == [1, 1]


def test_a_whole_batch_is_weighed_as_if_it_were_not_fixed():
    """The number of rows that count is their number, and not a rounded fraction of all."""
    labels = torch.full((49, 1), -1)
    labels[:3, 0] = torch.tensor([1, 2, 3])
    own, losses = torch.randn(49, 8, generator=torch.Generator().manual_seed(0)), []
    for fix in (False, True):
        several = Several(without="leave_out")
        head = flat_head(100, 8, ArcFace(), sample_rate=0.2, positives=several)
        if fix:
            head.sample_step(labels)
        losses.append(head(own, labels).item())
    assert losses[0] == losses[1]
