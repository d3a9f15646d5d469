"""The optimizer of the class centers: it touches the sampled rows and their states only.

:class:`RowOptimizer` binds a rule of :mod:`partialfc.head.rows.rules` to the centers of a rank: it
keeps the micro-batches that backward has seen and turns them into updates tile by tile, so no
gradient of the centers exists.

Shape suffixes: D = embedding, n = sampled rows, T = rows of a tile.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from partialfc.distributed.ranks import Ranks, max_over_ranks
from partialfc.head.options import Memory
from partialfc.head.plan import Plan
from partialfc.head.row_set import RowSet
from partialfc.head.rows import catch_up as unsampled
from partialfc.head.rows.catch_up import Moves
from partialfc.head.rows.formats import FIRST_SCALE
from partialfc.head.rows.loss_scale import LossScale
from partialfc.head.rows.rules import RowRule, States
from partialfc.head.rows.side_stream import SideStream
from partialfc.head.rows.staging import Staging, zero_rows
from partialfc.head.rows.stored import AT_STEP, CENTERS, SCALE, Stored
from partialfc.head.rows.update import RowStep, update_
from partialfc.head.tiles.parts import Kept, union
from partialfc.head.tiles.workspace import Workspace
from partialfc.keyed import key
from partialfc.pinned import to_device

_STAGED_ROWS = 1 << 16
"""Rows of the host that catch up at once, where all do."""
_MOVES = "moves"
"""Name in a state of what the steps did to rows that none of them sampled."""


class RowOptimizer(torch.optim.Optimizer):
    """A :class:`torch.optim.Optimizer` of one rank's class centers; made by ``PartialFC``.

    ``param_groups``, learning-rate schedulers, ``state_dict`` and ``torch.amp.GradScaler``, with
    ``unscale_`` or without, work as with any optimizer. ``zero_grad`` forgets the micro-batches
    that backward has seen.

    Args:
        centers: [rows of this rank, D], fp32, bf16, fp16 or fp8; changed in place by :meth:`step`.
        rule: What happens to a row.
        first_row: Global number of the first row.
        seed: Stochastic rounding is a function of it.
        memory: Where the rows lie between steps.
        device: Where they are needed; ``None`` for where the centers are.
        plan: Which code computes pass 2.
        overlap: On a GPU, :meth:`step` runs beside what the current stream does since the head's
            backward. ``found_inf``, a loss scale, and whatever has used the rows or the buffers
            since then make it wait for that stream all the same.
        every_row: Whether every step visits all rows, so that none ever misses one.
        across: The ranks that hold the same rows, one of each copy of the centers, whose gradients
            are averaged; ``None`` for one copy.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf before step

    def __init__(
        self,
        centers: nn.Parameter,
        rule: RowRule,
        *,
        first_row: int = 0,
        seed: int = 0,
        memory: Memory | None = None,
        device: torch.device | None = None,
        plan: Plan | None = None,
        overlap: bool = False,
        every_row: bool = False,
        across: Ranks | None = None,
    ) -> None:
        self._across = across or Ranks()
        self.rule, self._plan = rule, plan or Plan()
        self._device = device or centers.device
        self._memory = memory or Memory()
        self._staging: Staging | None = None
        self._first_row, self._seed = first_row, seed
        self._kept: list[Kept] = []
        self._skip: list[Tensor] = []
        self.workspace = Workspace()
        self._side = SideStream(self._device if overlap else None)
        misses = getattr(rule, "unsampled", "stay") == "move" and not every_row
        self._moves = Moves(self._device) if misses else None
        self._loss_scale = LossScale(self._device)
        super().__init__([centers], {**asdict(rule), "steps": 0})
        self.param_groups[0]["params"].append(self._loss_scale.parameter)
        if self._memory.uses_host:
            self.states()  # a folder without room is refused now

    @property
    def centers(self) -> nn.Parameter:
        """[rows of this rank, D] as they are stored."""
        centers: nn.Parameter = self.param_groups[0]["params"][0]
        return centers

    @property
    def steps(self) -> int:
        """Steps taken, skipped ones included; the sample of a step is keyed by it."""
        return int(self.param_groups[0]["steps"])

    def shared_state(self) -> dict[str, Tensor]:
        """State that is no row's and the same on all ranks."""
        return {} if self._moves is None else {_MOVES: self._moves.products}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`shared_state` returned, from any device."""
        if self._moves is not None:
            self._moves.load(state[_MOVES])

    @property
    def overlaps(self) -> bool:
        """Whether a step may run beside the backward of what made the embeddings."""
        return self._side.exists

    @property
    def kept_bytes(self) -> int:
        """Memory of the exponentials kept for the next step."""
        return sum(kept.bytes for kept in self._kept)

    @property
    def micro_batches(self) -> int:
        """How many backward has seen since the last step."""
        return len(self._kept)

    def add_micro_batch(self, kept: Kept, weight: Tensor, finite: Tensor) -> None:
        """Remember one micro-batch for the next step.

        Args:
            kept: What pass 2 needs.
            weight: Scalar gradient of the loss that backward was given.
            finite: Scalar bool; false makes the next step change nothing.
        """
        self._loss_scale.listen()
        if self._across.size > 1:
            weight = weight / self._across.size
        self._kept.append(kept.times(weight))
        self._skip.append(~finite)
        self._side.mark()

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "the optimizer of a head cannot be copied or pickled: it belongs to the centers of one "
            "rank. Save and load its state_dict()."
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the micro-batches since the last step."""
        super().zero_grad(set_to_none)
        self._kept, self._skip = [], []
        self._loss_scale.reset()

    @torch.no_grad()
    def open(self, row_n: Tensor | None, host_n: Tensor | None = None) -> tuple[Tensor, RowSet]:
        """Return the centers to read in this step, and where the sampled rows lie in them.

        They are all centers of the rank, or a compact copy of the sampled ones on the device. What
        these have missed where unsampled rows move is written first, or read with them.
        ``host_n`` is ``row_n`` on the host, which staging waits for otherwise.
        """
        self._side.unmark()
        if not self._reads_newest:
            self.catch_up(row_n, host_n)
            if not self._memory.uses_host:  # before the first step there are no states
                return self.centers.detach(), RowSet.of(row_n, first_row=self._first_row)
        stored = self._working(row_n, host_n)
        return stored.centers, stored.rows

    def prefetch(self, rows: Callable[[], Tensor | None]) -> None:
        """Begin to bring the rows of the step after the present one; a no-op without staging.

        Args:
            rows: Returns them, on the host; called from a thread.
        """
        if self._memory.uses_host:
            self._stage().prefetch(self.steps + 1, rows)

    def settle(self) -> None:
        """Wait until centers and states are where they lie between steps, all of them."""
        self._side.unmark()
        if self._staging is not None:
            self._staging.settle()

    def _stage(self) -> Staging:
        if self._staging is None:
            centers, states = self.centers.detach(), self.states()
            in_host = {CENTERS} if self._memory.centers_in == "host" else set()
            if self._memory.states_in == "host":
                in_host |= states.keys()
            self._staging = Staging({CENTERS: centers, **states}, frozenset(in_host), self._device)
        return self._staging

    @torch.no_grad()
    def catch_up(self, rows: Tensor | None, host_n: Tensor | None = None) -> None:
        """Bring rows up to the present step where unsampled rows move; a no-op otherwise.

        After ``catch_up`` of all rows, the centers are those of dense SGD.

        Args:
            rows: int64 [n] rows; ``None`` for all.
            host_n: The same on the host, as in :meth:`open`.
        """
        self._side.unmark()
        moves = self._moves
        if moves is None or not moves.steps:
            return
        if rows is None and self._memory.uses_host:
            total = len(self.centers)
            for start in range(0, total, _STAGED_ROWS):
                host_n = torch.arange(start, min(start + _STAGED_ROWS, total))
                self.catch_up(to_device(host_n, self._device), host_n)
            self.settle()
            return
        step_key = key(self._seed, "catch up", self.steps)
        unsampled.catch_up_(
            moves,
            self._working(rows, host_n),
            step_key,
            path=self._plan.path,
            workspace=self.workspace,
        )

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the sampled rows by the micro-batches since the last step.

        No collective; with several copies of the centers, among ranks that hold the same rows, one
        all-reduce of [T, D] fp32 for each tile, and one of a number before: a ``found_inf`` that
        one of them alone is given holds for all.

        Nothing changes where a loss was not finite or ``found_inf`` is set; a GPU decides that
        without a host synchronisation.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        kept, skips = self._kept, self._skip
        self._kept, self._skip = [], []
        if kept:
            with self._side.beside(waits=self._has_verdict):
                self._update(group, kept, skips)
            self.workspace.take_back(tensor for one in kept for tensor in one.spend())
        self._loss_scale.reset()
        if self._staging is not None:
            self._staging.close()
        if self._moves is not None and self._moves.due:
            self._drop_oldest(self._moves)
        group["steps"] += 1
        return loss

    def _drop_oldest(self, moves: Moves) -> None:
        """Bring rows that were not sampled for very long up to date, and forget what they missed.

        Once in many steps, and the same on any number of ranks and after any restart: it goes by
        the number of moves, and a row by its own step.
        """
        self.settle()
        dropped, at_step = moves.due, self.states()[AT_STEP]
        (behind,) = (at_step[:, 0] < dropped).nonzero(as_tuple=True)  # host sync
        for rows in torch.split(behind.to(self._device), _STAGED_ROWS):
            self.catch_up(rows)
        self.settle()
        at_step.sub_(dropped)
        moves.drop(dropped)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the states keep their formats and their places.

        torch casts every state to the dtype of its parameter, which would ruin the others.
        """
        self.settle()
        self._staging = None
        saved = state_dict["state"].get(0, {})
        held = self.states() if saved else {}
        (group,) = state_dict["param_groups"]
        if (_MOVES in group) != (self._moves is not None):
            theirs, ours = ("stay", "move") if self._moves else ("move", "stay")
            raise ValueError(
                f"unsampled rows of this state {theirs}, and here they {ours}; give the rule the "
                "unsampled, and the head the sample_rate, that the state was made with."
            )
        self.load_shared_state(group)
        groups = [{name: value for name, value in group.items() if name != _MOVES}]
        groups[0]["params"] = [0, 1]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state[self.centers] = {name: held[name].copy_(value) for name, value in saved.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state, once all rows are where they lie between steps."""
        self.settle()
        state = super().state_dict()
        (group,) = state["param_groups"]
        return {**state, "param_groups": [{**group, "params": [0], **self.shared_state()}]}

    @property
    def _has_verdict(self) -> bool:
        """Whether it is said behind the backbone's backward whether, or by what, a step counts."""
        told = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        return any(tensor is not None for tensor in (*told, self._loss_scale.factor))

    def _update(self, group: dict[str, Any], kept: list[Kept], skips: list[Tensor]) -> None:
        stored = self._working(union(kept))
        bad = skips[0] if len(skips) == 1 else torch.stack(skips).any()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        on_gpu = stored.centers.is_cuda
        if found_inf is not None:
            bad = bad | (torch.as_tensor(found_inf, device=stored.centers.device) != 0)
        if self._across.size > 1:  # or some would wait for tiles of those that skip the step
            bad = max_over_ranks(bad.int(), self._across) > 0
        if not on_gpu and bad:
            return
        step_key = key(self._seed, "rounding", self.steps)
        moves = self._moves if self._reads_newest else None
        step = RowStep(self.rule, group, step_key, bad if on_gpu else None, self._across, moves)
        kept = self._loss_scale.unscaled(kept, getattr(self, "grad_scale", None))
        update_(stored, kept, step, self._plan, self.workspace)
        if self._moves is not None:
            self._moves.extend(group, step.skip)
            unsampled.mark_newest_(self._moves, stored)

    def states(self) -> States:
        """Row states by name, each with one row per class center; made when first asked for."""
        states: States = self.state[self.centers]
        if not states:
            states.update(self._new_states(self.centers))
        return states

    def _new_states(self, centers: Tensor) -> States:
        """Zero states where they belong, and the scales of centers that have one."""
        wanted = dict(self.rule.new_states(centers.to("meta")))
        if centers.dtype in FIRST_SCALE:
            wanted[CENTERS + SCALE] = torch.empty(len(centers), 1, device="meta")
        if self._moves is not None:
            wanted[AT_STEP] = torch.empty(len(centers), 1, dtype=torch.int32, device="meta")
        where = self._memory, self._device
        states = {
            name: zero_rows(name, one.shape, one.dtype, *where) for name, one in wanted.items()
        }
        if CENTERS + SCALE in states:
            states[CENTERS + SCALE].fill_(FIRST_SCALE[centers.dtype])
        return states

    def _working(self, row_n: Tensor | None, host_n: Tensor | None = None) -> Stored:
        """Centers and states to update: all of the rank, or compact ones of the rows."""
        compact = row_n is not None and self._memory.uses_host
        rows = RowSet.of(row_n, first_row=self._first_row, compact=compact)
        if row_n is not None and compact:
            tensors = dict(self._stage().open(self.steps, row_n, host_n))
            stored = Stored(tensors.pop(CENTERS), tensors, rows)
        else:
            stored = Stored(self.centers.detach(), self.states(), rows)
        if self._moves is None or not self._reads_newest:
            return stored
        newest = partial(unsampled.newest, self._moves, stored, self.workspace)
        return replace(stored, rows=replace(rows, newest=newest))

    @property
    def _reads_newest(self) -> bool:
        """Whether the passes bring rows up to the present step on their way, which costs a CPU less
        than to write them twice; a GPU has a kernel, and knows too late that a step changes
        nothing."""
        missed = self._moves is not None and self._moves.steps > 0
        return missed and self._device.type == "cpu" and self._plan.path == "torch"
