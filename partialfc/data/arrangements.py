"""Arrangements of the images of an epoch other than one permutation of all.

Shape suffixes: N = images, C = identities that have images, B = positions asked for, U = the
identities at these positions, F = all their images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partialfc.data.dataset import DataSet
from partialfc.data.order import Arrangement, Samples
from partialfc.keyed import key, keys, permute


def arrangement(
    dataset: DataSet,
    samples: range | None = None,
    *,
    images_per_identity: int | None = None,
    block: int | None = None,
    block_window: int = 16,
) -> Arrangement | None:
    """Return the arrangement that the settings of a run ask for; ``None`` is one permutation.

    Args:
        dataset: Whose images are arranged.
        samples: Those of one of its sets, which the arrangement numbers from 0; all by default.
        images_per_identity: K; an epoch is every identity once, with K images.
        block: Images of a block that stay neighbours.
        block_window: Blocks that are shuffled together.

    Raises:
        ValueError: If a label of the data is bad.
    """
    samples = samples or range(len(dataset))
    if images_per_identity is not None:
        labels = dataset.labels()[samples.start : samples.stop]
        return IdentityBalanced.of(labels, images_per_identity)
    return None if block is None else Blocks(len(samples), block, block_window)


@dataclass(frozen=True)
class Blocks:
    """Blocks of neighbouring images in a keyed order, shuffled within a window of some blocks.

    Each image is at one position of an epoch, as in one permutation of all, but while an epoch is
    at one place its images come from ``window`` stretches of the data, not from everywhere: what
    slow storage reads ahead is used. The images of one batch come from one window or two.

    Attributes:
        size: N, images in the data; >= 1.
        block: Images of a block; the last N % block images of the data close the epoch.
        window: Blocks whose images are shuffled together.
    """

    size: int
    block: int
    window: int

    def check(self, global_batch: int) -> None:
        """Any batch can be made."""

    def at(self, seed: int, epoch: int, position_B: NDArray[np.int64]) -> Samples:
        """Return the images at positions in [0, N) of an epoch."""
        num_blocks = self.size // self.block
        length = self.block * self.window
        num_windows = max(1, num_blocks // self.window)
        window_B = np.minimum(position_B // length, num_windows - 1)
        is_last_B = window_B == num_windows - 1  # it takes what fills no window of its own
        length_B = np.where(is_last_B, self.size - (num_windows - 1) * length, length)
        key_B = keys(window_B, key(seed, "window", epoch))
        largest = self.size - (num_windows - 1) * length
        within_B = permute(position_B - window_B * length, length_B, key_B, largest=largest)
        place_B = window_B * length + within_B
        block_B, image_B = np.divmod(place_B, self.block)
        whole_B = block_B < num_blocks
        block_B[whole_B] = permute(block_B[whole_B], max(num_blocks, 1), key(seed, "blocks", epoch))
        sample_B = block_B * self.block + image_B
        return Samples(sample_B, np.zeros_like(sample_B))


@dataclass(frozen=True, eq=False)
class IdentityBalanced:
    """Each identity once in an epoch, with K images side by side: P x K batches.

    A global batch holds the K images of P = B / K identities, no identity twice. In every epoch
    the identities are permuted. An identity of n >= K images goes through them K at a time; the
    n % K that are left sit out until it begins again in another order, and so no two of the K are
    the same. One of n < K images shows them again in turn until it has K, each time with another
    augmentation. Identities without images are left out.

    Attributes:
        images_per_identity: K >= 1.
        start_C: int64 [C + 1]; where the images of each identity begin in ``sample_N``.
        sample_N: The images by identity, or ``None`` where they are in this order already.
    """

    images_per_identity: int
    start_C: NDArray[np.int64]
    sample_N: NDArray[np.int64] | None

    @classmethod
    def of(cls, identity_N: NDArray[np.integer], images_per_identity: int) -> "IdentityBalanced":
        """Return the arrangement of images [N] by their identities."""
        in_order = bool((identity_N[1:] >= identity_N[:-1]).all())
        sample_N = None if in_order else np.argsort(identity_N, kind="stable")
        count_C = np.bincount(identity_N)
        start_C = np.cumsum(np.concatenate([[0], count_C[count_C > 0]]))
        return cls(images_per_identity, start_C, sample_N)

    @property
    def size(self) -> int:
        """C x K."""
        return (len(self.start_C) - 1) * self.images_per_identity

    def check(self, global_batch: int) -> None:
        """Raise ValueError unless a batch is whole identities, and none of them twice."""
        per_identity = self.images_per_identity
        if global_batch % per_identity:
            below = global_batch // per_identity * per_identity
            nearest = " or ".join(str(n) for n in (below, below + per_identity) if n)
            raise ValueError(
                f"data.images_per_identity = {per_identity} must divide data.global_batch, got "
                f"{global_batch}. Nearest: {nearest}."
            )
        if global_batch > self.size:
            raise ValueError(
                f"data.global_batch must be at most {self.size} with data.images_per_identity = "
                f"{per_identity}, or an identity would be in it twice: {len(self.start_C) - 1} "
                f"identities have images. Got {global_batch}."
            )

    def at(self, seed: int, epoch: int, position_B: NDArray[np.int64]) -> Samples:
        """Return the images at positions in [0, size) of an epoch."""
        per_identity = self.images_per_identity
        place_U, owner_B = np.unique(position_B // per_identity, return_inverse=True)
        identity_U = permute(place_U, len(self.start_C) - 1, key(seed, "identities", epoch))
        start_U = self.start_C[identity_U]
        count_U = self.start_C[identity_U + 1] - start_U
        turns_U = np.maximum(count_U // per_identity, 1)
        round_U, turn_U = np.divmod(epoch, turns_U)
        shuffled_F, first_U = _shuffled(seed, identity_U, round_U, count_U)
        which_B = turn_U[owner_B] * per_identity + position_B % per_identity
        repeat_B, which_B = np.divmod(which_B, count_U[owner_B])
        sample_B = start_U[owner_B] + shuffled_F[first_U[owner_B] + which_B]
        return Samples(sample_B if self.sample_N is None else self.sample_N[sample_B], repeat_B)


def _shuffled(
    seed: int,
    identity_U: NDArray[np.int64],
    round_U: NDArray[np.int64],
    count_U: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keyed permutations of range(count) of each identity, side by side [F], and their starts [U].

    They are sorts of random numbers: a Feistel walk is slow where counts are small and different.
    """
    first_U = np.cumsum(count_U) - count_U
    owner_F = np.repeat(np.arange(len(count_U)), count_U)
    within_F = np.arange(len(owner_F)) - first_U[owner_F]
    own_U = keys(identity_U, key(seed, "images")) + round_U
    random_F = keys(keys(own_U, key(seed, "round"))[owner_F] + within_F, key(seed, "image"))
    order_F = np.lexsort((random_F, owner_F))
    return within_F[order_F], first_U
