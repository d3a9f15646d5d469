"""Settings of low-rank adapters."""

from typing import Annotated

from pydantic import Field, model_validator

from partialfc.config.schema import OneOrMore, Section
from partialfc.definitions import Range
from partialfc.definitions.phrases import to_value


class Lora(Section):
    """Low-rank adapters on linear layers (LoRA, https://arxiv.org/abs/2106.09685): they and the
    head are trained, and the backbone of ``run.start_from`` stays as it is. Checkpoints hold the
    adapters, and which weights they belong to; verification, export and all other use merge
    them."""

    rank: Annotated[int, Range(ge=0, le=4096)] = 0
    """Rank of each adapter, below both sides of its layer; 4 to 64 are usual. 0 is none."""

    alpha: Annotated[float | None, Range(gt=0, le=1e6)] = None
    """What an adapter adds is multiplied by alpha / rank. Left out, that is 1."""

    targets: Annotated[tuple[str, ...], OneOrMore] = Field(
        default=("attn.*", "mlp.*"), strict=False
    )
    """The linear layers, as patterns for the end of a name or all of it: ``"attn.qkv"``,
    ``"blocks.1?.*"``."""

    also_train: Annotated[tuple[str, ...], OneOrMore] = Field(default=(), strict=False)
    """What is trained in full beside the adapters, by the names of modules or parameters as a
    checkpoint has them: ``"feature"`` is the embedding layer of a ViT, ``"norm"`` its last norm."""

    @property
    def factor(self) -> float:
        """Of what an adapter adds."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @model_validator(mode="after")
    def _is_used(self) -> "Lora":
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if not self.rank and value != field.default:
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"{name} = {to_value(shown)}: has no effect, as rank = 0 is no adapters. Set "
                    f"backbone.lora.rank, or remove {name}."
                )
        return self
