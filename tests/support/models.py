"""Small models for tests of what surrounds them."""

import torch
from torch import nn

from partialfc import ArcFace, RowSGD
from partialfc.config import Config
from partialfc.distributed.ranks import Ranks
from partialfc.model.build import Model, assemble
from partialfc.runtime.process import Runtime
from tests.support.heads import flat_head


class Flat(nn.Module):
    """Images to embeddings by one matrix: no BatchNorm, so any split of a batch is equal."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(3 * size * size, dim)

    def forward(self, images):
        return self.project(images.flatten(1))


def settings(**sections) -> Config:
    sections.setdefault("precision", {"compute": "fp32"})
    sections.setdefault("data", {"train": "unused.rec", "global_batch": 24})
    return Config.model_validate(sections)


def flat_model(
    config: Config, *, identities=40, size=8, dim=16, rate=0.5, rule=None, margin=None, **head
) -> Model:
    torch.manual_seed(0)
    rule, margin = rule or RowSGD(lr=0.1), margin or ArcFace(scale=16)
    head.setdefault("center_weight", config.losses.center.weight)
    head.setdefault("inter_class_weight", config.losses.inter_class.weight)
    partial_fc = flat_head(identities, dim, margin, sample_rate=rate, optimizer=rule, **head)
    return assemble(config, runtime(), Flat(size, dim), partial_fc)


def weights(model: Model):
    """Everything that a step may change."""
    tensors = [*model.backbone.parameters(), model.head.centers]
    for optimizer in (model.optimizer, model.head.optimizer):
        for state in optimizer.state.values():
            tensors += [state[name] for name in sorted(state)]
    return [tensor.detach().clone() for tensor in tensors]


def batch(step: int, total: int, *, identities=40, size=8):
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(total, 3, size, size, generator=generator),
        torch.randint(0, identities, (total,), generator=generator),
    )


def share(tensor, rank: int, world_size: int):
    per_rank = len(tensor) // world_size
    return tensor[rank * per_rank : (rank + 1) * per_rank]


def runtime() -> Runtime:
    return Runtime(Ranks.of(), torch.device("cpu"))
