"""Settings of the losses beside the softmax; what they compute is in :mod:`partialfc.losses` and
:mod:`partialfc.head.center_losses`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from partialfc.config.schema import Section, Unit

Weight = Annotated[float, Field(ge=0, le=1e6)]


class Weighted(Section):
    """What every loss has."""

    weight: Weight = 0.0
    """Factor of this loss in the sum. 0 leaves it out."""

    @model_validator(mode="after")
    def _is_used(self) -> "Weighted":
        for name, field in type(self).model_fields.items():
            value: Any = getattr(self, name)
            if not self.weight and value != field.default:
                raise ValueError(
                    f"{name} = {value!r}: has no effect, as weight = 0 leaves this loss out. Set "
                    f"the weight, or remove {name}."
                )
        return self


class Triplet(Weighted):
    """max(0, d(a, p)² - d(a, n)² + margin) over triplets (https://arxiv.org/abs/1503.03832)."""

    margin: Annotated[float, Field(gt=0, lt=4), Unit("units of squared distance")] = 0.2
    """How much nearer the positive must be than the negative."""

    mining: Literal["semi_hard", "batch_hard"] = "semi_hard"
    """``semi_hard`` takes every positive with the nearest negative beyond it, ``batch_hard`` every
    image with its farthest positive and its nearest negative."""


class Contrastive(Weighted):
    """d²/2 of pairs of one identity, max(0, margin - d)²/2 of two (Hadsell et al., 2006)."""

    margin: Annotated[float, Field(gt=0, le=2), Unit("units of distance")] = 1.0
    """Distance beyond which two identities leave each other alone."""


class Uniformity(Weighted):
    """log mean exp(-sharpness d²) over pairs of two identities (https://arxiv.org/abs/2005.10242)."""

    sharpness: Annotated[float, Field(gt=0, le=20)] = 2.0
    """Large values see near pairs only."""


class Center(Weighted):
    """1 - cos(theta) between an embedding and its own class center."""


class InterClass(Weighted):
    """Cosine of a class center of the batch and the nearest other sampled one."""


class Losses(Section):
    """Losses added to that of the head. Triplet and contrastive loss need identities that repeat in
    a batch."""

    triplet: Triplet = Field(default_factory=Triplet)
    contrastive: Contrastive = Field(default_factory=Contrastive)
    uniformity: Uniformity = Field(default_factory=Uniformity)
    center: Center = Field(default_factory=Center)
    inter_class: InterClass = Field(default_factory=InterClass)
