"""Which code computes a head, and why: one decision for head, estimator and settings.

    torch    the steps of a tile in torch operations, on any device
    triton   the steps of a tile as Triton kernels
    fused    each of the two passes as one Triton kernel

Nothing here needs torch, so a login node can ask.
"""

from dataclasses import dataclass
from typing import Literal

from partialfc.head.tiles.cards import card_for
from partialfc.head.tiles.limits import LARGEST_DIM

Path = Literal["torch", "triton", "fused"]

_HOPPER = (9, 0)
"""Compute capability of a GPU that is not known yet."""
_FP8 = (8, 9)
"""Compute capability from which Triton reads and writes e4m3; torch does on any device."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a decision needs to know of the device; :func:`partialfc.head.machine.machine_of` asks.

    Attributes:
        device: Its type, as torch has it: ``"cpu"``, ``"cuda"``.
        has_kernels: Whether Triton kernels run there.
        capability: Compute capability of a GPU; ``None`` for no GPU.
        name: Of the GPU, for messages.
    """

    device: str
    has_kernels: bool
    capability: tuple[int, int] | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a head is computed.

    Attributes:
        path: One of the three above.
        row_kernel: Whether a tile's rows are updated by one kernel: that of SGD on unit centers.
        reason: Why it is this path and no faster one: a clause for a message.
    """

    path: Path = "torch"
    row_kernel: bool = False
    reason: str = "no one asked for more"

    def refuse(self, *, fused: bool) -> None:
        """Refuse fused kernels that are asked for and cannot be used.

        Raises:
            ValueError: With the name of the option first.
        """
        if fused and self.path != "fused":
            raise ValueError(f"fused = true: the fused kernels cannot: {self.reason}. Remove it.")


def decide(
    machine: Machine | None,
    *,
    dim: int,
    unit_centers: bool,
    centers_per_identity: int,
    binary: bool,
    sgd: bool,
    compute: str,
    fused: bool,
    fp8: bool = False,
    positives: int = 1,
    sets: bool = False,
    weighted: bool = False,
    copies: bool = False,
) -> Plan:
    """Return how a head is computed; the path is ``"fused"`` only if ``fused`` and possible.

    Args:
        machine: Where the head is; ``None`` if that is not known yet: a Hopper GPU with Triton.
        dim: Elements of an embedding.
        unit_centers: Whether the margin takes class centers as unit vectors.
        centers_per_identity: K of the margin.
        binary: Whether every negative has a loss of its own, as in UniFace.
        sgd: Whether the rule of the rows is SGD.
        compute: Precision of the matrix products.
        fused: Whether the fused kernels are asked for.
        fp8: Whether the centers are stored so.
        positives: Most identities of a row.
        sets: Whether rows leave out negatives of other sets of identities.
        weighted: Whether sampled negatives stand for others.
        copies: Whether gradients of centers are summed over copies of them, tile by tile.
    """
    known = machine or Machine("cuda", True, _HOPPER)
    can_read = not fp8 or known.capability is None or known.capability >= _FP8
    has_kernels = known.has_kernels and can_read
    row_kernel = has_kernels and sgd and unit_centers and not copies
    path: Path = "triton" if has_kernels else "torch"
    if not known.has_kernels:
        reason = f"they need a GPU and Triton, and the head is on {known.device}"
    elif known.capability is not None and card_for(known.capability, known.name) is None:
        reason = f"they need tensor cores for bf16, which {known.name} lacks"
    elif known.capability is not None and compute != "bf16":
        reason = f'they multiply in bf16, and compute is "{compute}"'
    elif not unit_centers or centers_per_identity > 1 or binary:
        reason = "they know a softmax over unit centers, one an identity"
    elif positives > 1:
        reason = f"they know one positive a row, and positives.most is {positives}"
    elif sets:
        reason = "they tell a row from all sampled centers, and sets leave some out"
    elif weighted:
        reason = "they count every negative once, and negatives stand for others"
    elif copies:
        reason = "they leave no gradient of centers, which copies of them add up"
    elif dim > LARGEST_DIM:
        reason = f"they hold embeddings of up to {LARGEST_DIM} elements, not {dim}"
    elif not sgd:
        reason = "they know SGD only"
    elif not fused:
        reason = "fused kernels are not asked for"
    else:
        path, reason = "fused", "fused kernels are asked for"
    return Plan(path, row_kernel, reason)
