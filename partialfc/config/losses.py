"""Settings of the losses beside the softmax; what they compute is in :mod:`partialfc.losses` and
:mod:`partialfc.head.center_losses`."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from partialfc.config.defined import Defined, section_of
from partialfc.config.schema import Section
from partialfc.definitions import Definition, Range
from partialfc.definitions import losses as definitions


class Loss(Defined):
    """What every loss has."""

    weight: Annotated[float, Range(ge=0, le=1e6)] = 0.0
    """Factor of this loss in the sum. 0 leaves it out."""

    @model_validator(mode="after")
    def _is_used(self) -> "Loss":
        for name, field in type(self).model_fields.items():
            value: Any = getattr(self, name)
            if not self.weight and value != field.default:
                raise ValueError(
                    f"{name} = {value!r}: has no effect, as weight = 0 leaves this loss out. Set "
                    f"the weight, or remove {name}."
                )
        return self


class OwnLoss(Loss):
    """What a loss of a plug-in has."""

    name: str
    """Which loss: "my.module:Name". Left out, the name of its section."""


class Center(Loss):
    """1 - cos(theta) between an embedding and its own class center."""

    definition = Definition


class InterClass(Loss):
    """Cosine of a class center of the batch and the nearest other sampled one."""

    definition = Definition


if TYPE_CHECKING:
    Triplet = Loss
    Contrastive = Loss
    Uniformity = Loss
else:
    Triplet = section_of(definitions.Triplet, Loss)
    Contrastive = section_of(definitions.Contrastive, Loss)
    Uniformity = section_of(definitions.Uniformity, Loss)


class Losses(Section):
    """Losses added to that of the head. Triplet and contrastive loss need identities that repeat in
    a batch."""

    triplet: Triplet = Field(default_factory=Triplet)
    contrastive: Contrastive = Field(default_factory=Contrastive)
    uniformity: Uniformity = Field(default_factory=Uniformity)
    center: Center = Field(default_factory=Center)
    inter_class: InterClass = Field(default_factory=InterClass)
