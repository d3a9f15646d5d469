"""Settings of the class centers and the softmax over them."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from partialfc.config.margins import SECTIONS, AnyMargin
from partialfc.config.optimizers import AnyOfCenters, SgdOfCenters
from partialfc.config.schema import Section, UserPath, absolute
from partialfc.definitions import Range, Unit
from partialfc.definitions.phrases import to_value
from partialfc.head.options import Nearest as NearestOptions
from partialfc.head.options import Negatives, NegativesName, SeveralLoss, Without

STARTS = ("random", "pack:mean")
"""What centers may begin with, beside files."""
_ENDINGS = (".npy", ".safetensors")


def _with_its_folder(value: Any) -> Any:
    """A file is named from the current folder on, as every path."""
    if isinstance(value, str) and value.endswith(_ENDINGS):
        return str(absolute(value))
    return value


class Several(Section):
    """What images of several identities, or of none, are to the softmax: those of data.labels."""

    loss: SeveralLoss = "mean"
    """mean: the mean of -log p over the identities of an image, each told from the negatives alone.
    any: -log of the sum of their p. soft: -sum of weight * log p, with data.label_weights."""

    without: Without = "push"
    """What an image of no identity does. push: the centers that it is near to are pushed off.
    leave_out: nothing."""


class Nearest(Section):
    """Negatives near to the batch's own class centers, with head.negatives = "nearest"."""

    neighbours: Annotated[int, Range(ge=1, le=1024)] = 16
    """How many each class center has in its list: the nearest ones by their angle."""

    every_steps: Annotated[int, Range(ge=1)] = 1000
    """Steps from one search to the next. A search compares all class centers with all others;
    ``partialfc estimate`` says what it takes."""

    share: Annotated[float, Range(gt=0, lt=1)] = 0.5
    """Most of the sampled negatives that are taken for being near. The others are drawn as ever and
    stand for all that are left."""


class Head(Section):
    """The class centers, one per identity, and the softmax over them."""

    start: Annotated[str, BeforeValidator(_with_its_folder)] = "random"
    """What the class centers of a new run begin with: random, a .npy or .safetensors file of
    directions [identities, embedding_dim] in any precision, or pack:mean, the mean embedding of
    each identity's images by the backbone that the run begins with. Lengths are those of random
    centers, and a center without a direction stays random."""

    sample_rate: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Fraction of the class centers used per step, the batch's own included. 1 uses all."""

    negatives: NegativesName = "uniform"
    """What a sampled negative counts for in the softmax. ``uniform``: itself, as Partial FC has it,
    so that the sum over all identities is taken for less than it is. ``weighted``: all those that
    it was drawn among, so that the sum is right in the mean. ``nearest``: as ``weighted``, and the
    class centers nearest to the batch's own are in every sample, each for itself. With a sample
    rate of 1, where all three are one, ``uniform`` alone."""

    canonical_shards: Annotated[int | None, Range(ge=1)] = None
    """Units that negatives are sampled from and centers are moved in; at least the largest number
    of ranks that the run will ever have. Left out, it follows from the number of identities and is
    at least four times the ranks of the first start; a run that goes on keeps it."""

    ranks_per_copy: Annotated[int | None, Range(ge=1)] = None
    """Ranks that hold the class centers together, neighbours of each other: those of a node, say.
    With more ranks there are several copies of the centers, each trained on the images of its own
    ranks, and gradients of centers are summed over copies in every step: the result is that of one
    copy to rounding. Embeddings then travel among these ranks alone, and gradients of all sampled
    centers between copies: it pays for small samples on a thousand ranks and more, which
    ``partialfc estimate`` compares. Left out, or not fewer than there are: all ranks hold them. It
    may change when a run goes on."""

    compute: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Format of the head's matrix products. ``auto`` is bf16 where ``precision.compute`` is,
    otherwise fp32, or tf32 on a GPU with ``precision.tf32``."""

    center_format: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """How class centers are stored. ``fp16`` has a scale per center and is the better one of 16
    bits; ``fp8`` (e4m3) takes half of that and is coarse. All three are rounded stochastically."""

    reduce_format: Literal["fp32", "bf16"] = "fp32"
    """Format of the embeddings' gradients on the way to the rank of each, where they are summed
    over ranks. ``bf16`` halves these bytes and rounds: the gradient then has a relative error of
    0.17 % times the root of the number of ranks. One rank sends nothing."""

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
    """Do each pass of the head in one kernel: from Ampere on, in bf16, with SGD and a softmax over
    unit centers, one an identity. Changes the result by rounding alone."""

    overlap: bool | None = None
    """On a GPU, update the centers while the backbone's backward runs. Left out: wherever it
    changes no result, which is everywhere but with fp16 and with ranks_per_copy. A gradient of the
    backbone, or a loss beside the softmax, that is not finite then stops the run after the centers
    have moved in memory; nothing of that step is saved."""

    nearest: Nearest = Field(default_factory=Nearest)
    several: Several = Field(default_factory=Several)
    margin: AnyMargin = Field(default_factory=SECTIONS["arcface"])
    optimizer: AnyOfCenters = Field(default_factory=SgdOfCenters)

    @model_validator(mode="after")
    def _begins_with_something(self) -> "Head":
        if self.start not in STARTS and self.start_file is None:
            near = difflib.get_close_matches(self.start, STARTS, n=1)
            meant = f" Did you mean {to_value(near[0])}?" if near else ""
            raise ValueError(
                f'start = {to_value(self.start)}: must be "random", "pack:mean", or a file ending '
                f"in .npy or .safetensors.{meant}"
            )
        return self

    @property
    def weighted_rate(self) -> float | None:
        """The sample rate where negatives are weighted; ``None`` where each counts once."""
        return None if self.negatives == "uniform" else self.sample_rate

    @property
    def negatives_of(self) -> Negatives:
        """The negatives as the head takes them, with their options."""
        near = self.negatives == "nearest"
        return NearestOptions(**self.nearest.model_dump()) if near else self.negatives

    @property
    def start_file(self) -> Path | None:
        """The file of ``start``, if it is one."""
        return Path(self.start) if self.start.endswith(_ENDINGS) else None
