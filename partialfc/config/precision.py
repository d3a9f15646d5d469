"""Settings of the number formats of the backbone."""

from typing import Annotated, Literal

from pydantic import Field

from partialfc.config.schema import Section
from partialfc.definitions import Range


class Precision(Section):
    """Number formats of the backbone; ``head.compute`` has those of the head. Sums, the softmax and
    the backbone's weights are fp32 in every case."""

    compute: str
    """Autocast format of the backbone: bf16, fp32 or fp16."""

    tf32: bool = False
    """Let the remaining fp32 matrix products on a GPU run in TF32: faster, 10-bit mantissa."""


class Bf16(Precision):
    """bf16 needs no loss scale. Needs Ampere or newer to be fast."""

    compute: Literal["bf16"] = "bf16"
    """Autocast format of the backbone."""


class Fp32(Precision):
    """fp32 throughout, without autocast."""

    compute: Literal["fp32"] = "fp32"
    """Autocast format of the backbone."""


class Fp16(Precision):
    """fp16 with a dynamic loss scale, as arcface_torch trains."""

    compute: Literal["fp16"] = "fp16"
    """Autocast format of the backbone."""

    initial_loss_scale: Annotated[float, Range(gt=0, le=2.0**32)] = 65536.0
    """Loss scale of the first step. It halves after an overflow, whose step is skipped, and
    doubles after a long run without one."""


AnyPrecision = Annotated[Bf16 | Fp32 | Fp16, Field(discriminator="compute")]
