"""The step of a softmax over all centers as others publish it, beside ours in the same rows.

``compiled`` is the textbook head by torch.compile. ``liger`` is the fused linear cross-entropy of
Liger-Kernel as it comes, ``liger_chunks`` the same with a quarter of the batch at once instead of
the few rows that its rule for language models gives at D = 512. ``cut_cross_entropy`` is Apple's,
``cut_cross_entropy_filtered`` the same as it comes, which leaves small gradients out: not ours, for
with a million identities these are the repulsion of the negatives. Packages are imported by name
when a row wants them; pip install liger-kernel cut-cross-entropy.

Centers are fp32, normalised and cast by autograd at every step, updated by torch's fused SGD: what
a program has to do around such a loss.

Shape suffixes: B = rows of the batch, C = classes, D = embedding.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of queries [B, D] times the scale, keys [C, D] and identities int64 [B]; the mean over B."""


class AbsentError(Exception):
    """This row cannot have this head here, and that is no failure: the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a baseline is made for."""

    classes: int
    batch: int
    dim: int
    dtype: torch.dtype
    """Of the products."""
    angular: float
    """ArcFace's m; 0: no margin."""


class Baseline(nn.Module):
    """Fp32 centers, one of the losses, and torch.optim.SGD."""

    def __init__(
        self, loss: Loss, size: Size, scale: float, rule: dict[str, Any], device: torch.device
    ) -> None:
        super().__init__()
        centers_CD = torch.empty(size.classes, size.dim, device=device).normal_(0, 0.01)
        self.centers = nn.Parameter(centers_CD)
        self.optimizer = torch.optim.SGD([self.centers], fused=True, **rule)
        self.sampled = None
        self._loss, self._scale, self._dtype = loss, scale, size.dtype

    def step(self, embeddings_BD: Tensor, identities_B: Tensor) -> Tensor:
        """Forward, backward to the embeddings' gradient and the update of the centers; the loss."""
        query_BD = (F.normalize(embeddings_BD) * self._scale).to(self._dtype)
        loss = self._loss(query_BD, F.normalize(self.centers).to(self._dtype), identities_B)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def baseline(
    name: str, size: Size, scale: float, rule: dict[str, Any], device: torch.device
) -> Baseline:
    """Return the head of a name of :data:`BASELINES`.

    Raises:
        AbsentError: If its package is missing, or it has no such margin.
    """
    try:
        loss = BASELINES[name](size, scale)
    except ImportError as error:
        raise AbsentError(f"{type(error).__name__}: {error}") from error
    return Baseline(loss, size, scale, rule, device)


def _compiled(size: Size, scale: float) -> Loss:
    if torch.version.cuda is None:
        raise AbsentError("this torch compiles for no GPU")

    def loss(query_BD: Tensor, key_CD: Tensor, identities_B: Tensor) -> Tensor:
        logit_BC = F.linear(query_BD, key_CD).float()
        if size.angular:
            place_B1 = identities_B.unsqueeze(1)
            cosine_B1 = (logit_BC.gather(1, place_B1).detach() / scale).clamp(-1, 1)
            moved_B1 = (cosine_B1.acos() + size.angular).cos() - cosine_B1  # straight-through
            logit_BC = logit_BC.scatter_add(1, place_B1, moved_B1 * scale)
        return F.cross_entropy(logit_BC, identities_B)

    compiled: Loss = torch.compile(loss, dynamic=False)
    return compiled


def _liger(size: Size, scale: float) -> Loss:
    _without_margin(size)
    whole = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda query_BD, key_CD, identities_B: whole(key_CD, query_BD, identities_B)


def _liger_chunks(size: Size, scale: float) -> Loss:
    _without_margin(size)
    name = "liger_kernel.ops.fused_linear_cross_entropy"
    function = import_module(name).LigerFusedLinearCrossEntropyFunction
    parameters = [*inspect.signature(function.forward).parameters.values()][1:]
    defaults = {one.name: one.default for one in parameters}
    if "chunk_mem_const" not in defaults:
        raise AbsentError("this liger_kernel has one size of chunks")
    defaults["chunk_mem_const"] = max(1, size.classes // (4 * size.dim))

    def loss(query_BD: Tensor, key_CD: Tensor, identities_B: Tensor) -> Tensor:
        given = {"_input": query_BD, "weight": key_CD, "target": identities_B}
        found: Tensor = function.apply(*(defaults | given).values())[0]
        return found

    return loss


def _cut(size: Size, scale: float) -> Loss:
    _without_margin(size)
    whole = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda *given: whole(*given, filter_eps=None)


def _cut_filtered(size: Size, scale: float) -> Loss:
    _without_margin(size)
    whole: Loss = import_module("cut_cross_entropy").linear_cross_entropy
    return whole


def _without_margin(size: Size) -> None:
    if size.angular:
        raise AbsentError("it has no margin: --margin normalized_softmax")


BASELINES: dict[str, Callable[[Size, float], Loss]] = {
    "liger_chunks": _liger_chunks,
    "cut_cross_entropy": _cut,
    "compiled": _compiled,
    "liger": _liger,
    "cut_cross_entropy_filtered": _cut_filtered,
}
"""Name -> what makes its loss of a size and a scale; raises ImportError or AbsentError."""
