"""Their tensors into a live model of ours, on any number of ranks.

Shape suffixes: C = identities of one of their shards, D = embedding.
"""

import torch
from torch import Tensor, nn

from partialfc.commands._convert_checkpoint.layouts import Layout, RankCenters, States, rows_of
from partialfc.config import ConfigError
from partialfc.errors import ForeignError
from partialfc.head import PartialFC
from partialfc.head.rows.rules import RowAdamW
from partialfc.model.build import Model

_CENTER_STATES = {
    "momentum_buffer": "momentum",
    "exp_avg": "first_moment",
    "exp_avg_sq": "second_moment",
}


_STATES = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
}
"""What is taken over of a weight, by the optimizer that goes on."""


def fill(model: Model, layout: Layout, step: int) -> None:
    """Put what was found into a freshly built model. No collective.

    Args:
        model: Of the pack that training goes on with.
        layout: What was found.
        step: Optimizer steps taken.

    Raises:
        ForeignError: If the centers are not as many as the pack has identities, or a state is not
            that of the optimizer.
        ConfigError: If centers are stored in a format that theirs cannot be copied into.
    """
    model.backbone.load_state_dict(layout.backbone)
    if model.average is not None:
        model.average.begin()
    for name, parameter in model.backbone.named_parameters():
        # They have states of what is never trained here: a weight frozen at 1, an unused token.
        if parameter.requires_grad and name in layout.backbone_states:
            _set(model.optimizer, parameter, layout.backbone_states[name], name, layout)
    head = model.head
    head.optimizer.param_groups[0]["steps"] = step
    if not layout.shards:
        return
    states = head.optimizer.states()
    if head.centers.dtype != torch.float32 or any(v.dtype == torch.int8 for v in states.values()):
        raise ConfigError(
            "head.center_format and head.optimizer.momentum_format must be fp32 to take over class "
            "centers; leave them out."
        )
    owned, ranks, total = head.owned, len(layout.shards), head.sharding.num_identities
    for rank, read in enumerate(layout.shards):
        theirs = rows_of(total, rank, ranks)
        low, high = max(theirs.start, owned.start), min(theirs.stop, owned.stop)
        if low >= high:
            continue
        shard = read()
        _check(shard, theirs, head, rank, ranks)
        here = slice(low - owned.start, high - owned.start)
        there = slice(low - theirs.start, high - theirs.start)
        head.centers.data[here] = shard.centers_CD[there].to(head.centers.device)
        for name, value in _row_states(shard, isinstance(head.optimizer.rule, RowAdamW)).items():
            if name not in states:
                raise ForeignError(
                    f"{shard.path}: it has {name} of the centers, and head.optimizer keeps "
                    f"{', '.join(states) or 'no state'}. Choose the optimizer it was trained with."
                )
            states[name][here] = value[there].to(head.centers.device)


def _set(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    states: States,
    name: str,
    layout: Layout,
) -> None:
    kept = _STATES.get(type(optimizer), ())
    for state, value in states.items():
        if state not in kept or value.numel() not in (1, parameter.numel()):
            raise ForeignError(
                f"{layout.source}: its optimizer has {state} {list(value.shape)} of {name}, which "
                f"{type(optimizer).__name__} does not keep so. Choose the optimizer it was trained "
                "with."
            )
        # In the memory order of the parameter: fused kernels do not look at strides.
        optimizer.state[parameter][state] = (
            value.float().reshape(()).to(parameter.device)
            if state == "step"
            else torch.empty_like(parameter, requires_grad=False).copy_(value)
        )


def _row_states(shard: RankCenters, adamw: bool) -> dict[str, Tensor]:
    """Their states of the centers under our names; AdamW's steps become every row's own."""
    named = {_CENTER_STATES[k]: v for k, v in shard.states.items() if k in _CENTER_STATES}
    if adamw and "step" in shard.states:
        steps = torch.full((len(shard.centers_CD), 1), float(shard.states["step"]))
        named["updates"] = steps
    return named


def _check(shard: RankCenters, theirs: range, head: PartialFC, rank: int, ranks: int) -> None:
    expected = [len(theirs), head.centers.shape[1]]
    if head.centers_per_identity > 1 or list(shard.centers_CD.shape) != expected:
        raise ForeignError(
            f"{shard.path}: its centers are {list(shard.centers_CD.shape)}, and rank {rank} of "
            f"{ranks} has {expected} of the {head.sharding.num_identities:,} identities of "
            "data.train with this head. It is of another data set, another head.margin, or some "
            "ranks' files are missing. For its backbone alone give the model.pt."
        )
