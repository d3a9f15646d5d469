"""Held-out arrays, whose rows are searched for among each other.

Shape suffix: N = samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from partialfc.data.arrays import ArrayFile
from partialfc.data.label_file import LabelFile
from partialfc.protocols.identification import first_of_each


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Samples and their identities.

    Attributes:
        file: Of the samples.
        identity_N: int64.
    """

    file: ArrayFile
    identity_N: NDArray[np.int64]

    def sample(self, index: int) -> Tensor:
        """Return one sample in fp32; raises as :meth:`ArrayFile.rows`."""
        return from_numpy(self.file.rows(np.array([index]))[0])


def open_held_out(path: Path, shape: Sequence[int]) -> HeldOut:
    """Open ``people.npy``, whose labels [N] are ``people.labels.npy`` beside it.

    Raises:
        ValueError: If a file is none or does not fit, or nothing can be searched for.
        OSError: If it cannot be read.
    """
    file = ArrayFile(path, shape)
    labels = LabelFile(path.with_suffix(".labels.npy"), len(file))
    if labels.several:
        raise ValueError(f"{labels.path}: each sample must have one label, >= 0.")
    identity_N = labels.identities(np.arange(len(file)))
    if not len(first_of_each(identity_N)[1]):
        raise ValueError("no identity has a second sample, so nothing can be searched for")
    return HeldOut(file, identity_N)
