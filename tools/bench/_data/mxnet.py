"""DALI's own reader of packs, as others use it: the baseline."""
# mypy: disable-error-code="attr-defined, assignment, no-untyped-call"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvidia.dali import fn, pipeline_def, types


def mxnet_batches(pack: str, batch: int, threads: int, size: int) -> Iterator[int]:
    """Yield the images of each batch, which is decoded, flipped and normalised."""
    pipeline = _pipeline(
        pack=pack, size=size, batch_size=batch, num_threads=threads, device_id=None, seed=1
    )
    pipeline.build()
    while True:
        images, _ = pipeline.run()
        images.as_tensor()
        yield batch


@pipeline_def
def _pipeline(pack: str, size: int) -> Any:
    jpeg, label = fn.readers.mxnet(
        path=[pack],
        index_path=[str(Path(pack).with_suffix(".idx"))],
        random_shuffle=True,
        initial_fill=1024,
        pad_last_batch=True,
    )
    image = fn.decoders.image(jpeg, device="cpu", output_type=types.RGB, adjust_orientation=False)
    image = fn.crop_mirror_normalize(
        image,
        mirror=fn.random.coin_flip(probability=0.5),
        mean=[127.5] * 3,
        std=[127.5] * 3,
        output_layout="CHW",
    )
    return image, label
