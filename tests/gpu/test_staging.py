"""Rows in pinned host memory, a stream of their own, and the fused kernel on compact rows."""

import pytest

from tests.support.gpu import INTERPRETED, needs_a_gpu
from tests.support.staging import HOST, RULES, STEPS, assert_equal, batches, head_of, trained

pytestmark = needs_a_gpu


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("placement", [{"states_in": "host"}, HOST], ids=["states", "both"])
@pytest.mark.parametrize("rule", RULES)
def test_every_step_is_that_of_rows_on_the_device(rule, placement, prefetch):
    """A copy that is read before it has arrived, or overwritten before it was sent."""
    results = []
    for where in (None, placement):
        head = head_of(*RULES[rule], where, device="cuda")
        given = batches(9 if INTERPRETED else STEPS)
        losses, centers, states = trained(head, prefetch=prefetch, given=given)
        results.append((losses, centers.cpu(), {k: v.cpu() for k, v in states.items()}))
    assert_equal(results[1], results[0])


def test_host_tensors_are_pinned():
    """Or copies would wait for the host."""
    head = head_of(*RULES["sgd"], HOST, device="cuda")
    assert head.centers.is_pinned()
    assert all(state.is_pinned() for state in head.optimizer.states().values())
