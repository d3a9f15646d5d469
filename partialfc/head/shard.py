"""What PyTorch does to modules, and what of it may happen to the centers of one rank.

Shape suffixes: C = rows of a rank's centers, D = their elements, W = ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from partialfc.distributed.copies import Copies
from partialfc.distributed.ranks import Ranks, gather_rows
from partialfc.head.loss import Outcome
from partialfc.head.nearest import LISTS, NearestCenters
from partialfc.head.options import Nearest, Negatives, Sets
from partialfc.head.rows.optimizer import RowOptimizer
from partialfc.head.sampling import KeyedSampler
from partialfc.head.sharding import Sharding
from partialfc.head.steps import StepSamples
from partialfc.head.tiles.torch_steps import take_rows


class Shard(nn.Module):
    """A module with the centers of one rank, which are changed by their optimizer alone.

    They are no parameter of the module, because what is done to parameters would spoil them:
    DistributedDataParallel gives all ranks those of rank 0, ``half`` drops bits, an average over
    steps knows no rows. ``state_dict`` has them, under the key of a parameter.
    """

    optimizer: RowOptimizer
    """Of the centers."""
    device: torch.device
    """Where they are needed."""
    sharding: Sharding
    """The cut of the identities."""
    owned: range
    """Identities of this rank."""
    centers_per_identity: int
    """Rows of an identity."""
    ranks: Ranks
    """Those that share the head."""
    copies: Copies
    """Which of them hold the centers together."""
    embedding_dim: int
    """D."""
    sets: Sets | None
    """Of identities that may have the same people."""
    sampler: KeyedSampler
    """Of the rows of a step."""
    _samples: StepSamples
    """Of its steps."""
    _compared = False

    @property
    def nearest(self) -> NearestCenters | None:
        """The neighbours of every center, if the sample wants them."""
        return self.sampler.nearest

    @property
    def owned_rows(self) -> range:
        """Rows of this rank among those of all."""
        each = self.centers_per_identity
        return range(self.owned.start * each, self.owned.stop * each)

    @property
    def centers(self) -> nn.Parameter:
        """[rows of this rank, D] as ``precision`` stores them, not normalised; changed by
        ``optimizer`` alone. fp16 and fp8 rows are in units of their scale. A margin may want
        several rows for an identity, which follow one another, or a bias, one element more."""
        return self.optimizer.centers

    def get_extra_state(self) -> dict[str, int]:
        """What ``load_state_dict`` checks: centers fit only the rank they were cut for."""
        return {"first": self.owned.start, "identities": self.sharding.num_identities}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Refuse the centers of another rank or another head."""
        if state != self.get_extra_state():
            raise ValueError(
                f"these centers were saved for {state}, this rank holds {self.get_extra_state()}; "
                "load a checkpoint of partialfc.checkpoint to change the number of ranks."
            )

    def _nearest_of(self, negatives: Negatives, sample_rate: float) -> NearestCenters | None:
        """The lists of neighbours; ``None`` where no sample asks for them: that of all does not."""
        options = Nearest() if negatives == "nearest" else negatives
        if not isinstance(options, Nearest) or sample_rate == 1:
            return None
        return NearestCenters(
            options,
            self.sharding,
            self.copies.within,
            dim=self.embedding_dim,
            per_identity=self.centers_per_identity,
            sets=self.sets,
            device=self.device,
        )

    def lists(self) -> dict[str, Tensor]:
        """What is kept for each row beside the optimizer's states, on the CPU, by name."""
        return {} if self.nearest is None else {LISTS: self.nearest.lists}

    def loaded(self) -> None:
        """Say that centers, :meth:`lists` or the number of steps have been set from outside.

        What was drawn for another state is forgotten.
        """
        self._samples.forget()
        if self.nearest is not None:
            self.nearest.forget()

    def find_neighbours(self) -> None:
        """Search the neighbours of all centers where the step wants it, before its sample.

        Collective as :meth:`partialfc.head.nearest.NearestCenters.refresh`; nothing without one.
        """
        if self.nearest is not None:
            self.nearest.refresh(self.optimizer)

    def begins_with_search(self, step: int) -> bool:
        """Whether a step's sample is unknown before it: its lists are not made yet."""
        return self.nearest is not None and self.nearest.due(step)

    def refuse_broadcast(self) -> None:
        """Refuse centers that are those of another rank, once; as :func:`refuse_broadcast`."""
        if not self._compared:
            fewest = self.sharding.fewest * self.centers_per_identity
            refuse_broadcast(self.centers, fewest, self.device, self.copies)
            self._compared = True

    def margin_state(self) -> dict[str, Tensor]:
        """What the margin remembers, by name; the same on all ranks."""
        return {
            name.removeprefix("margin_"): value
            for name, value in self.named_buffers(recurse=False)
            if name.startswith("margin_")
        }

    def _learn(self, outcome: Outcome) -> None:
        """Take over what the margin remembers; a batch without a finite loss leaves no trace."""
        if outcome.state is not None and outcome.finite is not None:
            for name, value in self.margin_state().items():
                value.copy_(torch.where(outcome.finite, outcome.state[name], value))

    def shared_state(self) -> dict[str, Tensor]:
        """All state that is no row's and the same on all ranks, for a checkpoint."""
        margin = {f"margin_{name}": value for name, value in self.margin_state().items()}
        return {**self.optimizer.shared_state(), **margin}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`shared_state` returned."""
        self.optimizer.load_shared_state(state)
        for name, value in self.margin_state().items():
            value.copy_(state[f"margin_{name}"])

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a head cannot be copied or pickled, as copy.deepcopy, AveragedModel and torch.save of "
            "a whole module do: its centers belong to one rank and one optimizer, and a copy would "
            "not follow them. Copy or average the backbone alone, and save head.state_dict() and "
            "head.optimizer.state_dict()."
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Shard":
        """Refuse to move; number formats are those of ``precision``, whatever the model's are."""
        there = fn(torch.empty(0, device=self.device)).device
        if there != self.device:
            raise ValueError(
                f"a head does not move: its centers are on {self.device}, and this would move it "
                f'to {there}; construct it with device="{there}".'
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.optimizer.settle()
        with self._as_parameter():
            super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: dict[str, Any], *arguments: Any
    ) -> None:
        self.optimizer.settle()
        # assign=True would put another tensor here than the one that the optimizer changes.
        metadata = {**metadata, "assign_to_params_buffers": False}
        with self._as_parameter():
            super()._load_from_state_dict(state, prefix, metadata, *arguments)
        self.loaded()

    @contextmanager
    def _as_parameter(self) -> Iterator[None]:
        """Inside, torch saves and loads the centers as any parameter, and lists as buffers."""
        self._parameters["centers"] = self.centers
        self._buffers.update(self.lists())
        try:
            yield
        finally:
            del self._parameters["centers"]
            for name in self.lists():
                del self._buffers[name]


def refuse_broadcast(centers_CD: Tensor, rows: int, device: torch.device, copies: Copies) -> None:
    """Refuse centers of a rank that are those of the rank before in its copy.

    Collective: one all-gather of [D] over the ranks of all copies, which refuse together: no copy
    goes on alone. An element of each of some rows is compared; elements that are all the same tell
    nothing.

    Args:
        centers_CD: Of this rank.
        rows: How many rows every rank has that has any.
        device: Of the collective.
        copies: The ranks that share the head, and which of them hold the centers together.

    Raises:
        ValueError: If there are; on a GPU, a device-side assertion fails instead.
    """
    if copies.within.size == 1:
        return
    column_D = torch.arange(centers_CD.shape[1], device=centers_CD.device)
    mark_D = torch.zeros(len(column_D), device=device)
    if len(centers_CD):
        row_DD = take_rows(centers_CD, column_D % rows, 0, len(column_D))
        mark_D = row_DD.float().diagonal().contiguous().to(device)
    mark_WD = gather_rows(mark_D.unsqueeze(0), copies.every)
    tells_W = (mark_WD != mark_WD[:, :1]).any(1)
    tells_W &= torch.arange(len(mark_WD), device=device) % copies.within.size > 0
    copied_W = tells_W[1:] & (mark_WD[1:] == mark_WD[:-1]).all(1)
    if copied_W.device.type != "cpu":
        torch._assert_async(~copied_W.any(), "the centers of two ranks are the same")
    elif copied_W.any():
        rank = int(copied_W.nonzero()[0]) + 1
        raise ValueError(
            f"centers: those of rank {rank} are a copy of those of rank {rank - 1}, and each rank "
            "must have those of its own identities. Something has broadcast them (a loop over "
            "state_dict()?), or they were drawn with the same seed on every rank: leave the head "
            "out of it."
        )
