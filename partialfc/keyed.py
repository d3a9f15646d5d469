"""Keyed permutations of ``range(size)`` and keyed random numbers, in O(1) memory.

Every random choice of a run is a function of a key and a global id, never of a rank or of how
many numbers were drawn before. So any number of ranks makes the same choices, and a run resumes
anywhere without a generator's state.

A permutation is a Feistel network over the smallest power of two that holds ``size``, walked
along its cycle until the value falls inside (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002): at most two rounds of the network on average. It runs on numpy or torch int64
with the same result, on any device, and its inverse costs the same.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Integers = TypeVar("Integers", np.ndarray, "torch.Tensor")
"""int64 array or tensor of any shape."""

_LOW_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = 8
"""Of the network; even ones change the high half."""


def key(seed: int, purpose: str, *counters: int) -> int:
    """Return the signed 64-bit key of one purpose at one point of a run.

    Args:
        seed: The run's seed, any integer.
        purpose: What is drawn, e.g. ``"order"`` or ``"negatives"``.
        counters: Where in the run, e.g. the step and the canonical shard.
    """
    state = _mix(seed)
    for byte in purpose.encode():
        state = _mix(state ^ byte)
    for counter in counters:
        state = _mix(state ^ _mix(counter))
    return _signed(state)


def permute(
    index: Integers, size: int | Integers, key: int | Integers, *, largest: int | None = None
) -> Integers:
    """Return the images of ``index`` under the permutation of ``range(size)`` chosen by ``key``.

    Args:
        index: int64, each in [0, size).
        size: Length of the permuted range, >= 1, or one length per element.
        key: From :func:`key`, or one key per element.
        largest: Bound of the lengths where there is one per element. The permutation depends on
            its number of bits, so it must not depend on which elements are asked for.
    """
    return _walk(index, size, key, largest, _encrypt)


def unpermute(
    index: Integers, size: int | Integers, key: int | Integers, *, largest: int | None = None
) -> Integers:
    """Return ``i`` with ``permute(i, size, key) == index``; arguments as in :func:`permute`."""
    return _walk(index, size, key, largest, _decrypt)


def uniform(index: np.ndarray, key: int) -> np.ndarray:
    """Return one float64 in [0, 1) for every int64 id in ``index``, a function of key and id."""
    return (_bits(index, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(index: np.ndarray, key: int) -> np.ndarray:
    """Return one float64 of N(0, 1) for every int64 id in ``index``, a function of key and id."""
    radius = np.sqrt(-2 * np.log1p(-uniform(2 * index, key)))
    value: np.ndarray = radius * np.cos(2 * np.pi * uniform(2 * index + 1, key))
    return value


def keys(index: np.ndarray, key: int) -> np.ndarray:
    """Return one int64 key for every int64 id in ``index``, a function of ``key`` and id."""
    return _bits(index, key).view(np.int64)


def _bits(index: np.ndarray, key: int) -> np.ndarray:
    """SplitMix64 at position ``index`` of the stream that starts at ``key``; uint64."""
    with np.errstate(over="ignore"):
        value = index.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key & _MASK_64)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def _mix(value: int) -> int:
    """Finalizer of SplitMix64 (Steele et al., OOPSLA 2014) on a Python integer."""
    value = (value + _GOLDEN) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """Two's complement int64 of an unsigned 64-bit value."""
    return value - (1 << 64) if value >> 63 else value


MULTIPLIERS = tuple(_signed(_mix(i) | 1) for i in range(ROUNDS))
FINAL = _signed(0xD6E8FEB86659FD93)
"""Multipliers of the rounds, and the last one of each."""

_Network = Callable[[Integers, int, "int | Integers"], Integers]


def _walk(
    index: Integers,
    size: int | Integers,
    key: int | Integers,
    largest: int | None,
    network: _Network[Integers],
) -> Integers:
    if isinstance(size, int):
        largest = size
    assert largest is not None, "sizes per element need their bound"
    bits = max(4, (largest - 1).bit_length())  # fewer mix badly: pairs are not uniform
    with np.errstate(over="ignore"):
        value = network(index, bits, key)
        outside = _where(value >= size)  # host sync if on a GPU, as in the loop
        while len(outside[0]):
            walked = network(value[outside], bits, _at(key, outside))
            value[outside] = walked
            again = walked >= _at(size, outside)
            outside = tuple(axis[again] for axis in outside)
    return value


def _where(mask: Integers) -> tuple[Integers, ...]:
    """Indices of the true elements, one array or tensor for each axis."""
    found = mask.nonzero()
    return found if isinstance(found, tuple) else found.unbind(1)


def _at(value: int | Integers, where: tuple[Integers, ...]) -> int | Integers:
    """The elements of a per-element argument; one for all stays as it is."""
    return value if isinstance(value, int) else value[where]


def _encrypt(value: Integers, bits: int, key: int | Integers) -> Integers:
    return _feistel(value, bits, key, range(ROUNDS))


def _decrypt(value: Integers, bits: int, key: int | Integers) -> Integers:
    return _feistel(value, bits, key, range(ROUNDS - 1, -1, -1))


def _feistel(value: Integers, bits: int, key: int | Integers, rounds: range) -> Integers:
    """Even rounds change the high half by the low one, odd rounds the low half by the high one."""
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    low, high = value & low_mask, value >> low_bits
    for i in rounds:
        if i % 2 == 0:
            high ^= _hash(low, key, MULTIPLIERS[i], high_mask)
        else:
            low ^= _hash(high, key, MULTIPLIERS[i], low_mask)
    high <<= low_bits
    high |= low
    return high


def _hash(value: Integers, key: int | Integers, multiplier: int, mask: int) -> Integers:
    """Mixed bits of a 32-bit value; int64 products wrap and the masks make shifts unsigned."""
    value = value + 1
    value *= multiplier
    value += key
    upper = value >> 32
    upper &= _LOW_32
    value ^= upper
    value *= FINAL
    value >>= 32
    value &= mask  # of 32 bits at most
    return value
