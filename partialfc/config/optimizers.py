"""Settings of the optimizers of backbone and class centers, and of the schedule of their rate."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from partialfc.config.defined import Defined, section_of
from partialfc.config.schema import Section
from partialfc.definitions import Range, Unit
from partialfc.definitions import optimizers as definitions
from partialfc.definitions.optimizers import Fraction


def _dotted(value: object) -> object:
    """``blocks.0 = 0.5`` in TOML is a table in a table, and means the module blocks.0."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            deeper = _dotted(inner)
            assert isinstance(deeper, Mapping)
            flat |= {f"{key}.{name}": entry for name, entry in deeper.items()}
        else:
            flat[str(key)] = inner
    return flat


Rates = Annotated[dict[str, Annotated[float, Range(gt=0, le=1000)]], BeforeValidator(_dotted)]


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

    clip_groups: bool = False
    """Hold each group of weights, those of one rate and one weight decay, to ``clip_norm`` by
    itself. Without it, all together."""

    decay: Literal["all", "matrices"] = "all"
    """Which weights decay. ``all``: every one, as arcface_torch has it. ``matrices``: those of
    linear layers and convolutions, and not biases, norms, tokens and positions."""

    layer_decay: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Learning rate of a layer as a multiple of the next one's; the last has ``lr``. For
    fine-tuning; 0.65 to 0.9 is usual. A block is a layer, and so is all before the first one."""

    rates: Rates = Field(default={})
    """Multiples of the learning rate for parts of the backbone, by the names of their modules:
    ``rates = {patch_embed = 0.1}``. The longest name that fits counts."""

    accumulation: Annotated[int, Range(ge=1), Unit("micro-batches")] = 1
    """Parts that each rank's share of the global batch is cut into, to save memory. The update is
    that of the undivided batch, up to BatchNorm."""


class _AtALowRate(OfBackbone):
    lr: Annotated[float, Range(gt=0, le=100)] = 1e-3
    """Learning rate at the end of warm-up, the highest of the run, for the whole global batch."""


class _AtATinyRate(OfBackbone):
    lr: Annotated[float, Range(gt=0, le=100)] = 1e-4
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
LionOfBackbone: Any = section_of(
    definitions.Lion, _AtATinyRate, name="lion", about="Lion on the backbone."
)
LambOfBackbone: Any = section_of(definitions.Lamb, _AtALowRate, name="lamb")
MuonOfBackbone: Any = section_of(definitions.Muon, _AtALowRate, name="muon")
ScheduleFreeOfBackbone: Any = section_of(
    definitions.ScheduleFree, _AtALowRate, name="schedule_free"
)

if TYPE_CHECKING:
    AnyOfCenters = OfCenters
    AnyOfBackbone = OfBackbone
else:
    AnyOfCenters = Annotated[
        SgdOfCenters | AdamWOfCenters | AdagradOfCenters, Field(discriminator="name")
    ]
    AnyOfBackbone = Annotated[
        SgdOfBackbone
        | AdamWOfBackbone
        | LionOfBackbone
        | LambOfBackbone
        | MuonOfBackbone
        | ScheduleFreeOfBackbone,
        Field(discriminator="name"),
    ]


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


class Wsd(Schedule):
    """Warm-up, a stable rate, then a decay (https://arxiv.org/abs/2404.06395): a run can go on from
    before its decay, longer or with other data."""

    name: Literal["wsd"] = "wsd"
    """How the learning rate falls."""

    decay_steps: Annotated[int, Range(ge=1), Unit("steps")] = 1000
    """Steps of the decay, which ends with the run; they must fit between the warm-up and the
    end."""

    shape: Literal["sqrt", "linear", "cosine"] = "sqrt"
    """How the rate falls, t being the share of the decay that is done: 1 - sqrt(t), 1 - t or
    (1 + cos(pi t)) / 2."""
