"""Images that show what was done to them."""

import importlib.util
import io

import numpy as np
from PIL import Image

LOADERS = ["torch"]
if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
    LOADERS.append("dali")


def encoded(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def lopsided(height: int, width: int, seed: int) -> np.ndarray:
    """An image that no flip, turn, shift or exchange of channels leaves as it is."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)


def face(identity, variant, size=112):
    """A coarse pattern of an identity with noise of the image."""
    generator = np.random.default_rng(identity)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR))
    noise = np.random.default_rng((identity, variant)).normal(0, 25, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)
