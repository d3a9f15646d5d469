"""The stream of batches through NVIDIA DALI: decoded on the GPU where there is one.

DALI has no part in what the batches are: it is handed the JPEG bytes of our reader and the draws of
our augmentation, so its pipeline has no state worth saving.

Shape suffix: B = images of one rank's batch.
"""
# DALI makes many of its names at import, and its types do not know conditionals:
# mypy: disable-error-code="attr-defined, assignment, no-untyped-call"

from itertools import count
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.dlpack import from_dlpack

from partialfc.data.jpeg import decode
from partialfc.data.stream import Batches, Stream


def dali_batches(
    stream: Stream, samples_seen: int, *, device: torch.device, threads: int, prefetch: int
) -> Batches:
    """Yield the batches of ``stream`` that follow ``samples_seen`` images.

    No host synchronisation: on a GPU the batches belong to torch's current stream.

    Args:
        stream: What to decode.
        samples_seen: Images that all ranks together have seen.
        device: Where the batches go, the CPU or a CUDA device.
        threads: DALI's CPU threads, >= 1.
        prefetch: Batches that are prepared ahead, >= 1.

    Raises:
        ValueError: If an image cannot be decoded, up to ``prefetch`` batches before it is due; the
            message names it.
    """
    on_gpu = device.type == "cuda"
    device_id = None
    if on_gpu:
        device_id = torch.cuda.current_device() if device.index is None else device.index
    step = stream.order.global_batch
    pipeline = _pipeline(
        source=lambda k: _inputs(stream, samples_seen + k * step),
        image_size=stream.image_size,
        shifts=stream.augmentation.shift > 0,
        on_gpu=on_gpu,
        batch_size=stream.batch_per_rank,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )
    pipeline.build()
    try:
        for start in count(samples_seen, step):
            try:
                outputs = pipeline.run(torch.cuda.current_stream(device_id) if on_gpu else None)
            except RuntimeError:
                _name_bad_image(stream, start, prefetch)
                raise
            # No copy: DALI's default executor never writes to an output again.
            images, identities = (from_dlpack(output.as_tensor()) for output in outputs)
            yield images, identities
    finally:
        del pipeline  # the only reference: this ends its threads


def _inputs(stream: Stream, samples_seen: int) -> list[Any]:
    """One batch of ``stream`` as the outputs of DALI's external source."""
    batch = stream.batch(samples_seen)
    inputs = [batch.jpegs, batch.identity_B, batch.resize_B, batch.draw.flip_B.astype(np.int32)]
    if stream.augmentation.shift:
        # A pixel of the shifted image comes from (x - shift_x, y - shift_y).
        matrix_B23 = np.zeros((len(batch.jpegs), 2, 3), np.float32)
        matrix_B23[:, 0, 0] = matrix_B23[:, 1, 1] = 1
        matrix_B23[:, 0, 2] = -batch.draw.shift_x_B
        matrix_B23[:, 1, 2] = -batch.draw.shift_y_B
        inputs.append(matrix_B23)
    return inputs


@pipeline_def(enable_conditionals=True)
def _pipeline(source: Any, image_size: int, shifts: bool, on_gpu: bool) -> Any:
    dtypes = [types.UINT8, types.INT64, types.BOOL, types.INT32] + [types.FLOAT] * shifts
    jpeg, identity, resize, flip, *matrix = fn.external_source(
        source=source, batch=True, num_outputs=len(dtypes), dtype=dtypes
    )
    image = fn.decoders.image(
        jpeg,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as libjpeg-turbo does; the other way is another image
    )
    if resize:  # true of some images of a batch: DALI splits the batch and joins it again
        image = fn.resize(image, size=(image_size, image_size))
    if shifts:
        image = fn.warp_affine(image, matrix=matrix[0], interp_type=types.INTERP_NN)
    image = fn.crop_mirror_normalize(
        image, mirror=flip, mean=[127.5] * 3, std=[127.5] * 3, output_layout="CHW"
    )
    return image, identity.gpu() if on_gpu else identity


def _name_bad_image(stream: Stream, samples_seen: int, prefetch: int) -> None:
    """Raise the error of the first image of the batches under way that cannot be decoded."""
    for k in range(prefetch + 1):
        batch = stream.batch(samples_seen + k * stream.order.global_batch)
        for sample_id, jpeg in zip(batch.sample_id_B, batch.jpegs, strict=True):
            try:
                decode(jpeg)
            except ValueError as error:
                raise stream.error(int(sample_id), str(error)) from None
