"""Opens the stream of batches with the loader that a run asks for."""

from typing import Literal

import torch

from partialfc.data.loaders.stream import Batches, Stream
from partialfc.data.loaders.torch_loader import torch_batches
from partialfc.errors import in_words


def open_batches(
    stream: Stream,
    samples_seen: int,
    *,
    device: torch.device,
    loader: Literal["auto", "dali", "torch"] = "auto",
    threads: int = 4,
    prefetch: int = 2,
) -> Batches:
    """Return the batches of ``stream`` that follow ``samples_seen`` images of all ranks.

    Both loaders yield the same images in the same order with the same changes. Pixels are equal up
    to float rounding; of an image that is resized, or decoded on a GPU, up to a level or so of 255.

    Args:
        stream: What to decode.
        samples_seen: Images that all ranks together have seen; a run resumes from it.
        device: Where the batches go.
        loader: ``"auto"`` is DALI where it is installed, otherwise torch.
        threads: Threads that decode, >= 1.
        prefetch: Batches that are prepared ahead, >= 1.

    Raises:
        ValueError: If a number is outside its range, DALI is asked for where it is not installed,
            or the augmentation has changes that the torch loader does not make;
            from the batches, if one cannot be filled because too many images in a row are bad.
    """
    for name, value in (("threads", threads), ("prefetch", prefetch)):
        if value < 1:
            raise ValueError(f"data.{name} must be >= 1, got {value}.")
    stream.order.epoch(samples_seen)  # refuses a negative number now, not at the first batch
    batches = torch_batches
    if loader != "torch":
        try:
            from partialfc.data.loaders.dali import dali_batches as batches
        except ImportError as error:
            if loader == "dali":
                raise ValueError(
                    f'data.loader = "dali" needs NVIDIA DALI, which cannot be imported here '
                    f'({in_words(error)}): install it, or set data.loader = "torch".'
                ) from error
    missing = [name for name in stream.augmentation.changes if name != "crop"]
    if missing and batches is torch_batches:
        raise ValueError(
            f"data.augment.{missing[0]} = {getattr(stream.augmentation, missing[0])}: the torch "
            f"loader has crop, shift and flip only. Install DALI and use "
            f'data.loader = "dali", or set {", ".join(f"data.augment.{n}=0" for n in missing)}.'
        )
    return batches(stream, samples_seen, device=device, threads=threads, prefetch=prefetch)
