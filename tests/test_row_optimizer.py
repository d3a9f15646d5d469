"""The row rules against torch's dense optimizers and a row-by-row fp64 reference."""

import math

import pytest
import torch
from torch import nn

from partialfc import RowAdamW, RowSGD
from partialfc.row_optimizer import RowRule

STEPS = 200


def rate(step):
    return 0.05 * (1 + math.cos(step / 20)) + 0.001


def gradient_of(step, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).double()


def run_rule(rule: RowRule, start, sampled_at):
    """Apply the rule to the sampled rows of each step, in fp32."""
    rows, states = start.float().clone(), rule.new_states(start.float())
    group = {name: getattr(rule, name) for name in rule.__dataclass_fields__}
    for step in range(STEPS):
        group["lr"] = rate(step)
        index = sampled_at(step)
        gradient = gradient_of(step, start.shape)[index].float()
        old = {name: state[index] for name, state in states.items()}
        new_rows, new_states = rule.update(group, rows[index], gradient, old)
        rows[index] = new_rows
        for name, value in new_states.items():
            states[name][index] = value
    return rows, states


def run_torch(make, start):
    parameter = nn.Parameter(start.clone())
    optimizer = make([parameter])
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(step)
        parameter.grad = gradient_of(step, start.shape)
        optimizer.step()
    return parameter.detach()


START = torch.randn(6, 5, generator=torch.Generator().manual_seed(99)).double()
EVERY_ROW = torch.arange(6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_on_all_rows_is_torch_sgd(momentum):
    rule = RowSGD(momentum=momentum, weight_decay=5e-3)
    rows, _ = run_rule(rule, START, lambda step: EVERY_ROW)
    truth = run_torch(
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=momentum, weight_decay=5e-3), START
    )
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-5)


def test_adamw_on_all_rows_is_torch_adamw():
    rule = RowAdamW(betas=(0.8, 0.95), weight_decay=0.02)
    rows, _ = run_rule(rule, START, lambda step: EVERY_ROW)
    truth = run_torch(
        lambda p: torch.optim.AdamW(p, lr=1.0, betas=(0.8, 0.95), weight_decay=0.02), START
    )
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-5)


def sampled_at(step):
    """Every row but at its own pace; row 5 never."""
    return torch.tensor([row for row in range(5) if step % (row + 1) == 0])


def test_lazy_sgd_moves_a_row_only_when_it_is_sampled():
    rule = RowSGD(momentum=0.9, weight_decay=5e-3)
    rows, states = run_rule(rule, START, sampled_at)
    truth, velocity = START.clone(), torch.zeros_like(START)
    for step in range(STEPS):
        for row in sampled_at(step).tolist():
            gradient = gradient_of(step, START.shape)[row] + 5e-3 * truth[row]
            velocity[row] = 0.9 * velocity[row] + gradient
            truth[row] -= rate(step) * velocity[row]
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states["momentum"].double(), velocity, rtol=1e-4, atol=1e-5)
    assert torch.equal(rows[5], START[5].float())


def test_adamw_corrects_a_row_by_its_own_number_of_updates():
    """Counting the run's steps instead would make the first update of a rare row far too small."""
    rule = RowAdamW(betas=(0.9, 0.999), weight_decay=0.02, eps=1e-8)
    rows, states = run_rule(rule, START, sampled_at)
    truth, first, second = START.clone(), torch.zeros_like(START), torch.zeros_like(START)
    updates = [0] * 6
    for step in range(STEPS):
        for row in sampled_at(step).tolist():
            gradient = gradient_of(step, START.shape)[row]
            updates[row] += 1
            first[row] = 0.9 * first[row] + 0.1 * gradient
            second[row] = 0.999 * second[row] + 0.001 * gradient**2
            mean = first[row] / (1 - 0.9 ** updates[row])
            root = (second[row] / (1 - 0.999 ** updates[row])).sqrt() + 1e-8
            truth[row] = truth[row] * (1 - rate(step) * 0.02) - rate(step) * mean / root
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-4)
    assert states["updates"].squeeze(1).tolist() == updates


@pytest.mark.parametrize("rule", [RowSGD(), RowAdamW()])
def test_update_leaves_its_inputs_alone(rule):
    group = {name: getattr(rule, name) for name in rule.__dataclass_fields__}
    row, gradient = torch.randn(4, 3), torch.randn(4, 3)
    states = rule.new_states(row)
    kept = [value.clone() for value in (row, gradient, *states.values())]
    rule.update(group, row, gradient, states)
    assert all(map(torch.equal, kept, (row, gradient, *states.values())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowSGD(lr=-1), "lr must be >= 0"),
        (lambda: RowSGD(lr=math.nan), "lr must be >= 0"),
        (lambda: RowSGD(momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: RowSGD(weight_decay=-1e-4), "weight_decay must be >= 0"),
        (lambda: RowAdamW(betas=(0.9, 1.0)), r"betas must be two numbers in \[0, 1\)"),
        (lambda: RowAdamW(eps=0), "eps must be > 0"),
    ],
)
def test_bad_settings_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
