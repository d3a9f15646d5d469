"""The learning rate: exact values, ends, continuity and direction."""

import itertools
import math
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from partialfc.config.optimizers import Cosine, Linear, Polynomial, Wsd
from partialfc.training.schedule import learning_rate

NAMES: list[Literal["linear", "polynomial", "cosine"]] = ["linear", "polynomial", "cosine"]

schedules = st.fixed_dictionaries(
    {
        "peak": st.floats(1e-6, 10),
        "total_steps": st.integers(1, 400),
        "warmup_steps": st.integers(0, 100),
        "name": st.sampled_from(NAMES),
        "power": st.floats(0.5, 4),
        "final_factor": st.floats(0, 1),
    }
).filter(lambda schedule: schedule["warmup_steps"] < schedule["total_steps"])


def rates(schedule: dict[str, Any]) -> list[float]:
    return [learning_rate(step, **schedule) for step in range(schedule["total_steps"] + 1)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "linear"}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0]),
        ({"name": "linear", "final_factor": 0.2}, [0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"name": "linear", "final_factor": 1.0}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ({"name": "polynomial"}, [0.25, 0.5, 0.75, 1, 1, 0.5625, 0.25, 0.0625, 0]),
        ({"name": "polynomial", "power": 1.0}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0]),
        (
            {"name": "cosine"},
            [0.25, 0.5, 0.75, 1, 1, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4, 0],
        ),
    ],
)
def test_values_by_hand(schedule: dict[str, Any], expected: list[float]) -> None:
    """Four steps of warm-up, four of decay."""
    values = rates({"peak": 1.0, "total_steps": 8, "warmup_steps": 4, **schedule})
    assert values == pytest.approx(expected, abs=1e-15)


@given(schedules)
def test_ends(schedule: dict[str, Any]) -> None:
    """The first step of warm-up is small, not at the full rate as in arcface_torch."""
    values, peak, warmup = rates(schedule), schedule["peak"], schedule["warmup_steps"]
    assert values[0] == pytest.approx(peak / max(warmup, 1))
    assert values[warmup] == peak
    assert values[max(warmup - 1, 0)] == peak
    assert values[-1] == pytest.approx(peak * schedule["final_factor"], abs=1e-15 * peak)


@given(schedules)
def test_rises_then_falls(schedule: dict[str, Any]) -> None:
    values, warmup = rates(schedule), schedule["warmup_steps"]
    rising, falling = values[: warmup + 1], values[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert min(values) >= 0
    assert max(values) == schedule["peak"]


@given(schedules)
def test_no_jump(schedule: dict[str, Any]) -> None:
    """Two neighbours differ by at most the steepest slope of the two parts."""
    assume(schedule["power"] >= 1)  # a root is steep without bound at its end
    peak, warmup = schedule["peak"], schedule["warmup_steps"]
    steepest = {"linear": 1.0, "polynomial": schedule["power"], "cosine": math.pi / 2}
    rise = peak / max(warmup, 1)
    fall = peak * steepest[schedule["name"]] / (schedule["total_steps"] - warmup)
    values = rates(schedule)
    for step, (before, after) in enumerate(itertools.pairwise(values)):
        assert abs(after - before) <= (rise if step < warmup else fall) * (1 + 1e-9)


@pytest.mark.parametrize("section", [Linear(), Polynomial(power=3.0), Cosine()])
def test_takes_the_settings_of_every_schedule(section: Linear | Polynomial | Cosine) -> None:
    """The section [schedule] is passed on as it is."""
    halfway = {"linear": 0.5, "polynomial": 0.125, "cosine": 0.5}[section.name]
    value = learning_rate(50, peak=1.0, total_steps=100, **section.model_dump())
    assert value == pytest.approx(halfway)


@pytest.mark.parametrize(
    ("shape", "halfway"), [("sqrt", 1 - math.sqrt(0.5)), ("linear", 0.5), ("cosine", 0.5)]
)
def test_wsd_stays_and_then_falls_and_does_not_know_the_end_before(shape, halfway) -> None:
    """So a run that is lengthened before its decay takes the steps that it would have taken."""
    schedule = Wsd(warmup_steps=10, decay_steps=20, shape=shape, final_factor=0.1).model_dump()
    values = [learning_rate(at, peak=2.0, total_steps=100, **schedule) for at in range(101)]
    longer = [learning_rate(at, peak=2.0, total_steps=300, **schedule) for at in range(301)]
    assert values[:80] == longer[:80]
    assert values[9:81] == [2.0] * 72
    assert values[90] == pytest.approx(2.0 * (0.1 + 0.9 * halfway))
    assert values[100] == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"schedule.decay_steps = 20: .* at most .* 19"):
        learning_rate(0, peak=2.0, total_steps=29, **schedule)


def test_a_warm_up_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule.warmup_steps = 100.* 100 steps of the run"):
        learning_rate(0, peak=0.1, total_steps=100, warmup_steps=100)
