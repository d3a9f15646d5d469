"""Settings of the class centers and the softmax over them."""

from typing import Annotated, Literal

from pydantic import Field

from partialfc.config.margins import SECTIONS, AnyMargin
from partialfc.config.optimizers import AnyOfCenters, SgdOfCenters
from partialfc.config.schema import Section, UserPath
from partialfc.definitions import Range, Unit


class Head(Section):
    """The class centers, one per identity, and the softmax over them."""

    sample_rate: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Fraction of the class centers used per step, the batch's own included. 1 uses all."""

    canonical_shards: Annotated[int | None, Range(ge=1)] = None
    """Units that negatives are sampled from and centers are moved in; at least the largest number
    of ranks that the run will ever have. Left out, it follows from the number of identities and is
    at least four times the ranks of the first start; a run that goes on keeps it."""

    compute: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Format of the head's matrix products. ``auto`` is bf16 where ``precision.compute`` is,
    otherwise fp32, or tf32 on a GPU with ``precision.tf32``."""

    center_format: Literal["fp32", "bf16", "fp16"] = "fp32"
    """How class centers are stored. ``fp16`` has a scale per center and is the better one of 16
    bits; both are rounded stochastically."""

    keep_mib: Annotated[int | None, Range(ge=0), Unit("MiB")] = None
    """Most memory per rank that spares the second pass of the head a matrix product. The result is
    the same, for logits above 64 or with fused to rounding. Left out: 256 on a CPU, 2048 on a
    GPU."""

    centers_in: Literal["device", "host"] = "device"
    """Where class centers lie between steps. ``host`` is the machine's memory, from which a step's
    rows travel to the device and back: for more identities than the device has room for. Changes no
    result."""

    states_in: Literal["device", "host"] = "device"
    """Where the optimizer's states of the centers lie, as ``centers_in``. Changes no result."""

    host_folder: UserPath | None = None
    """Where what is in ``host`` is mapped from files, which vanish with the process, for more than
    the memory holds: a folder on a fast local disk. Left out, it is in memory."""

    fused: bool = False
    """Do each pass of the head in one kernel: on Hopper, in bf16, with SGD and a softmax over unit
    centers, one an identity. Changes the result by rounding alone."""

    overlap: bool = False
    """On a GPU, update the centers while the backbone's backward runs. Then a gradient of the
    backbone that is not finite stops the run after the centers have moved in memory; nothing of
    that step is saved."""

    margin: AnyMargin = Field(default_factory=SECTIONS["arcface"])
    optimizer: AnyOfCenters = Field(default_factory=SgdOfCenters)
