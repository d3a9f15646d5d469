"""A moving average of the backbone's weights, which is what is measured and used.

With decay d, the average moves by ``1 - d`` of its distance to the weights after every step. At
step t, from 0, d is at most (1 + t) / (10 + t), so that what a run began with is soon forgotten.
What is averaged is what a step changes: trained weights, and BatchNorm's running statistics, which
belong to the weights that they were taken with. Those are each rank's own here too; their mean over
ranks is the average of the mean, as both are linear.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from partialfc.model.batch_norm import statistics


class Average:
    """The average of one backbone, beside its live weights. It begins at them.

    Args:
        module: The backbone, on its device. Its statistics are kept, not its forward.
        parameters: Its own by name; of a divided one this rank's rows.
        decay: d of late steps, in [0, 1).
        own: Names of what may change; ``None`` for all.

    Attributes:
        tensors: The average by the names of the backbone's ``state_dict``.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        own: Collection[str] | None = None,
    ) -> None:
        self._decay = decay
        self._statistics = {
            name: value for name, value in statistics(module).items() if own is None or name in own
        }
        trained = {name: one for name, one in parameters.items() if one.requires_grad}
        self._live = {name: one.detach() for name, one in {**trained, **self._statistics}.items()}
        self.tensors = {name: one.clone() for name, one in self._live.items()}

    @torch.no_grad()
    def begin(self) -> None:
        """Begin anew at the weights as they are."""
        for name, value in self.tensors.items():
            value.copy_(self._live[name])

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Move towards the weights after a step; no host synchronisation, no collective.

        Args:
            step: Steps taken before this one.
            skipped: Scalar on the device: 1 where the step changed nothing, which then changes no
                value here, else 0.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        live, averages = [*self._live.values()], [*self.tensors.values()]
        distances = torch._foreach_sub(live, averages)
        torch._foreach_mul_(distances, (1 - decay) * (1 - skipped))
        torch._foreach_add_(averages, distances)

    def statistics(self) -> dict[str, Tensor]:
        """Return the averages of this rank's own BatchNorm statistics, by name."""
        return {name: self.tensors[name] for name in self._statistics}

    def load(self, found: Mapping[str, Tensor]) -> None:
        """Go on with averages from a checkpoint; those that it does not name stay.

        Raises:
            ValueError: If one is not of the backbone, or of another shape.
        """
        for name, value in found.items():
            if name not in self.tensors or self.tensors[name].shape != value.shape:
                raise ValueError(f"average: {name} {[*value.shape]} is not of this backbone")
            self.tensors[name].copy_(value)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the backbone the averages, and at the end its own weights again, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """One tensor after the other, so that no third copy of the weights is made."""
        for name, value in self.tensors.items():
            kept = value.clone()
            value.copy_(self._live[name])
            self._live[name].copy_(kept)

    @torch.no_grad()
    def install(self) -> None:
        """Let the averages replace the weights for good: of a model that is trained no more."""
        for name, value in self.tensors.items():
            self._live[name].copy_(value)
