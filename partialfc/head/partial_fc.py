"""PartialFC: the softmax over class centers that are sharded over ranks and sampled every step.

https://arxiv.org/abs/2203.15565. The data flow, and where each part lives:

    gather (here) -> sample (sampling) -> positives and margin (loss, margins) -> logits in tiles
    (tiles) -> distributed softmax (push) -> gradients (loss, tiles) -> rows (rows)

Shape suffixes: b = rows of this rank's batch, B = rows of the gathered batch, C = rows of the
centers at hand, D = embedding, K = identities of a row, P = K * B, n = sampled rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from partialfc.distributed.copies import Copies
from partialfc.distributed.shares import Shares
from partialfc.head.across_copies import AcrossCopies
from partialfc.head.batch import Batch, Queries
from partialfc.head.centers import fill_initial_
from partialfc.head.checks import (
    refuse_batch,
    refuse_center_losses,
    refuse_other_kinds,
    refuse_sets,
    refuse_several,
    refuse_with_copies,
)
from partialfc.head.forgotten import Forgotten
from partialfc.head.gathering import Gathering
from partialfc.head.loss import MarginLoss, margin_loss
from partialfc.head.machine import machine_of
from partialfc.head.options import Kernels, Memory, Negatives, Precision, Sets, Several, check_fit
from partialfc.head.plan import Plan, decide
from partialfc.head.rows.formats import DTYPES
from partialfc.head.rows.optimizer import RowOptimizer
from partialfc.head.rows.rules import RowRule, RowSGD
from partialfc.head.rows.staging import zero_rows
from partialfc.head.rows.stored import CENTERS
from partialfc.head.sampling import KeyedSampler, Sample
from partialfc.head.set_masks import SetMasks
from partialfc.head.shard import Shard
from partialfc.head.sharding import Sharding, default_canonical_shards
from partialfc.head.steps import StepSamples
from partialfc.keyed import key
from partialfc.margins import Margin


class PartialFC(Shard):
    """The margin softmax loss of a global batch over the class centers of all ranks.

    Every rank constructs it with the same arguments. It works without torch.distributed too, as
    one rank. The loss and both gradients are exact for the sampled centers. It may be a part of a
    module that DistributedDataParallel wraps; see :class:`partialfc.head.shard.Shard`.

    Args:
        num_identities: C, over all ranks; >= 1.
        embedding_dim: D, >= 1.
        margin: What the logits are, e.g. ``ArcFace()``; see :mod:`partialfc.margins`.
        sample_rate: Fraction of the centers used per step, positives included, in (0, 1].
        optimizer: Update of the sampled centers.
        precision: Number formats of products and stored centers.
        memory: What may be kept, and where the rows lie between steps.
        kernels: What a GPU does faster at a price.
        positives: What rows of several identities, or of none, are to the loss; ``None``: every
            row has one.
        sets: Sets of identities that may have the same people, whom a row is not told from;
            ``None``: a row is told from all other identities.
        negatives: What a sampled one counts for: itself (``"uniform"``), or all that it was drawn
            among (``"weighted"``, and ``"nearest"`` or a ``Nearest``: near centers for certain).
            Without effect at a ``sample_rate`` of 1, where every center counts for itself.
        seed: Initial centers, negatives and rounding are functions of it and of global ids.
        center_weight: Of the mean of 1 - cos(theta) to the own center, added to the loss; >= 0.
        inter_class_weight: Of the mean cosine of the batch's centers and the nearest other sampled
            one of each, added to the loss; >= 0.
        canonical_shards: V, at least the largest world size that the run will ever have;
            ``None`` for a number that depends on ``num_identities`` alone, or for one a rank where
            there are more ranks than that.
        group: Process group; ``None`` for the default one.
        holders: Ranks of the group that hold the centers, of a small head; ``None`` for all.
        ranks_per_copy: Ranks that hold the centers together, which are then held several times
            (``copies.md``); ``None`` for all ranks.
        device: Where the centers live; ``None`` for torch's default device.

    Raises:
        TypeError: If margin or an option is of another type.
        ValueError: If a value is outside its range, or does not go with another.
    """

    def __init__(
        self,
        num_identities: int,
        embedding_dim: int,
        margin: Margin,
        *,
        sample_rate: float = 1.0,
        optimizer: RowRule | None = None,
        precision: Precision | None = None,
        memory: Memory | None = None,
        kernels: Kernels | None = None,
        positives: Several | None = None,
        sets: Sets | None = None,
        center_weight: float = 0.0,
        inter_class_weight: float = 0.0,
        negatives: Negatives = "uniform",
        seed: int = 2048,
        canonical_shards: int | None = None,
        group: dist.ProcessGroup | None = None,
        holders: range | None = None,
        ranks_per_copy: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        refuse_other_kinds(
            margin=margin,
            optimizer=optimizer,
            precision=precision,
            memory=memory,
            kernels=kernels,
            positives=positives,
            sets=sets,
        )
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be >= 1, got {embedding_dim}.")
        precision, memory = precision or Precision(), memory or Memory()
        kernels = kernels or Kernels()
        self.device = torch.empty(0, device=device).device
        check_fit(
            precision,
            memory,
            kernels,
            sample_rate=sample_rate,
            unit_centers=margin.unit_centers,
            margin=type(margin).__name__,
            device=self.device.type,
        )
        refuse_center_losses(margin, center_weight, inter_class_weight)
        refuse_several(positives, margin, max(center_weight, inter_class_weight))
        refuse_sets(sets, margin, num_identities)
        self.margin, self.several, self.sets = margin, positives, sets
        self.copies = Copies.of(group, ranks_per_copy)
        self.ranks, holding = self.copies.every, self.copies.within
        refuse_with_copies(self.copies.count, holders, overlap=kernels.overlap)
        if canonical_shards is None:
            canonical_shards = default_canonical_shards(num_identities, self.ranks.size)
        self.sharding = Sharding(
            num_identities=num_identities,
            canonical_shards=canonical_shards,
            world_size=holding.size,
            holders=holders,
        )
        self.owned = self.sharding.owned(holding.rank)
        self.embedding_dim, self.seed = embedding_dim, seed
        self.centers_per_identity = margin.centers_per_identity
        for name, value in margin.new_state(num_identities).items():
            self.register_buffer(f"margin_{name}", torch.tensor(value, device=self.device))
        rule = optimizer or RowSGD()
        self.compute, self.center_format = precision.compute, precision.center_format
        self.reduce_dtype = DTYPES[precision.reduce_format]
        self.plan = self._decide(rule, weighted=negatives != "uniform", fused=kernels.fused)
        self.sampler = KeyedSampler(
            self.sharding,
            holding.rank,
            sample_rate=sample_rate,
            seed=seed,
            negatives=negatives,
            nearest=self._nearest_of(negatives, sample_rate),
        )
        size = len(self.owned_rows), embedding_dim + margin.bias
        centers = zero_rows(CENTERS, size, DTYPES[self.center_format], memory, self.device)
        fill_initial_(centers, self.owned_rows, seed=seed, device=self.device)
        if margin.bias:
            centers[:, -1] = 0
        self.memory, self.keep_bytes = memory, memory.keep_bytes(self.device.type)
        self.draws_ahead = memory.uses_host or (sample_rate < 1 and self.device.type == "cuda")
        """Whether a step is faster for a ``sample_step`` ahead."""
        self.optimizer = RowOptimizer(
            nn.Parameter(centers, requires_grad=False),
            rule,
            first_row=self.owned_rows.start,
            seed=seed,
            memory=memory,
            device=self.device,
            plan=self.plan,
            overlap=kernels.overlap,
            every_row=sample_rate == 1,
            across=self.copies.across,
        )
        self._gathering = Gathering(
            self.copies, num_identities, positives, binary=margin.binary, device=self.device
        )
        self._samples = StepSamples(
            self._gathering, self.sampler, self.centers_per_identity, self.device
        )
        self.optimizer.register_load_state_dict_post_hook(lambda _: self.loaded())
        self._masks = SetMasks(sets, self.owned, self.centers_per_identity, self.device)
        self._forgotten = Forgotten()
        self.center_weight, self.inter_class_weight = center_weight, inter_class_weight
        self.terms: dict[str, Tensor] = {}
        """Losses beside the softmax in the last forward pass, without their weights."""

    def extra_repr(self) -> str:
        """Sizes for ``print(head)``."""
        return (
            f"num_identities={self.sharding.num_identities}, "
            f"embedding_dim={self.embedding_dim}, owned={self.owned}, margin={self.margin}"
        )

    @_disable_dynamo
    def sample_step(
        self, identities: Tensor, shares: Shares | None = None, *, ahead: bool = False
    ) -> None:
        """Fix the sample of this step, or of the next, from the identities of its micro-batches.

        With gradient accumulation, N micro-batches after this call use the centers that one batch
        of all of them would use; without it each uses its own positives. Collective: one
        all-gather, two where there are more than the last time. Holds until the next
        ``optimizer.step()``.

        ``ahead``: before the forward pass of the present step, with the identities of the next one.
        Its centers are drawn, and brought from host memory, beside the present step, and no
        host waits for a GPU. To fix that step again, when it has come, does nothing.

        Args:
            identities: int64 [any] or [any, K], this rank's, as many on every rank; -1 also where
                a weight is 0. On any device.
            shares: The numbers of all ranks where they differ.
            ahead: Whether they are of the next step.

        Raises:
            ValueError: If there is an unknown one, ahead in the next forward pass; if the number is
                another: on a GPU, a device-side assertion fails instead.
        """
        self.find_neighbours()
        step = self.optimizer.steps + ahead
        if self.begins_with_search(step) if ahead else self._samples.was_ahead(step):
            return
        draw = self._samples.fix(step, identities, shares, ahead=ahead)
        if ahead:
            self.optimizer.prefetch(lambda: draw().host_n)

    @_disable_dynamo
    def prefetch(self, identities: Tensor, shares: Shares | None = None) -> None:
        """Begin to bring the rows of the next step from host memory; a no-op where none are there.

        Optional, and changes no result: unlike :meth:`sample_step` ahead, the next step may have
        other identities. Collective where rows are in host memory: as that.

        Args:
            identities: int64 [any] or [any, K], this rank's of the next step, as many on every
                rank.
            shares: The numbers of all ranks where they differ.
        """
        if self.memory.uses_host:
            draw = self._samples.begin(self.optimizer.steps + 1, identities, shares)
            self.optimizer.prefetch(lambda: draw().host_n)

    # The sampler is integers on the host, and the optimizer's step is among its keys.
    @_disable_dynamo
    def forward(
        self,
        embeddings: Tensor,
        identities: Tensor,
        shares: Shares | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss over the global batch, fp32, the same on all ranks.

        Collective: one all-gather of [b + 1, D] operands, one all-reduce of [2B], and one
        reduce-scatter of [B, D] in ``reduce_format`` where gradients are wanted; backward has none.
        One all-gather more where the batch is larger than the last one, and one of [D] in the very
        first pass. One all-reduce of [B] more for logits above 64, and one for a margin that needs
        the positives first; a margin that follows the norm and label smoothing make the all-reduce
        of [2B] longer by [B] and [2B]. The losses beside the softmax have their own; see
        :mod:`partialfc.head.center_losses`. With K identities a row, [2B] is [B + K * B], and [B]
        of the norm [K * B]. Several copies of the centers add two all-gathers and one all-reduce,
        and one all-gather for a margin that learns.

        ``embeddings.grad`` is the world size times the exact gradient, so that the mean over
        ranks that DistributedDataParallel takes is exact.

        A GPU is waited for once, for a sample that :meth:`sample_step` has not fixed.

        A margin's moving averages move with every forward pass that wants a gradient and has a
        finite loss, micro-batches included, even if a GradScaler then skips the step.

        Args:
            embeddings: [b, D] of this rank, any float dtype, any length; b equal on all ranks.
            identities: int64 [b], global, in [0, C), on any device. With ``positives``, [b] or
                [b, K], or fewer than K: -1 is none, one that is named twice counts once.
            shares: b of every rank where it is not equal. The loss is the mean over all rows still.
            weights: >= 0, of the shape of ``identities``, for the loss ``"soft"`` and no other. A
                weight of 0 is as no identity; those of one identity are added.

        It is not compiled: ``torch.compile`` leaves the head as it is.

        Raises:
            ValueError: If a shape, a dtype, a device or an identity is wrong, or was not given to
                :meth:`sample_step`; if b is not equal, or not its share; if centers are copies of
                another rank's; if nobody calls ``optimizer.step()``.
        """
        dim, device = self.embedding_dim, self.device
        refuse_batch(embeddings, identities, weights, self.several, dim=dim, device=device)
        # The anchor makes backward reach the centers where the embeddings want no gradient.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        if anchor.requires_grad:
            self._forgotten.look(embeddings, self.optimizer.micro_batches)
        with torch.autocast(embeddings.device.type, enabled=False):
            with torch.no_grad():
                batch = self._gather(
                    embeddings, identities, shares, weights, want_gradient=anchor.requires_grad
                )
                outcome = margin_loss(batch)
                self.terms = outcome.terms
                self._learn(outcome)
            loss: Tensor = MarginLoss.apply(  # type: ignore[no-untyped-call]
                embeddings, anchor, outcome, self.optimizer.add_micro_batch
            )
        return loss

    def _gather(
        self,
        embeddings: Tensor,
        identities: Tensor,
        shares: Shares | None,
        weights: Tensor | None,
        *,
        want_gradient: bool,
    ) -> Batch:
        """Gather the global batch, refuse what is no identity of it, and sample its centers."""
        margin, optimizer = self.margin, self.optimizer
        self.refuse_broadcast()
        self.find_neighbours()
        state = {name: value.clone() for name, value in self.margin_state().items()}
        queries = Queries.of(embeddings, margin, state, self.compute)
        norms_b = queries.norm_b if margin.needs_norms else None
        shares = self.copies.shares(shares)
        of_ranks = shares or Shares((len(embeddings),) * self.copies.within.size)
        fraction = self._samples.fraction(optimizer.steps, sum(of_ranks.sizes))
        gathered = self._gathering.batch(
            queries.query_bD, identities, weights, norms_b, shares, fraction
        )
        sample = self.sample(gathered.identities_P, gathered.every_P)
        centers_CD, rows = optimizer.open(sample.rows, sample.host_n)
        return Batch(
            queries=queries,
            query_BD=gathered.query_BD,
            norm_B=gathered.norm_B,
            centers_CD=centers_CD,
            rows=rows,
            labels=gathered.labels,
            mask=self._masks(gathered.identities_P, gathered.labels.most, sample.host_n),
            target_P=sample.target_B,
            log_weight_n=sample.log_weight_n,
            margin=margin,
            state=state,
            step=optimizer.steps,
            draw_key=key(self.seed, "margin", optimizer.steps, optimizer.micro_batches),
            center_weight=self.center_weight,
            inter_class_weight=self.inter_class_weight,
            compute=self.compute,
            reduce_dtype=self.reduce_dtype,
            path=self.plan.path,
            ranks=self.copies.within,
            shares=of_ranks,
            across_copies=AcrossCopies(self.copies.across, len(gathered.query_BD)),
            want_gradient=want_gradient,
            want_pull=want_gradient and embeddings.requires_grad,
            keep_bytes=self.keep_bytes - optimizer.kept_bytes if want_gradient else 0,
            workspace=optimizer.workspace,
        )

    def sample(self, identities_P: Tensor, every_P: Tensor | None = None) -> Sample:
        """Return the sampled rows of this step, and the first row of each positive's identity."""
        return self._samples(self.optimizer.steps, identities_P, every_P)

    def _decide(self, rule: RowRule, *, weighted: bool, fused: bool) -> Plan:
        """Return which code computes this head; refuse the fused kernels where they cannot."""
        plan = decide(
            machine_of(self.device),
            dim=self.embedding_dim,
            unit_centers=self.margin.unit_centers,
            centers_per_identity=self.margin.centers_per_identity,
            binary=self.margin.binary,
            positives=1 if self.several is None else self.several.most,
            sets=self.sets is not None,
            weighted=weighted,
            sgd=type(rule) is RowSGD,  # a kernel knows nothing of a subclass's update
            compute=self.compute,
            fp8=self.center_format == "fp8",
            fused=fused,
            copies=self.copies.count > 1,
        )
        plan.refuse(fused=fused)
        return plan
