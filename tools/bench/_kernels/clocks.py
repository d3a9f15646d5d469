"""What a fused kernel should take of a multiprocessor, by arithmetic: clocks for a logit.

A program multiplies 64 rows that it keeps with blocks of rows that it streams from the L2 cache,
and the exponentials with the same block again. For a block this counts the clocks of the tensor
cores, of shared memory, of the exponentials and of the L2 cache. With two stages the cache works
beside the rest; with one, before it. Within a program the products wait for the exponentials, as
all warps do the same; where a multiprocessor holds two programs, one multiplies while the other
does not. Both products read both operands from shared memory, four warps a half of the columns.
"""

from dataclasses import dataclass

from partialfc.head.tiles.cards import Shape
from partialfc.head.tiles.limits import STATIONARY


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one multiprocessor, in a clock.

    Attributes:
        products: bf16 multiply-adds.
        l2_bytes: From the L2 cache, all multiprocessors reading: 0.6 of 5,120 bytes a clock for the
            whole, which NVIDIA states for A100 and nobody for its successors. A guess but for it.
    """

    products: int
    l2_bytes: float


RATES = {
    80: Rates(1024, 0.6 * 5120 / 108),
    90: Rates(2048, 0.6 * 5120 / 132),
    100: Rates(4096, 0.6 * 5120 / 148),
    103: Rates(4096, 0.6 * 5120 / 148),
}
_SHARED_BYTES, _EXPONENTIALS, _LANES = 128, 16, 128
"""Of shared memory, special functions and fp32 operations a clock, on all of them."""
_BLOCK = 60
"""Guess: clocks of a block besides, for the loop and its barriers."""
_OPERATIONS = {"pull": 8, "pull_bent": 14, "update": 9, "update_kept": 2}
"""fp32 operations of a logit besides its exponential."""


def clocks(kernel: str, shape: Shape, width: int, capability: int, programs: int) -> float:
    """Return the clocks of a multiprocessor for one logit.

    Args:
        kernel: As in :data:`partialfc.head.tiles.cards.Kernel`.
        shape: Of its tiles.
        width: Columns of a block: D, rounded up to a power of two.
        capability: 80, 90, 100 or 103.
        programs: That a multiprocessor holds at once.
    """
    rates, kept, streamed = RATES[capability], STATIONARY, shape.streamed
    logits, block = kept * streamed, streamed * width * 2
    halves = max(1, shape.warps // 4)  # warps share a product's columns, four and four
    multiply = logits * width / rates.products
    first = max(multiply, (halves * kept * width * 2 + block) / _SHARED_BYTES)
    second = max(multiply, (block + halves * logits * 2) / _SHARED_BYTES)
    if kernel == "update_kept":
        first = 0.0
    between = logits * _OPERATIONS[kernel] / _LANES
    if kernel != "update_kept":
        between += logits / _EXPONENTIALS
    work = first + second + between + _BLOCK
    if programs > 1:
        work = max(first + second, between + _BLOCK)
    read = block + (logits * 2 if kernel == "update_kept" else 0)
    cache = read / rates.l2_bytes  # both programs read
    return (max(work, cache) if shape.stages > 1 else work + cache) / logits
