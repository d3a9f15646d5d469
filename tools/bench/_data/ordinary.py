"""The loader that most training scripts have: the baseline of tools/bench/data.py.

What arcface_torch's ``MXFaceDataset`` and ``DataLoader`` do: an image at a time is read, decoded,
flipped, made a tensor and normalised in worker processes, with torchvision's operations and Pillow
(arcface_torch decodes with OpenCV, goes to Pillow from there, and does the rest the same).
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from partialfc.data.packs.pack import open_pack


class Faces(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images of a pack, as ``transforms.Compose([RandomHorizontalFlip(), ToTensor(),
    Normalize([0.5] * 3, [0.5] * 3)])`` leaves them."""

    def __init__(self, path: str) -> None:
        self.pack = open_pack(Path(path))

    def __len__(self) -> int:
        return len(self.pack)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        identity, jpeg = self.pack.record(index)
        image: Any = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
        if torch.rand(1) < 0.5:
            image = ImageOps.mirror(image)
        tensor = torch.from_numpy(np.array(image, np.uint8, copy=True))
        tensor = tensor.permute((2, 0, 1)).contiguous().to(torch.float32).div(255)
        mean = torch.as_tensor([0.5] * 3).view(-1, 1, 1)
        return tensor.clone().sub_(mean).div_(mean), torch.tensor(identity, dtype=torch.long)


def ordinary_batches(pack: str, batch: int, workers: int) -> Iterator[int]:
    """Yield the images of each batch, epoch after epoch."""
    loader = DataLoader(
        Faces(pack), batch, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=True, worker_init_fn=_one_thread,
    )  # fmt: skip
    while True:
        for images, _ in loader:
            yield len(images)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
