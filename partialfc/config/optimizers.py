"""Settings of the optimizers of backbone and class centers, and of the schedule of their rate."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from partialfc.config.defined import Defined, section_of
from partialfc.config.schema import Section
from partialfc.definitions import Range, Unit
from partialfc.definitions import optimizers as definitions
from partialfc.definitions.optimizers import Fraction


class Optimizer(Defined):
    """What every optimizer has."""

    name: str
    """Which optimizer."""


class OfCenters(Optimizer):
    """What every optimizer of class centers has."""

    lr_factor: Annotated[float, Range(gt=0, le=1000)] = 1.0
    """Learning rate of the class centers as a multiple of the backbone's, at every step. SGD wants
    about 100 times the rate of AdamW."""


class OfBackbone(Optimizer):
    """What every optimizer of the backbone has."""

    lr: Annotated[float, Range(gt=0, le=100)] = 0.1
    """Learning rate at the end of warm-up, the highest of the run, for the whole global batch."""

    clip_norm: Annotated[float, Range(ge=0)] = 5.0
    """Largest norm of the backbone's gradient; a longer one is scaled down. 0 turns clipping
    off."""

    accumulation: Annotated[int, Range(ge=1), Unit("micro-batches")] = 1
    """Parts that each rank's share of the global batch is cut into, to save memory. The update is
    that of the undivided batch, up to BatchNorm."""


class _AtALowRate(OfBackbone):
    lr: Annotated[float, Range(gt=0, le=100)] = 1e-3
    """Learning rate at the end of warm-up, the highest of the run, for the whole global batch."""


SgdOfCenters: Any = section_of(definitions.SgdOfRows, OfCenters, name="sgd")
AdamWOfCenters: Any = section_of(definitions.AdamWOfRows, OfCenters, name="adamw")
AdagradOfCenters: Any = section_of(definitions.AdagradOfRows, OfCenters, name="adagrad")
SgdOfBackbone: Any = section_of(
    definitions.Sgd, OfBackbone, name="sgd", about="SGD with momentum on the backbone."
)
AdamWOfBackbone: Any = section_of(
    definitions.AdamW, _AtALowRate, name="adamw", about="AdamW on the backbone."
)

if TYPE_CHECKING:
    AnyOfCenters = OfCenters
    AnyOfBackbone = OfBackbone
else:
    AnyOfCenters = Annotated[
        SgdOfCenters | AdamWOfCenters | AdagradOfCenters, Field(discriminator="name")
    ]
    AnyOfBackbone = Annotated[SgdOfBackbone | AdamWOfBackbone, Field(discriminator="name")]


class Schedule(Section):
    """The learning rate over the steps; see :mod:`partialfc.training.schedule`."""

    name: str
    """How the learning rate falls from ``optimizer.lr`` after warm-up."""

    warmup_steps: Annotated[int, Range(ge=0), Unit("steps")] = 0
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

    power: Annotated[float, Range(gt=0, le=10)] = 2.0
    """1 is a straight line; more falls faster at first and slower at the end."""


class Cosine(Schedule):
    """Falls as half a period of a cosine."""

    name: Literal["cosine"] = "cosine"
    """How the learning rate falls."""
