"""Rows in pinned host memory, a stream of their own, and the fused kernel on compact rows."""

from functools import cache

import pytest

from tests.support.gpu import INTERPRETED, needs_a_gpu
from tests.support.staging import HOST, RULES, STEPS, assert_equal, batches, head_of, trained

pytestmark = needs_a_gpu


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("placement", [{"states_in": "host"}, HOST], ids=["states", "both"])
@pytest.mark.parametrize("rule", RULES)
def test_every_step_is_that_of_rows_on_the_device(rule, placement, prefetch):
    """A copy that is read before it has arrived, or overwritten before it was sent."""
    assert_equal(_trained(rule, placement, prefetch=prefetch), _on_the_device(rule))


@cache
def _on_the_device(rule):
    return _trained(rule, None, prefetch=True)


def _trained(rule, placement, *, prefetch):
    rate, steps = (0.06, 9) if INTERPRETED else (0.3, STEPS)
    head = head_of(*RULES[rule], placement, rate=rate, device="cuda")
    losses, centers, states = trained(head, prefetch=prefetch, given=batches(steps))
    return losses, centers.cpu(), {name: state.cpu() for name, state in states.items()}


def test_host_tensors_are_pinned():
    """Or copies would wait for the host."""
    head = head_of(*RULES["sgd"], HOST, device="cuda")
    assert head.centers.is_pinned()
    assert all(state.is_pinned() for state in head.optimizer.states().values())
