"""Every margin on a sharded, sampled head in real gloo processes against the fp64 equations."""

import numpy as np
import pytest
import torch

from partialfc import PartialFC
from tests.support import loss_truth
from tests.support.collectives import Collectives
from tests.support.every_margin import EVERY_MARGIN
from tests.support.margin_heads import (
    BATCH,
    IDENTITIES,
    PLAIN,
    head_of,
    problem,
    settings_of,
    state_of,
    step_of_rank,
)
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

CASES = {
    2: (tuple(EVERY_MARGIN), (0.3, 1.0)),
    3: (("arcface smoothed", "curricularface s 32", "magface"), (0.3, 1.0)),
    4: (tuple(EVERY_MARGIN), (0.3,)),
}
"""Margins and sample rates by number of ranks."""


def whole_head(margin, rate):
    """The same head on one rank, outside of any process group."""
    return head_of(margin, sample_rate=rate)


def losses_on_rank(rank, world_size, inputs):
    found = {}
    for case, (margin, rate, centers, embeddings, labels) in inputs.items():
        head = PartialFC(IDENTITIES, embeddings.shape[1], margin, sample_rate=rate, optimizer=PLAIN)
        own = embeddings.chunk(world_size)[rank], labels.chunk(world_size)[rank]
        found[case] = *step_of_rank(head, centers, *own), state_of(head)
    return found


@pytest.mark.parametrize("world_size", CASES)
def test_every_margin_sharded_and_sampled(world_size):
    inputs, truth = {}, {}
    names, rates = CASES[world_size]
    for name in names:
        margin = EVERY_MARGIN[name]
        for rate in rates:
            head = whole_head(margin, rate)
            embeddings, labels = problem(head)
            case = f"{name}, rate {rate}"
            centers = head.centers.detach()
            inputs[case] = margin, rate, centers, embeddings, labels
            settings = settings_of(head, labels)
            truth[case] = loss_truth.gradients_of(margin, embeddings, centers, labels, **settings)
    assert BATCH % world_size == 0
    results = run_on_ranks(world_size, losses_on_rank, inputs)
    for case, (loss, embedding_gradient, center_gradient) in truth.items():
        assert len({result[case][0] for result in results}) == 1, case
        assert results[0][case][0] == pytest.approx(float(loss), rel=1e-5), case
        states = [result[case][3] for result in results]
        assert all(state == states[0] for state in states), case
        for index, expected in ((1, embedding_gradient), (2, center_gradient)):
            value = torch.from_numpy(np.concatenate([result[case][index] for result in results]))
            assert (value - expected).norm() <= 2e-5 * expected.norm() + 1e-7, case


def count_on_rank(rank, world_size, margins):
    found = {}
    for name, margin in margins.items():
        head = PartialFC(100, 8, margin, sample_rate=0.5)
        for _ in range(2):  # the very first pass has more
            with Collectives() as step:
                head(torch.randn(4, 8, requires_grad=True), torch.arange(4)).backward()
                head.optimizer.step()
        found[name] = step.seen
    return found


def test_collectives_of_margins_that_need_more():
    """b = 4 rows on each of two ranks, D = 8: what the docstring of the head says."""
    names = ("cosface", "curricularface s 32", "magface", "arcface smoothed", "modified softmax")
    found = run_on_ranks(2, count_on_rank, {name: EVERY_MARGIN[name] for name in names})[0]
    row = 8 * 4  # B fp32 numbers
    gather, scatter = ("_allgather_base_", 5 * (8 * 4 + 8)), ("_reduce_scatter_base_", 8 * 8 * 4)
    with_norms = ("_allgather_base_", 5 * (8 * 4 + 8 + 4))
    sums, positives, maximum = ("allreduce_", 2 * row), ("allreduce_", row), ("allreduce_", row)
    assert found["cosface"] == [gather, sums, scatter]
    assert found["curricularface s 32"] == [gather, positives, sums, scatter]
    assert found["magface"] == [with_norms, ("allreduce_", 5 * row), scatter]
    assert found["arcface smoothed"] == [gather, ("allreduce_", 4 * row), scatter]
    assert found["modified softmax"] == [gather, maximum, ("allreduce_", 4 * row), scatter]
