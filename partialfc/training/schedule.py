"""Step -> learning rate: linear warm-up, then a fall to a fraction of the peak.

And step -> factor of the weight of a loss."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    name: Literal["linear", "polynomial", "cosine"] = "linear",
    power: float = 2.0,
    final_factor: float = 0.0,
) -> float:
    """Return the learning rate of optimizer step ``step``.

    Warm-up gives ``peak * (step + 1) / warmup_steps``, so the first step is small and the last one
    of warm-up is at the peak. Then, with t = (step - warmup) / (total - warmup) in [0, 1], the
    rate is ``peak * (final_factor + (1 - final_factor) * fall(t))``, where fall(t) is 1 - t,
    (1 - t) ** power or (1 + cos(pi t)) / 2.

    Args:
        step: Steps taken before this one, in [0, total_steps]; ``total_steps`` is the end.
        peak: Highest rate, ``optimizer.lr``; > 0.
        total_steps: Steps of the run, > warmup_steps.
        warmup_steps: Steps of warm-up, >= 0.
        name: How the rate falls after warm-up.
        power: Exponent of ``polynomial``, > 0; the others do not use it.
        final_factor: Rate at the end as a fraction of the peak, in [0, 1].

    Raises:
        ValueError: If the warm-up does not end before the run.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"schedule.warmup_steps = {warmup_steps}: must be fewer than the {total_steps} steps "
            "of the run."
        )
    assert 0 <= step <= total_steps, f"step {step} of {total_steps}"
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    match name:
        case "linear":
            fall = 1 - progress
        case "polynomial":
            fall = (1 - progress) ** power
        case "cosine":
            fall = (1 + math.cos(math.pi * progress)) / 2
    return peak * (final_factor + (1 - final_factor) * fall)


def weight_factor(step: int, total_steps: int, final_factor: float) -> float:
    """Return the factor of a loss's weight at a step: a straight line from 1 to ``final_factor``.

    Args:
        step: Steps taken before this one, in [0, total_steps).
        total_steps: Steps of the run.
        final_factor: Of the last step; >= 0. A run of one step has 1.
    """
    return 1 + (final_factor - 1) * (step / max(1, total_steps - 1))
