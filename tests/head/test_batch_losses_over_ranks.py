"""Losses beside the softmax in real gloo processes: those of one rank, and their collectives."""

import numpy as np
import pytest
import torch

from partialfc.losses import Triplet, Uniformity
from partialfc.losses.over_ranks import EmbeddingLosses, Weighted
from tests.support import every_loss
from tests.support.center_truth import truth_of
from tests.support.collectives import Collectives
from tests.support.every_loss import EVERY_LOSS, found_of
from tests.support.every_margin import EVERY_MARGIN
from tests.support.heads import flat_head
from tests.support.margin_heads import IDENTITIES, PLAIN, head_of, problem, step_of_rank
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

WEIGHTS = {"center_weight": 3.0, "inter_class_weight": 2.0}
MARGINS = ("arcface", "magface", "sphereface annealed", "sub-center arcface")


def embedding_losses_on_rank(rank, world_size, embeddings, labels):
    found = {}
    for name, loss in EVERY_LOSS.items():
        own = embeddings.chunk(world_size)[rank].clone().requires_grad_()
        value = EmbeddingLosses({"it": Weighted(loss, 2.0)})(own, labels.chunk(world_size)[rank])
        value.backward()
        found[name] = value.item(), (own.grad / world_size).numpy()
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_embedding_losses_see_the_batches_of_all_ranks(world_size):
    """A pair across ranks that is missed, or a mean over one rank's pairs."""
    embeddings, labels = every_loss.problem()
    results = run_on_ranks(world_size, embedding_losses_on_rank, embeddings, labels)
    for name, loss in EVERY_LOSS.items():
        value, gradient = found_of(loss, embeddings, labels, weight=2.0)
        assert len({result[name][0] for result in results}) == 1
        assert results[0][name][0] == pytest.approx(float(value), rel=1e-5)
        found = torch.from_numpy(np.concatenate([result[name][1] for result in results]))
        assert (found - gradient).norm() <= 1e-5 * gradient.norm(), name


def center_losses_on_rank(rank, world_size, inputs):
    found = {}
    for case, (margin, rate, centers, embeddings, labels) in inputs.items():
        dim = embeddings.shape[1]
        settings = {"sample_rate": rate, "optimizer": PLAIN, **WEIGHTS}
        head = flat_head(IDENTITIES, dim, margin, **settings)
        own = embeddings.chunk(world_size)[rank], labels.chunk(world_size)[rank]
        done = step_of_rank(head, centers, *own)
        found[case] = *done, {name: float(term) for name, term in head.terms.items()}
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_center_losses_sharded_and_sampled(world_size):
    """The nearest center may be another rank's, and both must move."""
    inputs, truth = {}, {}
    for name in MARGINS:
        for rate in (0.3, 1.0):
            head = head_of(EVERY_MARGIN[name], sample_rate=rate, **WEIGHTS)
            embeddings, labels = problem(head)
            case = f"{name}, rate {rate}"
            inputs[case] = head.margin, rate, head.centers.detach(), embeddings, labels
            truth[case] = truth_of(head, embeddings, labels)
    results = run_on_ranks(world_size, center_losses_on_rank, inputs)
    for case, (loss, by_embedding, by_center) in truth.items():
        assert len({result[case][0] for result in results}) == 1
        assert all(result[case][3] == results[0][case][3] for result in results)
        assert results[0][case][0] == pytest.approx(float(loss), rel=1e-5), case
        for index, expected in ((1, by_embedding), (2, by_center)):
            value = torch.from_numpy(np.concatenate([result[case][index] for result in results]))
            assert (value - expected).norm() <= 3e-5 * expected.norm(), case


def ties_on_rank(rank, world_size):
    """Two identities on each of two ranks; the neighbours of the first two tie across ranks."""
    settings = {"canonical_shards": 2, "optimizer": PLAIN, "inter_class_weight": 1.0}
    head = flat_head(4, 2, EVERY_MARGIN["cosface"], **settings)
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0], [0.6, 0.8]])
    head.centers.data.copy_(rows[head.owned.start : head.owned.stop])
    head(torch.ones(1, 2, requires_grad=True), torch.tensor([0])).backward()
    (kept,) = head.optimizer._kept
    return [(pull.target_P.tolist(), pull.slope_P.tolist()) for pull in kept.pulls]


def test_ranks_whose_neighbours_tie_share_the_derivative():
    """Center 0 is as near to 1 as to 3: each of the two gets half, not both the whole."""
    first, second = run_on_ranks(2, ties_on_rank)
    assert first == [([0, 0], [0.25, 0.25]), ([1, 1], [0.25, 0.25])]
    assert second == [([-1, -1], [0.25, 0.25]), ([1, 1], [0.25, 0.25])]


def count_on_rank(rank, world_size):
    losses = EmbeddingLosses({"a": Weighted(Triplet()), "b": Weighted(Uniformity())})
    for _ in range(2):  # the first batch is larger than none
        with Collectives() as seen:
            losses(torch.randn(4, 8, requires_grad=True), torch.arange(4)).backward()
    with Collectives() as none:
        EmbeddingLosses({})(torch.randn(4, 8, requires_grad=True), torch.arange(4))
    return seen.seen, none.seen


def test_collectives_are_those_of_the_docstring():
    """b = 4 rows on each of two ranks, D = 8, T = 2."""
    seen, none = run_on_ranks(2, count_on_rank)[0]
    gather, scatter = ("_allgather_base_", 5 * (8 * 4 + 8)), ("_reduce_scatter_base_", 8 * 8 * 4)
    assert seen == [gather, ("allreduce_", 4 * 4), scatter]
    assert none == []
