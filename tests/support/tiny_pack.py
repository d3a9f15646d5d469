"""A pack of a few small images of noise, for runs that only have to go through their steps."""

from pathlib import Path

import numpy as np

from partialfc.data.images.jpeg import encode
from partialfc.data.packs.writer import write_insightface_pack

IDENTITIES, IMAGES, SIZE = 24, 4, 32


def write_tiny_pack(path: Path) -> Path:
    """Write 4 images of 32 pixels of each of 24 identities."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (IDENTITIES * IMAGES, SIZE, SIZE, 3), np.uint8)
    samples = [(number // IMAGES, encode(one)) for number, one in enumerate(pixels)]
    write_insightface_pack(path, samples, IDENTITIES)
    return path
