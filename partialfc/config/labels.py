"""Settings of labels beside the images, of a run or of one of its sets."""

from typing import Annotated, Self

from pydantic import model_validator

from partialfc.config.schema import Section, UserPath
from partialfc.definitions import Range
from partialfc.definitions.phrases import to_value


class Labelled(Section):
    """What images may have that are trained on."""

    labels: UserPath | None = None
    """Whom each image shows, instead of what the packs say: an .npy of int32 or int64, a row for
    each image of all packs in turn, those to skip included. [N], or [N, K] of up to K each; -1 is
    none."""

    label_weights: UserPath | None = None
    """What each of ``labels`` counts for, with head.several.loss = "soft": an .npy of floats of the
    same shape, >= 0."""

    identities: Annotated[int | None, Range(ge=1)] = None
    """Number of identities of ``labels``. Left out, it is the largest label + 1."""

    @model_validator(mode="after")
    def _labels_are_there(self) -> Self:
        for key in ("label_weights", "identities"):
            if self.labels is None and getattr(self, key) is not None:
                raise ValueError(
                    f"{key} = {to_value(getattr(self, key))}: it is of labels, and there are none. "
                    f"Set labels beside it, or remove {key}."
                )
        return self
