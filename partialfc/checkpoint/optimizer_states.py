"""States of the backbone's optimizer by the name of their parameter: ``stem.conv.weight.step``.

A name stays where parameters are frozen, grouped or counted in another way; a number does not.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from partialfc.errors import CheckpointError

_NUMBERED = re.compile(r"(\d+)\.(\w+)")


def named_states(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the live states by ``<parameter>.<state>``."""
    names: dict[Tensor, str] = {one: name for name, one in parameters.items()}
    return {
        f"{names[parameter]}.{state}": value
        for parameter, states in optimizer.state.items()
        for state, value in states.items()
    }


def restore_states(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    found: Mapping[str, Tensor],
) -> None:
    """Give every parameter that is trained its states, as :func:`named_states` returned them.

    One that never had a gradient has none where the optimizer makes them at the first: it stays
    without.

    Args:
        optimizer: Of the parameters; what it holds is replaced.
        parameters: By name, as the optimizer has them.
        found: Of a backbone that is divided, this rank's rows.

    Raises:
        CheckpointError: If a parameter lacks some of its states, or one has another shape.
    """
    trained = {name: one for name, one in parameters.items() if one.requires_grad}
    of_any = {name.rpartition(".")[2] for name in (*found, *named_states(optimizer, parameters))}
    # An optimizer that has its states from the start says which a parameter has; torch's AdamW
    # makes those that the others have, or none before the first gradient.
    having = {name.rpartition(".")[0] for name in found}
    kinds = {
        name: [*optimizer.state.get(one, {})] or (of_any if name in having else ())
        for name, one in trained.items()
    }
    wanted = {f"{name}.{kind}" for name in trained for kind in kinds[name]}
    if missing := sorted(wanted - found.keys()):
        raise CheckpointError(f"it lacks the tensor {', '.join(missing)}")
    for name, parameter in trained.items():
        for kind in kinds[name]:
            value = found[f"{name}.{kind}"]
            if value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"it has {kind} {list(value.shape)} of {name}, which is {list(parameter.shape)}"
                )
            # torch's fused kernels go through memory in order: a state must lie as its parameter
            # does, and a file keeps no strides (channels_last).
            lies_so = value.stride() == parameter.stride() and value.dtype == parameter.dtype
            if value.ndim and not lies_so:
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            optimizer.state[parameter][kind] = value.to(parameter.device)


def with_names(
    numbered: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the states of a checkpoint of format 3, which has ``<parameter number>.<state>``.

    The numbers count the parameters that are trained, in the backbone's order.

    Raises:
        CheckpointError: If it counts other parameters than are trained.
    """
    parts = {name: _NUMBERED.fullmatch(name) for name in numbered}
    trained = [name for name, one in parameters.items() if one.requires_grad]
    if any(part is None or int(part[1]) >= len(trained) for part in parts.values()):
        raise CheckpointError(
            f"its optimizer has states of {len({name.split('.')[0] for name in numbered})} "
            f"parameters by number, and this run trains {len(trained)}"
        )
    return {
        f"{trained[int(part[1])]}.{part[2]}": numbered[name]
        for name, part in parts.items()
        if part is not None
    }
