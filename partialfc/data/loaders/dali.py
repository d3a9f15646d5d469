"""The stream of batches through NVIDIA DALI: decoded on the GPU where there is one.

DALI has no part in what the batches are: it is handed the JPEG bytes of our reader and the draws of
our augmentation, so its pipeline has no state worth saving.

Shape suffixes: B = images of one rank's batch, n = numbers of one change.
"""
# DALI makes many of its names at import, and its types do not know conditionals:
# mypy: disable-error-code="attr-defined, assignment, no-untyped-call"

from collections.abc import Iterable
from itertools import count
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.dlpack import from_dlpack

from partialfc.data.loaders.dali_changes import change
from partialfc.data.loaders.stream import Batch, Batches, Encoded, Stream


def dali_batches(
    stream: Stream, samples_seen: int, *, device: torch.device, threads: int, prefetch: int
) -> Batches:
    """Yield the batches of ``stream`` that follow ``samples_seen`` images.

    No host synchronisation: on a GPU the batches belong to torch's current stream.

    DALI gives up on a batch with an image that it cannot decode, and on all batches under way. Then
    the images of these batches are tried one by one, the bad ones are replaced, and a new pipeline
    goes on where the old one stopped.

    Args:
        stream: What to decode.
        samples_seen: Images that all ranks together have seen.
        device: Where the batches go, the CPU or a CUDA device.
        threads: DALI's CPU threads, >= 1.
        prefetch: Batches that are prepared ahead, >= 1.

    Raises:
        ValueError: If a batch cannot be filled; see
        :meth:`~partialfc.data.loaders.stream.Stream.batch`.
    """
    on_gpu = device.type == "cuda"
    device_id = None
    if on_gpu:
        device_id = torch.cuda.current_device() if device.index is None else device.index
    step = stream.order.global_batch
    under_way: dict[int, Encoded] = {}

    def inputs(start: int) -> list[Any]:
        batch = stream.batch(start)
        under_way[start] = batch._replace(jpegs=[])
        return _inputs(stream, batch)

    def started(start: int) -> Any:
        pipeline = _pipeline(
            source=lambda k: inputs(start + k * step),
            image_size=stream.image_size,
            changes=stream.augmentation.changes,
            shifts=stream.augmentation.shift > 0,
            on_gpu=on_gpu,
            batch_size=stream.batch_per_rank,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
        )
        pipeline.build()
        return pipeline

    pipeline = started(samples_seen)
    try:
        for start in count(samples_seen, step):
            outputs = None
            while outputs is None:
                try:
                    outputs = pipeline.run(torch.cuda.current_stream(device_id) if on_gpu else None)
                except RuntimeError:
                    if not _replace_bad_images(stream, under_way, on_gpu, device_id):
                        raise
                    pipeline = started(start)
            # No copy: DALI's default executor never writes to an output again.
            (images,) = (from_dlpack(output.as_tensor()) for output in outputs)
            batch = under_way.pop(start)
            yield Batch(
                images,
                torch.from_numpy(batch.identity_B),
                batch.replaced,
                batch.sample_id_B,
                None if batch.weight_B is None else torch.from_numpy(batch.weight_B),
            )
    finally:
        del pipeline  # the only reference: this ends its threads


def _inputs(stream: Stream, batch: Encoded) -> list[Any]:
    """One batch of ``stream`` as the outputs of DALI's external source."""
    crop = batch.draw.changes.get("crop")
    resize_B = batch.resize_B if crop is None else batch.resize_B | crop.chosen_B
    inputs = [batch.jpegs, resize_B, batch.draw.flip_B.astype(np.int32)]
    for name, drawn in batch.draw.changes.items():
        whole = stream.image_size if name == "crop" else 1
        inputs += [drawn.chosen_B, drawn.value_Bn / np.float32(whole)]
    if stream.augmentation.shift:
        # A pixel of the shifted image comes from (x - shift_x, y - shift_y).
        matrix_B23 = np.zeros((len(batch.jpegs), 2, 3), np.float32)
        matrix_B23[:, 0, 0] = matrix_B23[:, 1, 1] = 1
        matrix_B23[:, 0, 2] = -batch.draw.shift_x_B
        matrix_B23[:, 1, 2] = -batch.draw.shift_y_B
        inputs.append(matrix_B23)
    return inputs


@pipeline_def(enable_conditionals=True)
def _pipeline(
    source: Any, image_size: int, changes: tuple[str, ...], shifts: bool, on_gpu: bool
) -> Any:
    dtypes = [types.UINT8, types.BOOL, types.INT32]
    dtypes += [types.BOOL, types.FLOAT] * len(changes) + [types.FLOAT] * shifts
    jpeg, resize, flip, *others = fn.external_source(
        source=source, batch=True, num_outputs=len(dtypes), dtype=dtypes
    )
    image = _decoded(jpeg, on_gpu)
    if "crop" in changes:
        cropped, box, *others = others
        if cropped:  # of some images of a batch: DALI splits the batch and joins it again
            image = fn.slice(image, rel_start=box[:2], rel_end=box[2:], axis_names="HW")
    if resize:
        image = fn.resize(image, size=(image_size, image_size))
    for i, name in enumerate(name for name in changes if name != "crop"):
        if others[2 * i]:
            image = change(name, image, others[2 * i + 1], image_size)
    if shifts:
        image = fn.warp_affine(image, matrix=others[-1], interp_type=types.INTERP_NN)
    return fn.crop_mirror_normalize(
        image, mirror=flip, mean=[127.5] * 3, std=[127.5] * 3, output_layout="CHW"
    )


def _decoded(jpeg: Any, on_gpu: bool) -> Any:
    return fn.decoders.image(
        jpeg,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as libjpeg-turbo does; the other way is another image
    )


@pipeline_def
def _decoder(on_gpu: bool) -> Any:
    jpeg = fn.external_source(name="jpeg", dtype=types.UINT8, batch=True)
    return _decoded(jpeg, on_gpu)


def _replace_bad_images(
    stream: Stream, starts: Iterable[int], on_gpu: bool, device_id: int | None
) -> bool:
    """Whether there were images in the batches at ``starts`` that DALI cannot decode."""
    options = {"batch_size": 1, "num_threads": 1, "device_id": device_id}
    pipeline = None
    found = False
    for start in starts:
        batch = stream.batch(start)
        for sample_id, jpeg in zip(batch.sample_id_B.tolist(), batch.jpegs, strict=True):
            if pipeline is None:
                pipeline = _decoder(on_gpu, prefetch_queue_depth=1, **options)
                pipeline.build()
            pipeline.feed_input("jpeg", [jpeg])
            try:
                for output in pipeline.run():
                    output.as_cpu()  # of a GPU: wait for it
            except RuntimeError as error:
                problem = str(error).strip().splitlines()[-1]
                stream.cannot_decode(sample_id, f"DALI cannot decode it: {problem}")
                pipeline, found = None, True
    return found
