"""Settings of the losses beside the softmax; what they compute is in :mod:`partialfc.losses` and
:mod:`partialfc.head.center_losses`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from partialfc.config.defined import Defined, section_of
from partialfc.config.schema import OneOrMore, Section, UserPath
from partialfc.definitions import Definition, Range
from partialfc.definitions import losses as definitions
from partialfc.definitions.phrases import to_value


class Loss(Defined):
    """What every loss has."""

    weight: Annotated[float, Range(ge=0, le=1e6)] = 0.0
    """Factor of this loss in the sum. 0 leaves it out."""

    @model_validator(mode="after")
    def _is_used(self) -> "Loss":
        for name, field in type(self).model_fields.items():
            value: Any = getattr(self, name)
            if not self.weight and value != field.default:
                shown = repr(value) if isinstance(value, str) else to_value(value)
                raise ValueError(
                    f"{name} = {shown}: has no effect, as weight = 0 leaves this loss out. Set "
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


class _Teaching(Loss):
    """What a teacher is, beside how it is followed."""

    final_factor: Annotated[float, Range(ge=0, le=1000)] = 1.0
    """The weight goes in a straight line from ``weight`` at the first step to this factor of it at
    the last. 1 keeps it, 0 lets go of the teacher."""

    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast format of a teacher that is a backbone; ``auto`` is ``precision.compute``."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where the teacher is: the setting ``from``."""
        found: tuple[Path, ...] = getattr(self, "from")
        return found

    @model_validator(mode="after")
    def _has_a_teacher(self) -> "_Teaching":
        found = self.paths
        if self.weight and not found:
            raise ValueError(
                f"weight = {self.weight} without losses.teacher.from: there is no teacher. Name "
                "a run's folder, a file of weights, an .onnx or .npy files of embeddings."
            )
        endings = {path.suffix for path in found}
        if len(found) > 1 and endings != {".npy"}:
            raise ValueError(
                f"from = {to_value(found)}: there is one teacher; several are .npy files alone, "
                "one for each pack of data.train."
            )
        if self.compute != "auto" and endings & {".npy", ".onnx"}:
            raise ValueError(
                f'compute = "{self.compute}": has no effect on {to_value(found[0])}, which has a '
                "precision of its own. Remove it."
            )
        return self


_FROM = (
    "The teacher: a run's folder, a checkpoint or a file of weights; an .onnx; or, for each pack "
    "of data.train in turn, an .npy of the embeddings that partialfc embed made of it."
)


if TYPE_CHECKING:
    Teacher = _Teaching
    Triplet = Loss
    Contrastive = Loss
    Uniformity = Loss
else:
    Teacher = create_model(
        "Teacher",
        __base__=section_of(definitions.Distillation, _Teaching),
        __doc__=definitions.Distillation.__doc__,
        __cls_kwargs__={"use_attribute_docstrings": False},  # it has no source to look at
        # A word of Python's own, so no class body can have it.
        **{
            "from": (
                Annotated[tuple[UserPath, ...], OneOrMore],
                Field(default=(), strict=False, description=_FROM),
            )
        },
    )
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
    teacher: Teacher = Field(default_factory=Teacher)
