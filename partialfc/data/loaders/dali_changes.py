"""The changes of :mod:`partialfc.data.augment` as DALI's own operators, on the CPU or the GPU.

Every number is an input: DALI draws none.
"""
# DALI makes many of its names at import, and its types are narrower than what it takes:
# mypy: disable-error-code="attr-defined, arg-type"

from typing import Any

from nvidia.dali import fn, pipeline, types

_GREY = 128.0


@pipeline.do_not_convert
def change(name: str, image: Any, value: Any, size: int) -> Any:
    """Return an image [S, S, 3] after one change.

    Args:
        name: One of :data:`~partialfc.data.augment.CHANGES` but crop, which comes before resizing.
        image: uint8, on either device.
        value: Its numbers, float32 [n] on the CPU.
        size: S.
    """
    match name:
        case "rotate":
            turn = fn.transforms.rotation(angle=value[0], center=(size / 2, size / 2))
            return fn.warp_affine(image, matrix=turn, interp_type=types.INTERP_LINEAR)
        case "colour":
            return fn.color_twist(
                image, brightness=value[0], contrast=value[1], saturation=value[2], hue=value[3]
            )
        case "grey":
            return fn.color_twist(image, saturation=value[0])
        case "blur":
            return fn.gaussian_blur(image, sigma=value[0])
        case "downscale":
            small = fn.resize(image, size=fn.stack(value[0], value[0]))
            return fn.resize(small, size=(size, size))
        case "jpeg":
            quality = fn.cast(value[0], dtype=types.INT32)
            return fn.jpeg_compression_distortion(image, quality=quality)
    assert name == "cutout", name
    return fn.erase(
        image, anchor=value[:2], shape=value[2:] - value[:2], axis_names="HW", fill_value=_GREY
    )
