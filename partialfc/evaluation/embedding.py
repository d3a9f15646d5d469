"""Images to embeddings on all ranks, the same to the bit on any number of them and for any batch.

A matrix product rounds by the shape of its factors. So images go through the backbone in blocks of
a fixed size and fixed members, whoever runs them; the last block is filled up with its last image.
The machines of all ranks must be alike. Shape suffixes: N = images, n = those of a rank,
D = embedding.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from partialfc.data.images.formats import decode_image, resize
from partialfc.data.loaders.torch_loader import normalise
from partialfc.data.sets.pairs import Image
from partialfc.distributed.ranks import gather_rows
from partialfc.errors import DataError
from partialfc.runtime.process import Runtime

BLOCK = 32
"""Images in one forward pass."""


def embed_images(
    embed: Callable[[Tensor], Tensor],
    name: str,
    count: int,
    image: Callable[[int], Image],
    runtime: Runtime,
    *,
    size: int,
    flip: bool = True,
    batch: int = 256,
    threads: int = 4,
    progress: Callable[[int], object] = lambda images: None,
) -> np.ndarray:
    """Return fp64 embeddings [count, D] in order, on every rank. Collective: one all-gather.

    Args:
        embed: Images [32, 3, S, S] in [-1, 1] on the device to embeddings, in evaluation mode.
        name: Of the set, for errors.
        count: N, >= 1.
        image: Returns image i: RGB uint8 [H, W, 3], or a file's bytes; called from several threads.
        runtime: This rank.
        size: S in pixels; other images are resized.
        flip: Add the embedding of the mirrored image.
        batch: Images decoded ahead on each rank; changes memory and speed only.
        threads: That decode.
        progress: Called with the number of images that this rank has done.

    Raises:
        DataError: If an image cannot be decoded; the message names it.
    """

    def prepared(index: int) -> Tensor:
        pixels = _pixels(image(index), size)
        normal = np.empty((3, size, size), np.float32)
        normalise(resize(pixels, size), normal)
        return torch.from_numpy(normal)

    return embed_tensors(
        embed,
        name,
        count,
        prepared,
        runtime,
        flip=flip,
        batch=batch,
        threads=threads,
        progress=progress,
    )


@torch.inference_mode()
def embed_tensors(
    embed: Callable[[Tensor], Tensor],
    name: str,
    count: int,
    prepared: Callable[[int], Tensor],
    runtime: Runtime,
    *,
    flip: bool,
    batch: int = 256,
    threads: int = 4,
    progress: Callable[[int], object] = lambda images: None,
) -> np.ndarray:
    """Return fp64 embeddings [count, D] as :func:`embed_images`.

    Args:
        embed: [32, ...] on the device to embeddings, in evaluation mode.
        prepared: Returns what the backbone takes of image or sample i, fp32 [...] on the host;
            called from several threads.
        name, count, runtime, flip, batch, threads, progress: As of :func:`embed_images`.

    Raises:
        DataError: If one cannot be had; the message names it.
    """

    def prepare(index: int) -> Tensor:
        try:
            return prepared(index)
        except (ValueError, OSError) as error:
            raise DataError(f"{name}: image {index}: {error}") from error

    ranks = runtime.ranks
    embed = _alike(embed)
    blocks = -(-count // BLOCK)
    share = -(-blocks // ranks.size) * BLOCK
    # What is beyond the end is the last image again, so that every block and every rank is full.
    mine = [min(ranks.rank * share + i, count - 1) for i in range(share)]
    parts = []
    ahead = max(1, batch // BLOCK) * BLOCK
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, share, ahead):
            chunk = mine[start : start + ahead]
            images = torch.stack(list(pool.map(prepare, chunk))).to(runtime.device)
            for block in images.split(BLOCK):  # type: ignore[no-untyped-call]
                embeddings_nD = embed(block).float()
                if flip:
                    embeddings_nD += embed(block.flip(3)).float()
                parts.append(embeddings_nD)
            progress(len(chunk))
    gathered: np.ndarray = gather_rows(torch.cat(parts), ranks).cpu().double().numpy()
    return gathered[:count]


def _alike(embed: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return it by the same kernels in every process, compiled or not.

    Training lets cuDNN choose by a race, and may compile its network for the shape of its batches.
    """

    def embedded(images: Tensor) -> Tensor:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False
        try:
            with torch.compiler.set_stance("force_eager"):
                return embed(images)
        finally:
            torch.backends.cudnn.benchmark = before

    return embedded


def _pixels(image: Image, size: int) -> np.ndarray:
    """RGB uint8 [H, W, 3]."""
    if isinstance(image, np.ndarray):
        return image
    return decode_image(np.frombuffer(image, np.uint8), size)
