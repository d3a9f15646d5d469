"""What a trained network must beat: pixels, whitened PCA, and itself before it was trained.

Shape suffixes: N = images, P = pixels of one, K = components, D = embedding.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from partialfc.backbones import build_backbone
from partialfc.data.images.formats import decode_image, resize
from partialfc.data.packs.pack import open_pack
from partialfc.data.sets.pairs import read_pairs
from partialfc.protocols.verification import verify

Crops = NDArray[np.uint8]
"""RGB images, [N, S, S, 3]."""
Rows = NDArray[np.float64]

COMPONENTS = 200
"""K, of the whitened PCA."""
_BATCH = 128


def baselines(
    train: Path, sets: list[Path], *, backbone: str, embedding_dim: int, size: int, seed: int
) -> dict[str, dict[str, float]]:
    """Return the ten-fold accuracy of each baseline by name, of each set by its stem.

    Args:
        train: The pack that PCA is fitted to.
        sets: ``.bin`` files of pairs.
        backbone, embedding_dim: Of the network that is not trained.
        size: S, side of the images in pixels.
        seed: Of its weights.
    """
    pack = open_pack(train)
    seen = _crops([pack.jpeg(i) for i in range(len(pack))], size)
    methods: dict[str, Callable[[Crops], Rows]] = {
        "untrained": untrained(backbone, embedding_dim, size, seed),
        "pixels": pixels,
        "whitened PCA": whitened_pca(pixels(seen)),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in methods}
    for path in sets:
        pairs = read_pairs(path)
        crops = _crops([bytes(image) for image in pairs.images], size)
        same = np.asarray(pairs.same, np.bool_)
        for name, embed in methods.items():
            rows_ND = embed(crops) + embed(crops[:, :, ::-1])
            found[name][path.stem] = verify(rows_ND, same).accuracy
    return found


def pixels(crops: Crops) -> Rows:
    """Return brightness less its mean, [N, P]."""
    grey_NP = crops.astype(np.float64).mean(3).reshape(len(crops), -1)
    return np.asarray(grey_NP - grey_NP.mean(1, keepdims=True))


def whitened_pca(seen_NP: Rows) -> Callable[[Crops], Rows]:
    """Return what embeds images by the first ``COMPONENTS`` of others, each divided by its spread.

    M. Turk, A. Pentland, "Eigenfaces for recognition", 1991.
    """
    mean_P = seen_NP.mean(0)
    centered = seen_NP - mean_P
    spread, directions = np.linalg.eigh(centered.T @ centered / len(centered))
    spread_K, direction_PK = spread[-COMPONENTS:], directions[:, -COMPONENTS:]
    whitening_PK = direction_PK / np.sqrt(spread_K.clip(min=1e-9))
    return lambda crops: np.asarray((pixels(crops) - mean_P) @ whitening_PK)


def untrained(name: str, embedding_dim: int, size: int, seed: int) -> Callable[[Crops], Rows]:
    """Return what embeds images by a network with its first weights."""
    torch.manual_seed(seed)
    network = build_backbone(name, embedding_dim=embedding_dim, image_size=size).eval()

    @torch.inference_mode()
    def embed(crops: Crops) -> Rows:
        parts = []
        for start in range(0, len(crops), _BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(crops[start : start + _BATCH]))
            parts.append(network((batch.permute(0, 3, 1, 2).float() - 127.5) / 127.5))
        return np.asarray(torch.cat(parts).double().numpy())

    return embed


def _crops(images: list[bytes], size: int) -> Crops:
    return np.stack([resize(decode_image(np.frombuffer(i, np.uint8)), size) for i in images])
