"""Small models for tests of what surrounds them."""

from pathlib import Path

import torch
from torch import nn

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.backbones import build_backbone
from partialfc.checkpoint import loading as checkpoint
from partialfc.config import Config
from partialfc.distributed.ranks import Ranks
from partialfc.model.build import Model, assemble
from partialfc.model.step import train_step
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


def normed_model(**sections):
    """Settings, and a model with BatchNorm."""
    config = settings(**sections)
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.BatchNorm1d(16))
    head = PartialFC(40, 16, ArcFace(scale=16), sample_rate=0.5, optimizer=RowSGD(lr=0.1))
    return config, assemble(config, runtime(), nn.Sequential(*layers), head)


def train_and_stop(rank, world_size, folder, stops, facts, **sections):
    """Six steps; at each of ``stops`` the model is saved, and one new from its file goes on."""
    config, model = normed_model(**sections)
    for step in range(6):
        images, identities = (share(part, rank, world_size) for part in batch(step, 24))
        train_step(model, config, images, identities, 0.05)
        if step in stops:
            path = checkpoint.save(folder, step + 1, model, facts, runtime(), keep=9)
            _, model = normed_model(**sections)
            checkpoint.load(path, model, facts, runtime())
    return model


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


def write_convnet(path: Path, *, size: int, dim: int) -> Path:
    """A ``model.pt`` of convnet_s whose BatchNorms are not those of a fresh network."""
    torch.manual_seed(0)
    backbone = build_backbone("convnet_s", embedding_dim=dim, image_size=size).train()
    with torch.no_grad():
        for _ in range(3):
            backbone(torch.randn(8, 3, size, size))
    torch.save(backbone.state_dict(), path)
    return path
