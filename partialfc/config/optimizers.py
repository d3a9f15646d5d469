"""Settings of the optimizers of backbone and class centers, and of the schedule of their rate."""

from typing import Annotated, Literal

from pydantic import Field

from partialfc.config.schema import Section, Unit

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """What every optimizer has."""

    name: str
    """Which optimizer."""


class Sgd(Optimizer):
    """SGD with momentum."""

    name: Literal["sgd"] = "sgd"
    """Which optimizer."""

    momentum: Decay = 0.9
    """Share of the last update that is kept in the next. 0 is plain SGD."""

    weight_decay: Fraction = 5e-4
    """Factor of the weights that is added to their gradient."""


class AdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""

    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), strict=False)
    """Decay of the running mean of the gradient, and of its square."""

    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the denominator, so that a tiny gradient makes no huge update."""

    weight_decay: Fraction = 0.1
    """Share of the weights, times the learning rate, that is subtracted from them."""


class _OfCenters(Optimizer):
    lr_factor: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Learning rate of the class centers as a multiple of the backbone's, at every step. SGD wants
    about 100 times the rate of AdamW."""


class SgdOfCenters(Sgd, _OfCenters):
    """SGD with momentum on the sampled class centers."""

    momentum_format: Literal["fp32", "bf16", "int8"] = "fp32"
    """How the momentum is stored: 4, 2 or 1 bytes an element, the fewer with stochastic
    rounding."""

    unsampled: Literal["move", "stay"] = "move"
    """What a center does at a step that does not sample it. ``move``: it decays and moves by its
    momentum, as with SGD on all centers and in arcface_torch, computed when it is sampled next.
    ``stay``: nothing, which takes the head less time. At a sample rate of 1 both are one."""


class AdamWOfCenters(AdamW, _OfCenters):
    """AdamW on the sampled class centers; the others stay as they are."""


class AdagradOfCenters(_OfCenters):
    """Row-wise Adagrad on the sampled class centers: one number of state a center."""

    name: Literal["adagrad"] = "adagrad"
    """Which optimizer."""

    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the denominator, so that a tiny gradient makes no huge update."""

    weight_decay: Fraction = 0.0
    """Factor of the centers that is added to their gradient."""


class _OfBackbone(Optimizer):
    lr: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Learning rate at the end of warm-up, the highest of the run, for the whole global batch."""

    clip_norm: Annotated[float, Field(ge=0)] = 5.0
    """Largest norm of the backbone's gradient; a longer one is scaled down. 0 turns clipping
    off."""

    accumulation: Annotated[int, Field(ge=1), Unit("micro-batches")] = 1
    """Parts that each rank's share of the global batch is cut into, to save memory. The update is
    that of the undivided batch, up to BatchNorm."""


class SgdOfBackbone(Sgd, _OfBackbone):
    """SGD with momentum on the backbone."""


class AdamWOfBackbone(AdamW, _OfBackbone):
    """AdamW on the backbone."""

    lr: Annotated[float, Field(gt=0, le=100)] = 1e-3
    """Learning rate at the end of warm-up, the highest of the run, for the whole global batch."""


class Schedule(Section):
    """The learning rate over the steps; see :mod:`partialfc.training.schedule`."""

    name: str
    """How the learning rate falls from ``optimizer.lr`` after warm-up."""

    warmup_steps: Annotated[int, Field(ge=0), Unit("steps")] = 0
    """Steps of linear warm-up, from lr / warmup_steps at the first step to lr. 0 is none; must be
    fewer than the steps of the run."""

    final_factor: Fraction = 0.0
    """Learning rate at the end of the run as a fraction of ``optimizer.lr``. 1 keeps it constant
    after warm-up."""


class Linear(Schedule):
    """Falls in a straight line."""

    name: Literal["linear"] = "linear"
    """How the learning rate falls."""


class Polynomial(Schedule):
    """Falls as (1 - progress) ** power."""

    name: Literal["polynomial"] = "polynomial"
    """How the learning rate falls."""

    power: Annotated[float, Field(gt=0, le=10)] = 2.0
    """1 is a straight line; more falls faster at first and slower at the end."""


class Cosine(Schedule):
    """Falls as half a period of a cosine."""

    name: Literal["cosine"] = "cosine"
    """How the learning rate falls."""
