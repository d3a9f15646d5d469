"""A small model with all that a checkpoint holds, and its batches: a function of the step."""

import torch
from torch import Tensor, nn

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.config import Config
from partialfc.data.order import Order
from partialfc.model.build import Model, assemble
from partialfc.model.step import train_step
from partialfc.runtime.process import Runtime

IDENTITIES, IMAGES, BATCH, SIZE, DIM = 96, 2000, 48, 8, 16
SEED = 2048
FACTS = {"pack": "synthetic", "run.seed": SEED}
ORDER = Order(IMAGES, BATCH, SEED, uneven_by=1)


def settings() -> Config:
    """fp32, momentum in the backbone and in the centers."""
    data = {"train": "none.rec", "global_batch": BATCH, "uneven": True}
    return Config.model_validate({"data": data, "precision": {"compute": "fp32"}})


def small_model(runtime: Runtime, *, sample_rate: float = 0.3) -> Model:
    """No BatchNorm, so that any number of ranks trains alike, to rounding."""
    torch.manual_seed(SEED)
    head = PartialFC(
        IDENTITIES,
        DIM,
        ArcFace(scale=16),
        sample_rate=sample_rate,
        optimizer=RowSGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
        seed=SEED,
    )
    layers = (nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 64), nn.ReLU(), nn.Linear(64, DIM))
    return assemble(settings(), runtime, nn.Sequential(*layers), head)


def batch_of(step: int, rank: int, world_size: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return images, identities and sample ids of a rank; an image is a function of its id."""
    ids = ORDER.sample_ids(step * BATCH, rank, world_size).tolist()
    images = torch.empty(len(ids), 3, SIZE, SIZE)
    for image, number in zip(images, ids, strict=True):
        image.normal_(generator=torch.Generator().manual_seed(number))
    return images, torch.tensor(ids) % IDENTITIES, ids


def take_step(model: Model, step: int, runtime: Runtime) -> float:
    """Train on the batch of a step; return the loss."""
    images, identities, _ = batch_of(step, runtime.ranks.rank, runtime.ranks.size)
    return float(train_step(model, settings(), images, identities, 0.05).loss)
