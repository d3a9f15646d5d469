"""The options of a head in groups, under the names that they have in a settings file.

They check themselves, and :func:`check_fit` what does not go together, without torch: settings are
refused by the same code before a machine is booked.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, get_args

Compute = Literal["fp32", "tf32", "bf16"]
CenterFormat = Literal["fp32", "bf16", "fp16", "fp8"]
ReduceFormat = Literal["fp32", "bf16"]
Where = Literal["device", "host"]
SeveralLoss = Literal["mean", "any", "soft"]
Without = Literal["push", "leave_out"]
NegativesName = Literal["uniform", "weighted", "nearest"]

_KEEP_MIB = {"cpu": 256, "cuda": 2048}
"""Default of ``keep_mib`` by the type of the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Number formats.

    Attributes:
        compute: Of the matrix products. ``"bf16"`` gathers embeddings in bf16 too; ``"tf32"`` is
            for GPUs, with fp32 operands in memory. The positive's cosine, the softmax and all sums
            of a rank are fp32 in every case.
        center_format: Of the stored centers; ``"fp16"`` and ``"fp8"`` have a scale a row in the
            optimizer's state. See :mod:`partialfc.head.rows.formats`.
        reduce_format: Of the embeddings' gradients on the way to the rank of each, where they are
            summed over ranks. ``"bf16"`` halves these bytes and rounds each rank's part, and the
            sum at each of W - 1 hops, by 2**-9 at most.

    Raises:
        ValueError: If a value is none of these.
    """

    compute: Compute = "fp32"
    center_format: CenterFormat = "fp32"
    reduce_format: ReduceFormat = "fp32"

    def __post_init__(self) -> None:
        for name, kind in (
            ("compute", Compute),
            ("center_format", CenterFormat),
            ("reduce_format", ReduceFormat),
        ):
            if getattr(self, name) not in get_args(kind):
                names = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a head may keep in memory, and where the rows of a rank lie between steps.

    Attributes:
        keep_mib: Most MiB of the exponentials that spare pass 2 a matrix product; the result does
            not depend on it, but for rounding with fused kernels or logits above 64. ``None``: 256
            on a CPU, 2048 on a GPU.
        centers_in: Where the class centers lie: on the device, or in host memory, from which a
            step's rows travel to the device and back.
        states_in: Where the optimizer's states of them lie.
        host_folder: Where what is in host memory is mapped from files, which vanish with the
            process (Linux); ``None`` for memory, pinned where there is a GPU.

    Raises:
        ValueError: If a value is outside its range, or a folder is given and nothing is in host
            memory.
    """

    keep_mib: float | None = None
    centers_in: Where = "device"
    states_in: Where = "device"
    host_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.keep_mib is not None and not 0 <= self.keep_mib < math.inf:
            raise ValueError(f"keep_mib must be >= 0 and finite, got {self.keep_mib}.")
        for name in ("centers_in", "states_in"):
            if getattr(self, name) not in get_args(Where):
                raise ValueError(f"{name} must be device or host, got {getattr(self, name)!r}.")
        if self.host_folder is not None and not self.uses_host:
            raise ValueError(
                f'host_folder = "{self.host_folder}": nothing lies in host memory. Set centers_in '
                'or states_in to "host", or remove it.'
            )

    @property
    def uses_host(self) -> bool:
        """Whether any rows lie in host memory between steps."""
        return "host" in (self.centers_in, self.states_in)

    def keep_bytes(self, device: str) -> int:
        """Return the bytes of ``keep_mib`` on a type of device."""
        mib = _KEEP_MIB[device] if self.keep_mib is None else self.keep_mib
        return int(mib * (1 << 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What a GPU does faster at a price.

    Attributes:
        fused: Do each pass in one kernel, whose logits and gradients stay on the chip; the result
            is the same to rounding. In bf16, from Ampere on, with SGD and a softmax over unit
            centers.
        overlap: On a GPU, update the centers beside the backbone's backward, to the same bits.
            Between backward and ``optimizer.step()`` nobody may read or change the tensor
            ``head.centers``; what the head itself does with it there is waited for, and so is a
            loss scale or a verdict (``found_inf``) on that backward.
    """

    fused: bool = False
    overlap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """Negatives near to the batch's own centers, beside those that are drawn.

    Attributes:
        neighbours: Length of the list of each center, in [1, 1024]; 14 bytes of host memory each.
        every_steps: Optimizer steps from one search of all lists to the next, >= 1.
        share: Most of the negatives of a canonical shard that are taken for being near, in (0, 1).
            The others are drawn as ever, and stand for all that are left.

    Raises:
        ValueError: If a value is outside its range.
    """

    neighbours: int = 16
    every_steps: int = 1000
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.neighbours <= 1024:
            raise ValueError(f"neighbours must be in [1, 1024], got {self.neighbours}.")
        if self.every_steps < 1:
            raise ValueError(f"every_steps must be >= 1, got {self.every_steps}.")
        if not 0 < self.share < 1:
            raise ValueError(f"share must be in (0, 1), got {self.share}.")


Negatives = NegativesName | Nearest
"""By name, or with options of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Several:
    """What rows of several identities, or of none, are to the loss.

    With the softmax over the negatives of a row and all of its own identities, p is:

    Attributes:
        most: K, the most identities of a row; others are filled up with -1. Every batch of the run
            is gathered with so many. >= 1.
        loss: ``"mean"``: the mean of -log p over the row's identities, where p of each is that
            among the negatives and itself: the row's others are left out. ``"any"``: -log of the
            sum of their p. ``"soft"``: -sum of weight * log p, with the weights of the batch.
        without: What a row of no identity does. ``"push"``: the centers that it is near to and it
            push each other off, as if it had a positive at 90 degrees that nothing moves.
            ``"leave_out"``: nothing, and the mean over rows is that over the others.

    Raises:
        ValueError: If a value is outside its range.
    """

    most: int = 1
    loss: SeveralLoss = "mean"
    without: Without = "push"

    def __post_init__(self) -> None:
        if isinstance(self.most, bool) or not isinstance(self.most, int) or self.most < 1:
            raise ValueError(f"most must be an integer >= 1, got {self.most!r}.")
        for name, kind in (("loss", SeveralLoss), ("without", Without)):
            if getattr(self, name) not in get_args(kind):
                names = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """Sets of identities that were numbered apart, so that two of them may have the same person.

    A row is told from the negatives of its own sets, those of its identities, and not from the
    negatives of a set that may have the same people: one of them may be the person of the row.

    Attributes:
        sizes: Identities of each set, which follow one another; >= 0 each, ``num_identities``
            together.
        may_share: Pairs of numbers of sets that may have the same people; ``None`` for all pairs.

    Raises:
        ValueError: If a value is outside its range.
    """

    sizes: tuple[int, ...]
    may_share: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if not self.sizes or any(type(size) is not int or size < 0 for size in self.sizes):
            raise ValueError(f"sizes must be one integer >= 0 for each set, got {self.sizes!r}.")
        last = len(self.sizes) - 1
        for pair in self.may_share or ():
            known = [number for number in pair if type(number) is int and 0 <= number <= last]
            if len(pair) != 2 or len(set(known)) != 2:
                raise ValueError(
                    f"may_share must be pairs of two different sets, numbered from 0 to {last}, "
                    f"got {pair!r}."
                )

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The pairs of sets that may have the same people."""
        every = tuple(combinations(range(len(self.sizes)), 2))
        return every if self.may_share is None else self.may_share


def check_fit(
    precision: Precision,
    memory: Memory,
    kernels: Kernels,
    *,
    sample_rate: float,
    unit_centers: bool,
    margin: str,
    device: str | None = None,
) -> None:
    """Refuse options that do not go together.

    Args:
        precision: Number formats.
        memory: Where rows lie.
        kernels: What is asked of a GPU; :func:`partialfc.head.plan.decide` knows of ``fused``.
        sample_rate: Fraction of the centers used per step.
        unit_centers: Whether the margin takes class centers as unit vectors.
        margin: Its name, for messages.
        device: Type of the device; ``None`` if it is not known yet.

    Raises:
        ValueError: With the name of the option first.
    """
    if precision.center_format in ("fp16", "fp8") and not unit_centers:
        raise ValueError(
            f'center_format = "{precision.center_format}": it keeps the direction of a center, and '
            f"{margin} looks at its length. Use fp32 or bf16."
        )
    if memory.uses_host and sample_rate == 1:
        raise ValueError(
            f"sample_rate = {sample_rate}: with rows in host memory every step would bring all of "
            "them to the device. Keep them on the device, or sample fewer."
        )
    if device in (None, "cuda"):
        return
    if precision.compute == "tf32":
        raise ValueError(
            f'compute = "tf32": it needs a GPU, and the head is on {device}. Use fp32 or bf16.'
        )
    if kernels.overlap:
        raise ValueError(f"overlap = true: it needs a GPU, and the head is on {device}. Remove it.")


def check_inter_class(
    weight: float, *, unit_centers: bool, margin: str, name: str = "inter_class_weight"
) -> None:
    """Refuse the inter-class loss where centers keep their lengths.

    Args:
        weight: Of that loss.
        unit_centers: As in :func:`check_fit`.
        margin: Its name, for messages.
        name: Of the weight, for messages.

    Raises:
        ValueError: If it has a weight there.
    """
    if weight and not unit_centers:
        raise ValueError(
            f"{name} = {weight}: it turns unit centers, and {margin} keeps their lengths. Set it "
            "to 0, or use another margin."
        )
