"""The samples of a head's steps: drawn on the host, if it can beside the step before.

A sample has a size, which the host must know before it can start a GPU on anything behind it. It
follows from identities, which the host has when a batch is fetched. So those of the next step are
gathered on a stream of their own, a thread draws its centers while the present step goes on, and
nothing waits. Where identities are first heard of in a forward pass, that pass waits for the GPU,
once.

Shape suffixes: B = rows of the gathered batch, K = identities of a row, n = sampled rows, P = K * B
pairs of a row and one of its identities.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from partialfc.distributed.shares import Shares
from partialfc.head.centers import expand
from partialfc.head.gathering import Gathering
from partialfc.head.sampling import NOT_LOCAL, KeyedSampler, Sample, refuse_unfixed
from partialfc.pinned import to_device, to_host


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """The sample of a step, or of a batch; each tensor is on the host until :meth:`to`.

    Attributes:
        identities_P: int64 ones that it was drawn for, ascending; -1 is none.
        rows: int64 [n] sampled rows of the shard, ascending; ``None`` for all in order.
        log_weight_n: As in :class:`~partialfc.head.sampling.Sample`.
        host_n: ``rows`` on the host.
        count: Rows of the global batch.
        fraction: Of them that name any identity; ``None`` where all do.
    """

    identities_P: Tensor
    rows: Tensor | None
    log_weight_n: Tensor | None
    host_n: Tensor | None
    count: int
    fraction: Tensor | None = None

    def to(self, device: torch.device) -> "Drawn":
        """Return it on a device, as :func:`partialfc.pinned.to_device`."""

        def there(value: Tensor | None) -> Tensor | None:
            return None if value is None else to_device(value, device)

        return replace(
            self,
            identities_P=to_device(self.identities_P, device),
            rows=there(self.rows),
            log_weight_n=there(self.log_weight_n),
            fraction=there(self.fraction),
        )


class StepSamples:
    """Draws the samples of a head.

    Args:
        gathering: Of the head.
        sampler: Draws identities of this rank; from a thread too.
        per_identity: Rows of an identity.
        device: Of the head.
    """

    def __init__(
        self, gathering: Gathering, sampler: KeyedSampler, per_identity: int, device: torch.device
    ) -> None:
        self._gathering, self.sampler, self._per_identity = gathering, sampler, per_identity
        self._device, self._owned, self._every = device, sampler.owned, sampler.every
        self._fixed: dict[int, Callable[[], Drawn]] = {}
        self._ahead: set[int] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._stream: Any = None
        if device.type == "cuda":
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="sample")
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, step: int, identities: Tensor, shares: Shares | None) -> Callable[[], Drawn]:
        """Gather the identities of a step; return a function that returns its sample, drawn.

        On a GPU both happen beside all else. Collective: one all-gather, or two.

        Args:
            step: Optimizer steps taken before it.
            identities: int64 [any] or [any, at most K] of this rank, on any device.
            shares: The numbers of all ranks where they differ.
        """
        with self._on_own_stream(identities):
            arrived = to_host(self._gathering.step(identities, shares))

        def draw() -> Drawn:
            identities_P, fraction = self._gathering.names(arrived())
            return self._drawn(step, identities_P, fraction)

        return cache(draw) if self._thread is None else self._thread.submit(draw).result

    def fix(
        self, step: int, identities: Tensor, shares: Shares | None, *, ahead: bool
    ) -> Callable[[], Drawn]:
        """Let a step, and all its micro-batches, have the sample of these; as :meth:`begin`.

        Args:
            step: As there, as the others.
            ahead: Whether the step is still to come: nobody waits for its sample yet.
        """
        draw = self.begin(step, identities, shares)
        self._fixed = {other: one for other, one in self._fixed.items() if other >= step - 1}
        self._fixed[step] = cache(lambda: draw().to(self._device))
        self._ahead &= self._fixed.keys()
        if ahead:
            self._ahead.add(step)
        else:
            self.fixed(step)
        return draw

    def forget(self) -> None:
        """Forget what is fixed: another state has been loaded, whose steps are not these."""
        self._fixed.clear()
        self._ahead.clear()

    def was_ahead(self, step: int) -> bool:
        """Whether a step was fixed ahead; says so once."""
        was = step in self._ahead
        self._ahead.discard(step)
        return was

    def fixed(self, step: int) -> Drawn | None:
        """Return the sample of a step on the device, if it was fixed.

        Raises:
            ValueError: If one of its identities is unknown.
        """
        there = self._fixed.get(step)
        return None if there is None else there()

    def fraction(self, step: int, count: int) -> Tensor | None:
        """Return the fraction of the rows of a step that name any, for a part with ``count`` rows.

        ``None`` where all do, and for a batch that is no part of a step.
        """
        drawn = self.fixed(step)
        return None if drawn is None or drawn.count == count else drawn.fraction

    def __call__(self, step: int, identities_P: Tensor, every_P: Tensor | None = None) -> Sample:
        """Return the sample of a batch: that of its step, or one of its own; on the device.

        Args:
            step: Optimizer steps taken before it.
            identities_P: int64 [P], whose targets are wanted.
            every_P: Those of the batches of all copies of the centers, whom the sample is for;
                ``None`` for the same.

        Raises:
            ValueError: If it has an identity that the sample of its step was not fixed for.
        """
        every_P = identities_P if every_P is None else every_P
        drawn = self.fixed(step)
        if drawn is not None:
            refuse_unfixed(every_P, drawn.identities_P)
        elif not self._every:
            drawn = self._drawn(step, every_P.cpu(), None).to(self._device)  # host sync
        if drawn is None:
            return Sample(None, self._targets(identities_P, None))
        target_P = self._targets(identities_P, drawn.rows)
        return Sample(drawn.rows, target_P, drawn.log_weight_n, drawn.host_n)

    def _drawn(self, step: int, identities_P: Tensor, fraction: Tensor | None) -> Drawn:
        sample = expand(self.sampler(step, identities_P), self._per_identity)
        count = len(identities_P) // self._gathering.most
        known_P = identities_P.sort().values
        return Drawn(known_P, sample.rows, sample.log_weight_n, sample.rows, count, fraction)

    def _targets(self, identities_P: Tensor, rows: Tensor | None) -> Tensor:
        """Place of the first row of each identity among the sampled, or ``NOT_LOCAL``."""
        local_P = identities_P - self._owned.start if self._owned.start else identities_P
        is_local_P = (local_P >= 0) & (local_P < len(self._owned))
        row_P = local_P * self._per_identity if self._per_identity > 1 else local_P
        place_P = row_P if rows is None else torch.searchsorted(rows, row_P)
        return torch.where(is_local_P, place_P, NOT_LOCAL)

    def _on_own_stream(self, identities: Tensor) -> contextlib.AbstractContextManager[Any]:
        """On a GPU, a stream for what must not wait for the step before."""
        if self._stream is None:
            return contextlib.nullcontext()
        if identities.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            identities.record_stream(self._stream)
        return torch.cuda.stream(self._stream)
