"""Finds a loop that does not call ``head.optimizer.step()``.

A head keeps micro-batches until its optimizer takes them, and how many make a step is the user's
choice: no number of them is wrong. But those of one step see one backbone. If its weights change
again and again while micro-batches pile up, nobody takes them.
"""

import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

_SAID = 3
"""Changes of the backbone without a step of the centers that are warned of, once."""
_REFUSED = 100
"""Changes that end the loop, before its micro-batches have filled the memory."""
_MANY = 1000
"""Micro-batches that are warned of where it cannot be seen whether the backbone changes."""
_NODES = 64
"""Operations behind the embeddings among which weights are looked for."""


class Forgotten:
    """Follows some weights of the backbone over the micro-batches of a step."""

    def __init__(self) -> None:
        self._changes = 0
        self._said = False
        self._seen: list[tuple[weakref.ref[Tensor], int]] = []

    def look(self, embeddings: Tensor, waiting: int) -> None:
        """Take one more micro-batch; no host synchronisation.

        Args:
            embeddings: Of the micro-batch, with their graph.
            waiting: Micro-batches that the optimizer has kept before it.

        Raises:
            ValueError: If the backbone has changed a hundred times since the first one.
        """
        if not waiting:
            self._changes, self._seen = 0, []
            return
        # A weight that is changed in place has another version.
        now = ((weight(), version) for weight, version in self._seen)
        self._changes += any(weight is not None and weight._version != then for weight, then in now)
        self._seen = [(weakref.ref(leaf), leaf._version) for leaf in _leaves_behind(embeddings)]
        if self._changes >= _REFUSED:
            raise ValueError(self._in_words(waiting))
        if not self._said and (self._changes >= _SAID or waiting >= _MANY):
            self._said = True
            warnings.warn(self._in_words(waiting), stacklevel=7)

    def _in_words(self, waiting: int) -> str:
        changed = f", and the backbone has changed {self._changes} times" if self._changes else ""
        return (
            f"head.optimizer.step() was not called for {waiting} micro-batches{changed}: the "
            "centers do not move, and memory fills with what they have missed. Call it after the "
            "backward pass, beside optimizer.step()."
        )


def _leaves_behind(embeddings: Tensor) -> Iterator[Tensor]:
    """Yield the leaves that are near in the graph of the embeddings."""
    nodes: deque[Any] = deque([embeddings.grad_fn])
    for _ in range(_NODES):
        if not nodes:
            return
        node = nodes.popleft()
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        elif node is not None:
            nodes.extend(following for following, _ in node.next_functions)
