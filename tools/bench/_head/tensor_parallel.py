"""The softmax over all centers as torch's own tensor parallelism has it, on several ranks.

The class matrix is a DTensor sharded over its rows, the logits are sharded over classes, and
``loss_parallel`` takes their cross entropy without gathering them. This is what a program gets from
torch.distributed.tensor without code of its own, so it stands beside ours where several GPUs are.

Shape suffixes: b = rows of this rank's batch, B = rows of the global batch, C = classes of all
ranks, c = classes of this rank, D = embedding.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

PARALLEL = {"tensor_parallel": torch.float32, "tensor_parallel_bf16": torch.bfloat16}
"""Name -> dtype of the products."""


class TensorParallel(nn.Module):
    """Fp32 centers of this rank, ``loss_parallel``, and torch.optim.SGD; made by all ranks.

    Args:
        name: One of :data:`PARALLEL`.
        classes: C.
        dim: D.
        scale: s, of the cosines.
        rule: Arguments of the optimizer.
        device: Of the centers.

    Attributes:
        centers: Rows of this rank [c, D]: those that ``torch.chunk`` gives it.
        sampled: None: all.
    """

    def __init__(
        self,
        name: str,
        classes: int,
        dim: int,
        scale: float,
        rule: dict[str, Any],
        device: torch.device,
    ) -> None:
        super().__init__()
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._size, self._scale, self._dtype = (classes, dim), scale, PARALLEL[name]
        each = -(-classes // dist.get_world_size())
        first = min(classes, each * dist.get_rank())
        rows = min(classes, first + each) - first
        self.centers = nn.Parameter(torch.empty(rows, dim, device=device).normal_(0, 0.01))
        self.optimizer = torch.optim.SGD([self.centers], fused=True, **rule)
        self.sampled = None

    def step(self, embeddings_bD: Tensor, identities_b: Tensor) -> Tensor:
        """Forward, backward to the embeddings' gradient and the update of the centers; the loss.

        Collectives: all-gathers of the embeddings and of the identities, an all-reduce each of the
        rows' maxima, of their sums and of the positives' logits; in backward the reduce-scatter of
        the embeddings' gradient. The loss is the mean over the global batch, and the gradient is
        that of it: not times the number of ranks, as ours is for DDP.
        """
        query_bD = (F.normalize(embeddings_bD) * self._scale).to(self._dtype)
        key_cD = F.normalize(self.centers).to(self._dtype)
        query_BD = self._over_batch(query_bD).redistribute(placements=[Replicate()])
        identities_B = self._over_batch(identities_b).redistribute(placements=[Replicate()])
        key_CD = DTensor.from_local(
            key_cD, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(self._size),
            stride=(self._size[1], 1),
        )  # fmt: skip
        with loss_parallel():
            loss = F.cross_entropy(F.linear(query_BD, key_CD).float(), identities_B)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return cast(DTensor, loss.detach()).full_tensor()

    def _over_batch(self, local: Tensor) -> DTensor:
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False)
