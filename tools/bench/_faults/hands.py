"""R22 on ranks that torchrun starts: what PyTorch's own recipes do to modules with a head.

``torchrun --nproc-per-node=2 tools/bench/_faults/hands.py OUT``; OUT/rank_<R>.json gets what held.
"""

import copy
import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partialfc import ArcFace, PartialFC, RowSGD

IDENTITIES, DIM, BATCH, STEPS = 101, 8, 24, 4  # of an odd number one rank has one more
MARGIN = ArcFace(scale=16, gradient="exact")


class Recognition(nn.Module):
    """Backbone and head in one module, as Lightning has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(DIM, DIM)
        rule = RowSGD(lr=0.5, momentum=0.0, weight_decay=0.0)
        self.head = PartialFC(IDENTITIES, DIM, MARGIN, optimizer=rule)

    def forward(self, images: Tensor, identities: Tensor) -> Tensor:
        """Return the loss."""
        loss: Tensor = self.head(self.backbone(images), identities)
        return loss


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Return images and identities of all ranks."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, DIM, generator=generator)
    return images, torch.randint(0, IDENTITIES, (BATCH,), generator=generator)


def trained(*, whole: bool) -> Tensor:
    """Return the centers of this rank after steps with DDP around all, or the backbone alone."""
    module = Recognition()
    if not whole:
        module.backbone = DistributedDataParallel(module.backbone)  # type: ignore[assignment]
    forward = DistributedDataParallel(module) if whole else module
    backbone = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(STEPS):
        images, identities = (part.chunk(dist.get_world_size()) for part in batch_of(step))
        forward(images[dist.get_rank()], identities[dist.get_rank()]).backward()
        for optimizer in (backbone, module.head.optimizer):
            optimizer.step()
            optimizer.zero_grad()
    return module.head.centers.detach()


def unscaled() -> float:
    """Return the relative error of a step after ``unscale_``, against fp64 and no loss scale."""
    reference = importlib.import_module("tests.support.reference")
    module = Recognition()
    head, before = module.head, module.head.centers.detach().double()
    images, identities = batch_of(0)
    embeddings = module.backbone(images).detach()
    every = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(every, before)
    logit = reference.positive_logit(MARGIN)
    _, _, gradient = reference.gradients_of(
        embeddings, torch.cat(every), identities, logit, scale=MARGIN.scale
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    mine = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in (embeddings, identities))
    scaler.scale(head(*mine)).backward()
    scaler.unscale_(head.optimizer)
    scaler.step(head.optimizer)
    moved = head.centers.detach().double() - before
    return float(
        reference.relative_error(moved, -0.5 * gradient[head.owned.start : head.owned.stop])
    )


def is_copied() -> bool:
    """Whether a copy of the module is made, which would break in its first step."""
    try:
        copy.deepcopy(Recognition())
    except TypeError as error:
        return "cannot be copied or pickled" not in str(error)
    return True


def main(arguments: list[str]) -> int:
    """Try all on this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    held = [
        torch.equal(trained(whole=True), trained(whole=False)),
        unscaled() < 1e-5,
        not is_copied(),
    ]
    (Path(arguments[0]) / f"rank_{dist.get_rank()}.json").write_text(
        json.dumps(held), encoding="utf-8"
    )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
