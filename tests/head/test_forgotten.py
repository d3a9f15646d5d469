"""Loops that do not take the micro-batches of the head, and sound ones that take many at once."""

import warnings

import pytest
import torch

from partialfc import ArcFace
from partialfc.head import forgotten
from tests.support.heads import flat_head


def run(steps, *, accumulation=1, head_step=True, frozen=False):
    """Return the first warning with its step, and the error of the last step."""
    head = flat_head(100, 8, ArcFace(), sample_rate=0.2)
    backbone = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    backbone.requires_grad_(not frozen)
    optimizer = torch.optim.SGD([torch.zeros(1) if frozen else backbone[0].weight], lr=0.1)
    said = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in range(steps):
            try:
                for _ in range(accumulation):
                    labels = torch.randint(0, 100, (4,))
                    (head(backbone(torch.randn(4, 8)), labels) / accumulation).backward()
            except ValueError as error:
                return said, (step, str(error))
            optimizer.step()
            optimizer.zero_grad()
            if head_step:
                head.optimizer.step()
            said += [(step, str(warning.message), warning.filename) for warning in found]
            found.clear()
    return said, None


@pytest.fixture(autouse=True)
def sooner(monkeypatch):
    monkeypatch.setattr(forgotten, "_REFUSED", 8)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loop_that_forgets_the_optimizer_of_the_head_is_told_and_then_stopped(accumulation):
    said, error = run(20, accumulation=accumulation, head_step=False)
    ((step, message, file),) = said
    assert step <= 5
    assert "head.optimizer.step() was not called" in message
    assert "the backbone has changed 3 times" in message
    assert file == __file__
    assert error[0] <= 10
    assert "the backbone has changed 8 times" in error[1]


@pytest.mark.parametrize("accumulation", [1, 2, 40])
def test_no_number_of_micro_batches_is_wrong(accumulation):
    assert run(12 if accumulation < 40 else 3, accumulation=accumulation) == ([], None)


def test_micro_batches_of_a_frozen_backbone_are_counted(monkeypatch):
    monkeypatch.setattr(forgotten, "_MANY", 20)
    said, error = run(30, head_step=False, frozen=True)
    ((step, message, _),) = said
    assert (step, error) == (20, None)
    assert "was not called for 20 micro-batches: the" in message
