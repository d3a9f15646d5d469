"""What an optimizer takes; those of rows are computed in :mod:`partialfc.head.rows.rules`."""

from typing import Annotated, Literal

from partialfc.definitions import Definition, Range

Fraction = Annotated[float, Range(ge=0, le=1)]
Decay = Annotated[float, Range(ge=0, lt=1)]
Eps = Annotated[float, Range(gt=0, le=1)]


class Sgd(Definition):
    """SGD with momentum."""

    momentum: Decay = 0.9
    """Share of the last update that is kept in the next. 0 is plain SGD."""

    weight_decay: Fraction = 5e-4
    """Factor of the weights that is added to their gradient."""


class AdamW(Definition):
    """AdamW (https://arxiv.org/abs/1711.05101)."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running mean of the gradient, and of its square."""

    eps: Eps = 1e-8
    """Added to the denominator, so that a tiny gradient makes no huge update."""

    weight_decay: Fraction = 0.1
    """Share of the weights, times the learning rate, that is subtracted from them."""


class Lion(Definition):
    """Lion (https://arxiv.org/abs/2302.06675): the sign of a mean of gradients."""

    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Share of the mean in the update, and of the last mean in the next."""

    weight_decay: Fraction = 1.0
    """Share of the weights, times the learning rate, that is subtracted from them. Lion wants about
    ten times that of AdamW, at a tenth of its rate."""


class Lamb(AdamW):
    """LAMB (https://arxiv.org/abs/1904.00962): AdamW, and each tensor moves in proportion to its
    own norm. Weights that do not decay move as in AdamW."""

    eps: Eps = 1e-6
    """Added to the denominator, so that a tiny gradient makes no huge update."""

    weight_decay: Fraction = 0.01
    """Factor of the weights that is added to their update."""


class Muon(AdamW):
    """Muon (https://arxiv.org/abs/2502.16982): the momentum of a matrix, made orthogonal. Other
    weights, those of convolutions among them, are trained by AdamW at the same rate."""

    momentum: Decay = 0.95
    """Share of the last momentum of a matrix that is kept in the next."""


class ScheduleFree(AdamW):
    """Schedule-free AdamW (https://arxiv.org/abs/2405.15682): no schedule after the warm-up. A mean
    of the weights is what is verified, saved and exported."""

    betas: tuple[Annotated[float, Range(gt=0, lt=1)], Decay] = (0.9, 0.999)
    """Share of the mean in the weights that a gradient is taken at, and decay of the running mean
    of the squared gradient."""


class SgdOfRows(Sgd):
    """SGD with momentum on the sampled class centers."""

    momentum_format: Literal["fp32", "bf16", "int8"] = "fp32"
    """How the momentum is stored: 4, 2 or 1 bytes an element, the fewer with stochastic
    rounding."""

    unsampled: Literal["move", "stay"] = "move"
    """What a center does at a step that does not sample it. ``move``: it decays and moves by its
    momentum, as with SGD on all centers and in arcface_torch, computed when it is sampled next.
    ``stay``: nothing, which takes the head less time. At a sample rate of 1 both are one."""


class AdamWOfRows(AdamW):
    """AdamW on the sampled class centers; the others stay as they are."""


class AdagradOfRows(Definition):
    """Row-wise Adagrad on the sampled class centers: one number of state a center."""

    eps: Eps = 1e-8
    """Added to the denominator, so that a tiny gradient makes no huge update."""

    weight_decay: Fraction = 0.0
    """Factor of the centers that is added to their gradient."""
