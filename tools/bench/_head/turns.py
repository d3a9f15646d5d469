"""Heads that take turns in one process: seconds, memory, and those that fail alone.

Shape suffixes: b = rows of this rank's batch, D = embedding.
"""

import errno
import gc
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tools.bench._head.baselines import AbsentError
from tools.bench._head.ceilings import over_ranks, timed
from tools.bench._head.memory import Memory, bytes_of, stored_tensors

Step = Callable[[Tensor, Tensor], Tensor]


class LostError(Exception):
    """After a head failed, its device answers no more: this process can measure nothing else."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


@dataclass(slots=True, kw_only=True)
class Turn:
    """A head, and what its turns have found so far."""

    head: Any
    step: Step
    construction: float
    """Seconds."""
    held: int
    """Bytes of the allocator that are this head's between its steps."""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of the process on its cores: what others do on the machine is not in it."""
    loss: float = 0.0
    extra: int = 0
    """Most bytes in a counted step beyond centers and states, where memory is exact."""
    beside: int = 0
    """Bytes that were not this head's in that step."""


class Turns:
    """The heads of a case; one that fails leaves, with what it said, and the others go on.

    With several ranks a failure ends the process: the other ranks wait for it.

    Attributes:
        heads: Those that have not failed.
        failed: Of the others: ``skipped`` with the reason, or ``out_of_memory`` or ``failed`` with
            the message, and the bytes that were held beside.
    """

    def __init__(
        self,
        names: Sequence[str],
        build: Callable[[str], tuple[Any, Step]],
        device: torch.device,
        memory: Memory | None = None,
    ) -> None:
        self.device, self.memory = device, memory or Memory(device)
        self.heads: dict[str, Turn] = {}
        self.failed: dict[str, dict[str, Any]] = {}
        for name in names:
            self._attempt(name, "construction", partial(self._build, name, build))

    def take(
        self,
        embeddings_bD: Tensor,
        identities_b: Tensor,
        *,
        counted: bool,
        following_b: Tensor | None = None,
    ) -> None:
        """One step of each head, in turn; collective.

        ``following_b`` are the identities of the next one, on the host: a head that is faster for
        them draws its centers beside this step, as in a training.
        """
        for name in [*self.heads]:
            run = partial(self._step, name, embeddings_bD, identities_b, counted, following_b)
            self._attempt(name, "a step", run)

    def results(self) -> dict[str, dict[str, Any]]:
        """What was found of each head, failed ones included; collective."""
        found: dict[str, dict[str, Any]] = {}
        for name in [*self.heads]:
            turn = self.heads[name]
            if not math.isfinite(turn.loss):
                self.failed[name] = {"failed": f"its loss is {turn.loss}", "at": "a step"}
                del self.heads[name]
                continue
            centers, states = (bytes_of(tensors) for tensors in stored_tensors(turn.head))
            found[name] = {
                "construction_seconds": turn.construction,
                "step_seconds": percentiles(turn.seconds),
                "centers_bytes": int(over_ranks(centers, "SUM", self.device)),
                "state_bytes": int(over_ranks(states, "SUM", self.device)),
                "last_loss": turn.loss,
            }
            if self.device.type == "cpu":
                found[name]["step_cpu_seconds"] = percentiles(turn.cpu_seconds)
            if self.memory.is_exact:
                found[name] |= {
                    "extra_peak_bytes": int(over_ranks(turn.extra, "MAX", self.device)),
                    "extra_peak_bytes_all_ranks": int(over_ranks(turn.extra, "SUM", self.device)),
                    "baseline_bytes": int(over_ranks(turn.beside, "MAX", self.device)),
                    "stored_bytes": int(over_ranks(centers + states, "MAX", self.device)),
                    "peak_was_reset": True,
                }
        return found | self.failed

    def _build(self, name: str, build: Callable[[str], tuple[Any, Step]]) -> None:
        gc.collect()
        before = self.memory.now()
        seconds, (head, step) = timed(self.device, build, name)
        self.heads[name] = Turn(
            head=head,
            step=step,
            construction=over_ranks(seconds, "MAX", self.device),
            held=self.memory.now() - before,
        )

    def _step(
        self,
        name: str,
        embeddings_bD: Tensor,
        identities_b: Tensor,
        counted: bool,
        following_b: Tensor | None,
    ) -> None:
        turn, memory = self.heads[name], self.memory
        own_bD = embeddings_bD.clone().requires_grad_()
        before = 0
        if memory.is_exact:
            before = memory.now()
            memory.reset()

        def step() -> Tensor:
            if following_b is not None and getattr(turn.head, "draws_ahead", False):
                turn.head.sample_step(following_b, ahead=True)
            return turn.step(own_bD, identities_b)

        started = time.process_time()
        seconds, loss = timed(self.device, step)
        cpu_seconds = time.process_time() - started
        peak = memory.peak() if memory.is_exact else 0
        turn.loss, loss, own_bD.grad = float(loss), None, None
        if counted:
            turn.seconds.append(over_ranks(seconds, "MAX", self.device))
            turn.cpu_seconds.append(over_ranks(cpu_seconds, "MAX", self.device))
        if not memory.is_exact:
            return
        if counted:
            beside = before - turn.held
            extra = peak - beside - sum(bytes_of(kept) for kept in stored_tensors(turn.head))
            if extra >= turn.extra:
                turn.extra, turn.beside = extra, beside
        turn.held += memory.now() - before

    def _attempt(self, name: str, at: str, run: Callable[[], None]) -> None:
        why: str | None = None
        try:
            run()
        except AbsentError as error:
            self.failed[name] = {"skipped": str(error)}
        except Exception as error:
            if dist.is_initialized():
                raise
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            kind = "out_of_memory" if _is_out_of_memory(error) else "failed"
            if kind == "failed":
                traceback.print_exc()
        if why is None:
            return
        # Here the frames of the error are gone, and with them what they held.
        self.heads.pop(name, None)
        gc.collect()
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise LostError(name, why) from error
        beside = sum(turn.held for turn in self.heads.values())
        self.failed[name] = {kind: why, "at": at, "beside_bytes": beside}


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the usual percentiles and the number of values."""
    names = {"min": 0, "p10": 10, "p25": 25, "median": 50, "p75": 75, "p90": 90, "max": 100}
    found = {name: float(np.percentile(values, percent)) for name, percent in names.items()}
    return {**found, "steps": len(values)}


def _is_out_of_memory(error: Exception) -> bool:
    """A GPU's allocator has a class for it, that of the CPU only words, a mapping a number."""
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or getattr(error, "errno", None) == errno.ENOMEM
        or "can't allocate memory" in str(error)
    )
