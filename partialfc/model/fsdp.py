"""A backbone whose weights, gradients and optimizer states are divided among the ranks: FSDP2.

torch's ``fully_shard`` gathers the weights of a block before it computes, in forward and again in
backward, and afterwards leaves to each rank its rows of their mean gradient. A parameter is cut
along its first dimension. All else sees plain tensors: the optimizer trains a rank's own rows, and
a checkpoint gathers and reads them.

Weights are gathered in fp32 and autocast computes in the run's precision, so the numbers are those
of DistributedDataParallel in every precision.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from partialfc.config import Config, ConfigError
from partialfc.distributed.ranks import Ranks, gather_rows, sum_over_ranks
from partialfc.runtime.process import Runtime


def rows_of(length: int, rank: int, ranks: int) -> range:
    """Return a rank's rows of a tensor of ``length``, cut as torch.chunk does; it may have none."""
    most = -(-length // ranks)
    return range(min(rank * most, length), min((rank + 1) * most, length))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network, in its order: modules of one class that stand in a list.

    A list is a Sequential or a ModuleList; of lists in lists the innermost counts. What is in no
    block (the stem, the layers that make the embedding) is gathered for the whole step.
    """
    is_list = isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1
    alike = is_list and len({type(child) for child in module.children()}) == 1
    found = []
    for child in module.children():
        whole = [child] if alike and any(True for _ in child.parameters()) else []
        found += blocks_of(child) or whole
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """This rank's rows of a backbone's parameters.

    Attributes:
        own: The rows by the parameter's name, plain leaves that the optimizer trains. They are the
            memory of ``divided``.
        divided: The parameters of the module between forward passes.
        ranks: That have the other rows.
        device: Where forward and backward are computed.
    """

    own: Mapping[str, nn.Parameter]
    divided: Mapping[str, nn.Parameter]
    ranks: Ranks
    device: torch.device

    def train_own(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer of the divided parameters train this rank's rows in their place."""
        rows: dict[Tensor, nn.Parameter] = {
            parameter: self.own[name] for name, parameter in self.divided.items()
        }
        for group in optimizer.param_groups:
            group["params"] = [rows[parameter] for parameter in group["params"]]
        for parameter in [*optimizer.state]:
            states = optimizer.state.pop(parameter)
            optimizer.state[rows[parameter]] = {
                name: _plain(value) for name, value in states.items()
            }

    def take_gradients(self) -> None:
        """Give the optimizer the gradients that backward left; no copy."""
        for name, parameter in self.divided.items():
            gradient = parameter.grad
            self.own[name].grad = None if gradient is None else _plain(gradient)
            parameter.grad = None

    def sums(self, own: Tensor) -> Tensor:
        """Return sums over the rows of all ranks, of this rank's. Collective: an all-reduce."""
        return sum_over_ranks(own.to(self.device), self.ranks)

    def near(self, scalar: Tensor) -> Tensor:
        """Return a scalar where the rows are: with offload, a host synchronisation."""
        return scalar.to(next(iter(self.own.values())).device)

    def rows(self, length: int) -> slice:
        """Return which rows of a divided tensor of ``length`` rows are this rank's."""
        rows = rows_of(length, self.ranks.rank, self.ranks.size)
        return slice(rows.start, rows.stop)

    def whole(self, name: str, own: Tensor) -> Tensor:
        """Return all rows on the device, or what is not divided as it is.

        Collective, where it is divided: one all-gather.

        Args:
            name: Of a parameter or a buffer; or of a state, ``<parameter>.<state>``.
            own: What this rank has of it.
        """
        parameter = self.divided.get(name)
        if parameter is None and own.ndim:
            parameter = self.divided.get(name.rpartition(".")[0])
        if parameter is None:
            return own
        length = len(parameter)
        padding = (0, 0) * (own.ndim - 1) + (0, -(-length // self.ranks.size) - len(own))
        return gather_rows(F.pad(own.detach().to(self.device), padding), self.ranks)[:length]

    @torch.no_grad()
    def load(self, backbone: nn.Module, found: Mapping[str, Tensor]) -> None:
        """Fill the backbone with tensors by name, of parameters whole ones or this rank's rows.

        Raises:
            ValueError: If one is missing, too many or of another shape.
        """
        live = {**backbone.state_dict(), **self.own}
        if live.keys() != found.keys():
            raise ValueError(f"{', '.join(sorted(live.keys() ^ found.keys()))}: in one of the two")
        for name, value in found.items():
            if name in self.own and value.shape == self.divided[name].shape:
                value = value[self.rows(len(value))]
            if value.shape != live[name].shape:
                raise ValueError(f"{name} is {[*value.shape]}, must be {[*live[name].shape]}")
            live[name].copy_(value)


def shard(config: Config, backbone: nn.Module, runtime: Runtime) -> Shards:
    """Divide a backbone among the ranks, in place. Collective: rank 0's weights go to all.

    Args:
        config: Whether gathered weights are freed, and where the rows lie.
        backbone: On the device; its parameters become those of a rank's rows.
        runtime: This rank of several.

    Raises:
        ConfigError: If it cannot be divided.
    """
    reshard, offload = config.backbone.reshard, config.backbone.offload
    if scalars := [name for name, one in backbone.named_parameters() if not one.ndim]:
        raise ConfigError(
            f'backbone.shard = "fsdp2": {scalars[0]} is one number, and what is divided has rows. '
            "Make it a parameter of shape [1], or leave backbone.shard out."
        )
    names = {name for name, _ in backbone.named_parameters()}
    every_name = (name for name, _ in backbone.named_parameters(remove_duplicate=False))
    if tied := [name for name in every_name if name not in names]:
        raise ConfigError(
            f'backbone.shard = "fsdp2": {tied[0]} is a parameter that has another name too, and '
            "what is divided has one. Give each layer its own, or leave backbone.shard out."
        )
    ranks, device = runtime.ranks, runtime.device
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        torch.distributed.broadcast(tensor.detach(), 0, group=ranks.group)
    mesh = init_device_mesh(device.type, (ranks.size,))
    policy = CPUOffloadPolicy() if offload and device.type == "cuda" else OffloadPolicy()
    for block in blocks_of(backbone):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy)
    fully_shard(backbone, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
    divided = dict(backbone.named_parameters())
    own = {
        name: nn.Parameter(_plain(parameter.detach()), requires_grad=parameter.requires_grad)
        for name, parameter in divided.items()
    }
    return Shards(own, divided, ranks, device)


def free_gathered(backbone: nn.Module) -> None:
    """Free what a forward pass without a backward has left gathered."""
    for module in backbone.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _plain(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
