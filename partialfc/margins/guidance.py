"""What the numbers of a margin mean, and when they cannot work.

Bounds of CosFace (https://arxiv.org/abs/1801.09414, sections 3.3 and 3.4).

Shape suffixes: N = angles; B = rows of a batch, here the angles.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from partialfc.margins import ElasticFace, Margin, Rows

_LAST_STEP = 1 << 40
WANTED_POSTERIOR = 0.9
"""A softmax that cannot reach it pushes at samples that are perfect already."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The positive's logit and its slope at some angles, at one norm of the embedding.

    Attributes:
        logit_N: z.
        slope_N: ∂z/∂cosine.
        scale: Factor of a negative's cosine.
    """

    logit_N: Tensor
    slope_N: Tensor
    scale: float


def smallest_scale(classes: int, posterior: float) -> float:
    """Return the s that lets every class reach a posterior at best: (C-1)/C ln((C-1)P/(1-P)).

    Raises:
        ValueError: If there are fewer than two classes or the posterior is not in (0, 1).
    """
    if classes < 2:
        raise ValueError(f"classes must be >= 2, got {classes}.")
    if not 0 < posterior < 1:
        raise ValueError(f"posterior must be in (0, 1), got {posterior}.")
    return max(0.0, (classes - 1) / classes * math.log((classes - 1) * posterior / (1 - posterior)))


def largest_additive(classes: int, embedding_dim: int) -> float:
    """Return the additive margin that no arrangement of class centers can exceed.

    1 - cos(2π/C) in two dimensions, C/(C-1) where C <= D + 1; beyond that it must stay well below.

    Raises:
        ValueError: If there are fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"classes must be >= 2, got {classes}.")
    if embedding_dim == 2:
        return 1 - math.cos(2 * math.pi / classes)
    return classes / (classes - 1)


def curve(margin: Margin, theta_N: Tensor, norm: float, num_identities: int = 1000) -> Curve:
    """Return the positive's logit at some angles.

    Args:
        margin: Any; annealing is over, moving averages stand as at the first step, what is drawn is
            at its mean.
        theta_N: Radians in [0, pi].
        norm: Length of the embedding; only some margins look at it. Where the length of a class
            center is kept, it is 1.
        num_identities: C, for a scale that follows from it.
    """
    if isinstance(margin, ElasticFace):
        margin = replace(margin, deviation=0.0, sort=False)
    state = {name: torch.tensor(value) for name, value in margin.new_state(num_identities).items()}
    norm_N = torch.full_like(theta_N, norm)
    gain_N = margin.gain(norm_N, state)
    gain = 1.0 if gain_N is None else float(gain_N.flatten()[0])
    rows = Rows(
        dot_B=theta_N.cos() * gain,
        norm_B=norm_N,
        length_B=None if margin.unit_centers else torch.ones_like(theta_N),
        step=_LAST_STEP,
        key=0,
    )
    found = margin.positive(state, rows)
    return Curve(found.logit_B, found.slope_B * gain, margin.scale * gain)


def boundary(margin: Margin, norm: float, num_identities: int = 1000) -> float:
    """Return the first angle in radians at which the positive's logit is that of a negative at 90°.

    0 if it is smaller there already, pi if it is larger at every angle.
    """
    theta_N = torch.linspace(0, math.pi, 18001)
    below = (curve(margin, theta_N, norm, num_identities).logit_N <= 0).nonzero()
    return float(theta_N[below[0, 0]]) if len(below) else math.pi


def posterior(margin: Margin, classes: int, norm: float, num_identities: int = 1000) -> float:
    """Return the probability of a perfect sample with its margin, all others at cosine -1/(C-1).

    That of its own center alone where each is a question of its own.
    """
    found = curve(margin, torch.zeros(1), norm, num_identities)
    state = {name: torch.tensor(value) for name, value in margin.new_state(num_identities).items()}
    offset = margin.offset(state)
    if offset is not None:
        return float((found.logit_N[0] - offset).sigmoid())
    negative = -found.scale / (classes - 1)
    odds = math.log(classes - 1) + negative - float(found.logit_N[0])
    return 1 / (1 + math.exp(min(odds, 700)))


def warnings(margin: Margin, classes: int, embedding_dim: int) -> list[str]:
    """Return a sentence for every bound that a margin breaks.

    Args:
        margin: Of a run.
        classes: In one softmax: the sampled ones of all ranks.
        embedding_dim: D.
    """
    found: list[str] = []
    if classes < 2:
        return found
    state = {name: torch.tensor(value) for name, value in margin.new_state(classes).items()}
    unit = margin.unit_embeddings and margin.unit_centers
    one_softmax = unit and not margin.binary
    fixed_scale = one_softmax and margin.gain(torch.ones(1), state) is None
    needed = smallest_scale(classes, WANTED_POSTERIOR)
    if fixed_scale and margin.scale < needed:
        reached = 1 / (1 + (classes - 1) * math.exp(-margin.scale * classes / (classes - 1)))
        found.append(
            f"head.margin.scale = {margin.scale:g}: with {classes:,} classes in the softmax a "
            f"perfect sample reaches a posterior of {reached:.2g} only; {WANTED_POSTERIOR:g} needs "
            f"a scale of {needed:.1f} (CosFace, section 3.3)."
        )
    name = "margin" if getattr(margin, "base", "") == "cosface" else "additive"
    additive, bound = getattr(margin, name, 0.0), largest_additive(classes, embedding_dim)
    if additive > bound:
        found.append(
            f"head.margin.{name} = {additive:g}: {classes:,} class centers in {embedding_dim} "
            f"dimensions cannot be further apart than {bound:.3g} (CosFace, section 3.4)."
        )
    return found


def pair_warnings(losses: Iterable[str], images_per_identity: int | None) -> list[str]:
    """Return a sentence for every loss whose pairs of one identity batches hardly have.

    Args:
        losses: Names of those with a weight that compare pairs of one identity.
        images_per_identity: K of the batches; ``None`` where they are drawn image by image.
    """
    if images_per_identity is not None and images_per_identity > 1:
        return []
    return [
        f"losses.{name}.weight: a batch hardly has two images of one identity, so this loss sees "
        "few pairs or none; set data.images_per_identity, e.g. to 4."
        for name in losses
    ]
