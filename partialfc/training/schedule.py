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
    name: Literal["linear", "polynomial", "cosine", "wsd"] = "linear",
    power: float = 2.0,
    final_factor: float = 0.0,
    decay_steps: int = 1000,
    shape: Literal["sqrt", "linear", "cosine"] = "sqrt",
) -> float:
    """Return the learning rate of optimizer step ``step``.

    Warm-up gives ``peak * (step + 1) / warmup_steps``, so the first step is small and the last one
    of warm-up is at the peak. Then, with t = (step - warmup) / (total - warmup) in [0, 1], the
    rate is ``peak * (final_factor + (1 - final_factor) * fall(t))``, where fall(t) is 1 - t,
    (1 - t) ** power or (1 + cos(pi t)) / 2. ``wsd`` stays at the peak until ``decay_steps`` before
    the end and falls then, t being the share of the decay, as 1 - sqrt(t), 1 - t or the cosine.

    Args:
        step: Steps taken before this one, in [0, total_steps]; ``total_steps`` is the end.
        peak: Highest rate, ``optimizer.lr``; > 0.
        total_steps: Steps of the run, > warmup_steps.
        warmup_steps: Steps of warm-up, >= 0.
        name: How the rate falls after warm-up.
        power: Exponent of ``polynomial``, > 0; the others do not use it.
        final_factor: Rate at the end as a fraction of the peak, in [0, 1].
        decay_steps: Of ``wsd``, >= 1.
        shape: Of the decay of ``wsd``.

    Raises:
        ValueError: If warm-up and decay do not end before the run.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"schedule.warmup_steps = {warmup_steps}: must be fewer than the {total_steps} steps "
            "of the run."
        )
    if name == "wsd" and decay_steps > total_steps - warmup_steps:
        raise ValueError(
            f"schedule.decay_steps = {decay_steps}: must be at most the {total_steps} steps of the "
            f"run without the {warmup_steps} of the warm-up, {total_steps - warmup_steps}."
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
        case "wsd":
            done = max(0.0, 1 - (total_steps - step) / decay_steps)
            fall = {
                "sqrt": 1 - math.sqrt(done),
                "linear": 1 - done,
                "cosine": (1 + math.cos(math.pi * done)) / 2,
            }[shape]
    return peak * (final_factor + (1 - final_factor) * fall)


def weight_factor(step: int, total_steps: int, final_factor: float) -> float:
    """Return the factor of a loss's weight at a step: a straight line from 1 to ``final_factor``.

    Args:
        step: Steps taken before this one, in [0, total_steps).
        total_steps: Steps of the run.
        final_factor: Of the last step; >= 0. A run of one step has 1.
    """
    return 1 + (final_factor - 1) * (step / max(1, total_steps - 1))
