"""What unsampled rows have missed is kept of the last steps only, in a run of any length.

The oldest steps are dropped when every row is past them: rows that no step sampled for so long are
brought up to date first.
"""

import copy

import pytest
import torch

from partialfc import RowSGD
from partialfc.head.rows import catch_up
from partialfc.head.rows import optimizer as row_optimizer
from tests.head.test_row_optimizer import center_rows, slowly, train_head
from tests.support import reference
from tests.support.staging import HOST, RULES, assert_equal, batches, head_of, trained

BLOCK, KEPT = 4, 8


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(catch_up, "_BLOCK", BLOCK)
    monkeypatch.setattr(catch_up, "_KEPT", KEPT)


def moves_of(head):
    return head.optimizer.shared_state()["moves"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rows_still_equal_dense_sgd_and_memory_is_bounded(momentum):
    """160 MB a rank after five million steps, in every checkpoint, and 1.3 s at once."""
    rule = RowSGD(momentum=momentum, weight_decay=5e-3, unsampled="move")
    head, truth, losses = train_head(rule, rate_of=slowly, steps=120)
    assert len(moves_of(head)) <= KEPT + BLOCK
    at_step = head.optimizer.states()["at_step"]
    assert at_step.min() >= 0
    assert at_step.max() == len(moves_of(head)) - 1
    head.optimizer.catch_up(None)
    assert reference.relative_error(center_rows(head), truth) < 3e-6
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=3e-6)


def test_rows_that_miss_fewer_steps_are_the_same_to_the_last_bit(monkeypatch):
    """Nearly all are: at a sample rate of 1 in 1,000 a row waits 65,536 steps with a chance of
    e^-65."""
    given = batches(60)
    bounded = head_of(*RULES["sgd move"], None, rate=0.98)
    found = trained(bounded, given=given)
    monkeypatch.setattr(catch_up, "_KEPT", 1000)
    whole = head_of(*RULES["sgd move"], None, rate=0.98)
    expected = trained(whole, given=given)
    dropped = len(moves_of(whole)) - len(moves_of(bounded))
    assert dropped >= 40
    expected[2]["at_step"] -= dropped
    assert_equal(found, expected)
    assert torch.equal(moves_of(bounded), moves_of(whole)[dropped:])


@pytest.mark.parametrize("rule", ["sgd move", "sgd move fp8 int8"])
@pytest.mark.parametrize("where", [{"states_in": "host"}, {"centers_in": "host"}, HOST], ids=str)
def test_rows_in_host_memory_are_those_on_the_device(rule, where, monkeypatch):
    """What was gathered for the next step is older than rows that have caught up meanwhile."""
    monkeypatch.setattr(row_optimizer, "_STAGED_ROWS", 16)
    given, results = batches(40), []
    for placement in (None, where):
        head = head_of(*RULES[rule], placement, rate=0.1)
        results.append(trained(head, given=given))
        assert len(moves_of(head)) <= KEPT + BLOCK
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("stop", [11, 12, 13, 24])
def test_a_run_that_goes_on_drops_the_same(stop):
    given = batches(40)
    rule = RULES["sgd move fp8 int8"]
    straight = head_of(*rule, None, rate=0.1)
    trained(straight, given=given[:stop])
    saved = copy.deepcopy((straight.state_dict(), straight.optimizer.state_dict()))
    expected = trained(straight, given=given[stop:])
    other = head_of(*rule, None, rate=0.1)
    other.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    assert_equal(trained(other, given=given[stop:]), expected)
    assert torch.equal(moves_of(other), moves_of(straight))


def test_a_checkpoint_of_before_with_every_step_is_cut(monkeypatch):
    """It has the products of all steps; the first step after it drops what is too old."""
    given = batches(40)
    head = head_of(*RULES["sgd move"], None, rate=0.3)
    monkeypatch.setattr(catch_up, "_KEPT", 1000)
    trained(head, given=given[:30])
    long = len(moves_of(head))
    assert long > 25
    saved = copy.deepcopy((head.state_dict(), head.optimizer.state_dict()))
    wanted = trained(head, given=given[30:])
    monkeypatch.setattr(catch_up, "_KEPT", KEPT)
    other = head_of(*RULES["sgd move"], None, rate=0.3)
    other.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    found = trained(other, given=given[30:])
    assert len(moves_of(other)) <= KEPT + BLOCK
    assert found[0] == pytest.approx(wanted[0], rel=1e-5, nan_ok=True)
    for one in (head, other):
        one.optimizer.catch_up(None)
    torch.testing.assert_close(other.centers, head.centers, rtol=1e-5, atol=1e-7)
