"""The heads of a run: which rows of a batch each of them trains on, and one call for all.

A run without ``[heads]`` has one, called "", which has every row. Which rows are a named head's
follows from the settings alone, so all ranks know the numbers of each other without a word.

Shape suffixes: b = images of this rank, B = of a global batch, h = those of one head, D =
embedding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from partialfc.config import Config, ConfigError
from partialfc.config.heads import each_head, rows_of_heads
from partialfc.distributed.ranks import Ranks
from partialfc.distributed.shares import Shares
from partialfc.head import PartialFC
from partialfc.head.options import Sets


@dataclass(frozen=True, slots=True)
class Numbering:
    """How a head numbers the identities of a run: those of its sets, one set after the other.

    Attributes:
        spans: Identities of the run of each set.
        sets: Which of the sets may have the same people unknown; ``None`` if none may.
        most: K, the most identities of one of its images; ``None`` where each has one.
    """

    spans: tuple[range, ...]
    sets: Sets | None = None
    most: int | None = None

    @property
    def count(self) -> int:
        """Identities of the head."""
        return sum(map(len, self.spans))

    def __call__(self, identities: Tensor) -> Tensor:
        """Return int64 numbers of the head for those of the run, of any shape.

        -1 stays; an identity of no set of the head is ``count``, which every head refuses.
        """
        found, first = torch.full_like(identities, self.count), 0
        for span in self.spans:
            inside = (identities >= span.start) & (identities < span.stop)
            found = torch.where(inside, identities + (first - span.start), found)
            first += len(span)
        return torch.where(identities < 0, identities, found)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a head among the images of a step or of a micro-batch.

    Attributes:
        own_h: int64 places among this rank's images, on the host; ``None`` for all of them.
        there_h: The same on the device.
        shares: Rows of every rank; ``None`` where all have the same number.
        factor: What makes the mean over micro-batches the mean over the rows of all of them.
    """

    own_h: Tensor | None
    there_h: Tensor | None
    shares: Shares | None
    factor: float = 1.0

    def of(self, value: Tensor) -> Tensor:
        """Return the rows of a tensor [b, ...], which is on the host or on the device."""
        own_h = self.there_h if value.is_cuda else self.own_h
        return value if own_h is None else value.index_select(0, own_h)


@dataclass(frozen=True, slots=True)
class Route:
    """How a head takes part in a step.

    Attributes:
        config: The settings as if it were the only head.
        weight: Of its loss in the sum.
        step: Its rows of the whole step.
        parts: Those of each micro-batch.
    """

    config: Config
    weight: float
    step: Rows
    parts: tuple[Rows, ...]


class Heads(Mapping[str, PartialFC]):
    """The heads of a run by name, which take every step together.

    Args:
        heads: At least one; all on the same ranks and device.
        numberings: Of each of several heads.
    """

    def __init__(
        self, heads: Mapping[str, PartialFC], numberings: Mapping[str, Numbering] | None = None
    ) -> None:
        self._heads, self._numberings = dict(heads), dict(numberings or {})
        self._routed: tuple[Config, dict[str, Route]] | None = None

    def __getitem__(self, name: str) -> PartialFC:
        return self._heads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    @property
    def only(self) -> PartialFC:
        """The head of a run that has one.

        Raises:
            ConfigError: If it has several.
        """
        if len(self) > 1:
            raise ConfigError(
                f"the run has the heads {', '.join(self)}, and this is for runs with one head."
            )
        return next(iter(self._heads.values()))

    @property
    def ranks(self) -> Ranks:
        """Those that share all heads."""
        return next(iter(self._heads.values())).ranks

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far."""
        return next(iter(self._heads.values())).optimizer.steps

    def routes(self, config: Config) -> dict[str, Route]:
        """Return how each head takes part in the steps of these settings."""
        if self._routed is None or self._routed[0] is not config:
            self._routed = config, self._route(config)
        return self._routed[1]

    @property
    def draw_ahead(self) -> bool:
        """Whether a step should be drawn before it comes; see :meth:`PartialFC.sample_step`."""
        return any(head.draws_ahead for head in self.values())

    def sample_step(self, config: Config, identities: Tensor, *, ahead: bool = False) -> None:
        """Fix the samples of this step, or of the next; see :meth:`PartialFC.sample_step`.

        Args:
            config: Settings of the run.
            identities: int64 [b] of the run, of all micro-batches of this rank; or [b, K]. On any
                device.
            ahead: Whether they are of the next step: then only for heads that profit.
        """
        for name, route in self.routes(config).items():
            if self[name].draws_ahead or not ahead:
                own_h = self.numbered(name, route.step.of(identities))
                self[name].sample_step(own_h, route.step.shares, ahead=ahead)

    def loss(
        self,
        config: Config,
        part: int,
        embeddings: Tensor,
        identities: Tensor,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the heads' losses, and its terms. Collective: as each head.

        Args:
            config: Settings of the run.
            part: Number of the micro-batch.
            embeddings: [b, D] of this rank's micro-batch.
            identities: int64 [b] of the run, or [b, K].
            weights: Of the identities, for the heads whose loss is ``"soft"``.

        Returns:
            loss: Of the micro-batch, fp32, the same on all ranks; the mean over the micro-batches
                of a step is that of the step.
            terms: Without weights; of several heads each one's loss by its name, and what is in it
                besides as "name_term".
        """
        total: Tensor | None = None
        terms: dict[str, Tensor] = {}
        for name, route in self.routes(config).items():
            rows, head = route.parts[part], self[name]
            own_h, weight_h = self.numbered(name, rows.of(identities)), None
            if weights is not None and head.several is not None and head.several.loss == "soft":
                weight_h = self._columns(name, rows.of(weights))
            loss: Tensor = head(rows.of(embeddings), own_h, rows.shares, weight_h)
            if not name:
                return loss, head.terms
            loss = loss if rows.factor == 1 else loss * rows.factor
            terms[name] = loss.detach()
            terms |= {f"{name}_{key}": value * rows.factor for key, value in head.terms.items()}
            loss = loss if route.weight == 1 else loss * route.weight
            total = loss if total is None else total + loss
        assert total is not None
        return total, terms

    def numbered(self, name: str, identities: Tensor) -> Tensor:
        """Return a head's numbers for identities of the run; see :class:`Numbering`."""
        numbering = self._numberings.get(name) if name else None
        return identities if numbering is None else numbering(self._columns(name, identities))

    def _columns(self, name: str, value: Tensor) -> Tensor:
        """What a head's images may have of [h, K]; another head's may have more."""
        several = self[name].several
        if value.ndim == 1:
            return value
        return value[:, 0] if several is None else value[:, : several.most]

    def _route(self, config: Config) -> dict[str, Route]:
        ranks, routes = self.ranks, {}
        for name, is_own_B in rows_of_heads(config).items():
            one = each_head(config)[name]
            shares, parts = config.shares(ranks.size), config.optimizer.accumulation
            device = self[name].device
            if is_own_B is None:
                uneven = config.uneven_shares(ranks.size)
                each = Rows(None, None, uneven and uneven.of_each(parts))
                routes[name] = Route(one, 1.0, Rows(None, None, uneven), (each,) * parts)
                continue
            of_ranks = [is_own_B[shares.rows(rank)] for rank in range(ranks.size)]
            cut = [np.split(own_b, parts) for own_b in of_ranks]
            every = int(is_own_B.sum())
            routes[name] = Route(
                one,
                dict(config.heads)[name].weight,
                _rows(of_ranks, ranks.rank, every, device),
                tuple(
                    _rows([own[part] for own in cut], ranks.rank, every / parts, device)
                    for part in range(parts)
                ),
            )
        return routes


def _rows(of_ranks: list[NDArray[np.bool_]], rank: int, mean: float, device: torch.device) -> Rows:
    """The rows of a head where all ranks have these images; ``mean`` is their mean number."""
    shares = Shares(tuple(int(own_b.sum()) for own_b in of_ranks))
    uneven, factor = None if shares.equal else shares, sum(shares.sizes) / mean
    if all(own_b.all() for own_b in of_ranks):
        return Rows(None, None, uneven, factor)
    own_h = torch.from_numpy(np.flatnonzero(of_ranks[rank]))
    return Rows(own_h, own_h.to(device), uneven, factor)
