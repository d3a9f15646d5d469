"""Images that a run had to replace: reported, counted over all ranks, and too many of them."""

import sys
from collections.abc import Sequence
from pathlib import Path

from partialfc.data.loaders.stream import Replaced
from partialfc.distributed.agreement import total, words_of_any
from partialfc.distributed.ranks import Ranks
from partialfc.errors import DataError
from partialfc.records.lines import Lines

_PRINTED = 20
"""Images that a rank prints; the list has all of them."""


class BadImages:
    """The replaced images of this process.

    Each is printed and appended to ``bad_images.<rank>.jsonl`` in the run's folder, a list that
    ``data.skip`` takes, when it is first met.

    Args:
        folder: Of the run.
        share: Largest share of the images that may be replaced; one always may unless it is 0.
        ranks: This rank among all.
    """

    def __init__(self, folder: Path, share: float, ranks: Ranks) -> None:
        self._path = folder / f"bad_images.{ranks.rank}.jsonl"
        self._list = Lines(self._path)
        self._share, self._ranks = share, ranks
        self._count, self._last = 0, ""
        self._known: set[int] = set()

    def note(self, replaced: Sequence[Replaced]) -> None:
        """Take note of what was replaced in a batch of this rank."""
        for one in replaced:
            self._count += 1
            self._last = f"{one.pack.path}: {one.bad}"
            if one.sample_id in self._known:
                continue
            self._known.add(one.sample_id)
            self._list.append(one.bad.line(one.pack).rstrip("\n"))
            if len(self._known) <= _PRINTED:
                print(
                    f"rank {self._ranks.rank}: replaced: {self._last}", file=sys.stderr, flush=True
                )

    def check(self, images: int) -> int:
        """Return how many images were replaced on all ranks.

        Collective: one all-reduce; before an error also those of its words.

        Args:
            images: That all ranks have seen in this process.

        Raises:
            DataError: On every rank, if more were than may be.
        """
        count = total(self._count, self._ranks)
        if count <= max(float(self._share > 0), self._share * images):
            return count
        last = words_of_any(self._last and f"rank {self._ranks.rank}: {self._last}", self._ranks)
        lists = self._path.with_name("bad_images.*.jsonl")
        raise DataError(
            f"{count} of {images} images had to be replaced, and data.bad_share = {self._share:g} "
            f"allows {self._share * images:.0f}. The last on {last.rstrip('.')}. They are listed "
            f"in {lists}: leave them out with data.skip, copy the pack again, or raise "
            "data.bad_share."
        )
