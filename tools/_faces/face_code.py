"""The code of a procedural face: what makes an identity, and what changes from image to image.

Every number is a keyed function of the seed and an id, so an image depends on nothing else.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from partialfc.keyed import key, uniform

Code = Mapping[str, float]
"""A number for every name of ``FACE`` or ``SHOT``."""

FACE: Mapping[str, tuple[float, float]] = {
    # In half widths of the image, radians, or shares; a part with a negative value is not there.
    "width": (0.50, 0.66),
    "height": (0.74, 0.92),
    "jaw": (-0.34, 0.02),
    "crown": (-0.20, 0.04),
    "square": (0.0, 0.8),
    "melanin": (0.0, 1.0),
    "undertone": (-1.0, 1.0),
    "pattern_angle": (0.0, 3.14),
    "pattern_pitch": (6.0, 16.0),
    "pattern_phase": (0.0, 6.28),
    "pattern": (-0.05, 0.11),
    "freckles": (-1.2, 0.7),
    "freckle_pitch": (22.0, 40.0),
    "mole_1": (-1.0, 1.0),
    "mole_2": (-1.0, 1.0),
    "mole_3": (-1.0, 1.0),
    "mole_4": (-1.0, 1.0),
    "eye_gap": (0.175, 0.29),
    "eye_v": (-0.16, 0.04),
    "eye_width": (0.085, 0.15),
    "eye_height": (0.032, 0.075),
    "eye_tilt": (-0.28, 0.28),
    "eye_lid": (0.010, 0.030),
    "iris": (0.034, 0.056),
    "iris_tone": (0.0, 1.0),
    "brow_lift": (0.085, 0.17),
    "brow_width": (0.09, 0.17),
    "brow_thickness": (0.008, 0.036),
    "brow_tilt": (-0.38, 0.38),
    "brow_arch": (-1.0, 4.5),
    "nose_length": (0.17, 0.36),
    "nose_width": (0.05, 0.135),
    "nose_tip": (0.02, 0.055),
    "nose_depth": (0.06, 0.16),
    "mouth_v": (0.38, 0.56),
    "mouth_width": (0.12, 0.25),
    "lip_upper": (0.010, 0.055),
    "lip_lower": (0.016, 0.075),
    "mouth_curve": (-0.05, 0.05),
    "lip_red": (0.0, 1.0),
    "chin_cleft": (-1.0, 1.0),
    "cheek_line": (-0.8, 1.0),
    "ear_size": (0.06, 0.16),
    "ear_v": (-0.08, 0.14),
    "hair_tone": (0.0, 1.0),
    "hair_volume": (-0.02, 0.22),
    "hair_length": (-1.1, 1.2),
    "hair_line": (0.34, 0.70),
    "hair_bend": (-1.6, 2.2),
    "hair_part": (-0.6, 0.6),
    "hair_jag": (0.0, 0.06),
    "hair_strand": (14.0, 40.0),
    "bald": (-1.0, 0.15),
    "beard": (-1.6, 1.0),
    "moustache": (-1.6, 1.0),
    "beard_v": (0.18, 0.5),
    "glasses": (-1.6, 1.0),
    "glasses_size": (0.11, 0.17),
    "glasses_square": (0.0, 1.0),
    "glasses_tone": (0.0, 0.5),
}

"""What an identity is, uniform in [low, high): shape, colours, texture."""

SHOT: Mapping[str, tuple[float, float]] = {
    "yaw": (-0.26, 0.26),
    "pitch": (-0.17, 0.17),
    "roll": (-0.1, 0.1),
    "scale": (0.95, 1.07),
    "shift_x": (-0.04, 0.04),
    "shift_y": (-0.04, 0.04),
    "smile": (-0.03, 0.06),
    "smile_width": (-0.02, 0.03),
    "mouth_open": (-0.10, 0.06),
    "eye_open": (0.55, 1.15),
    "gaze": (-1.0, 1.0),
    "brow_raise": (-0.025, 0.035),
    "light_x": (-1.0, 1.0),
    "light_y": (-0.9, 0.5),
    "diffuse": (0.1, 0.7),
    "gain": (-0.4, 0.3),
    "warmth": (-0.28, 0.28),
    "tint": (-0.15, 0.15),
    "gamma": (-0.35, 0.35),
    "saturation": (0.6, 1.25),
    "bright": (-0.08, 0.12),
    "tousle": (-0.06, 0.06),
    "wears": (0.0, 1.0),
    "back_red": (0.05, 1.0),
    "back_green": (0.05, 1.0),
    "back_blue": (0.05, 1.0),
    "back_slope": (-0.5, 0.5),
    "back_angle": (0.0, 6.28),
    "back_pitch": (2.0, 18.0),
    "clutter_x": (-1.0, 1.0),
    "clutter_y": (-1.0, 1.0),
    "clutter_size": (0.1, 0.8),
    "clutter_tone": (0.0, 1.0),
    "cloth_red": (0.05, 1.0),
    "cloth_green": (0.05, 1.0),
    "cloth_blue": (0.05, 1.0),
    "occluder": (-1.2, 0.4),
    "occluder_x": (-0.8, 0.8),
    "occluder_y": (-0.8, 0.8),
    "occluder_long": (0.2, 0.7),
    "occluder_short": (0.08, 0.3),
    "occluder_angle": (0.0, 3.14),
    "occluder_red": (0.05, 0.95),
    "occluder_green": (0.05, 0.95),
    "occluder_blue": (0.05, 0.95),
    "blur": (0.0, 1.4),
    "noise": (0.0, 0.04),
    "noise_offset": (0.0, 1.0),
}

"""What one image of it is: pose, expression, light, background, occlusion, blur and noise."""

Colour = tuple[float, float, float]
SKIN = ((0.95, 0.78, 0.68), (0.86, 0.63, 0.48), (0.62, 0.42, 0.29), (0.36, 0.23, 0.16))
HAIR = (
    (0.06, 0.05, 0.05),
    (0.17, 0.10, 0.07),
    (0.36, 0.21, 0.11),
    (0.60, 0.27, 0.11),
    (0.80, 0.62, 0.34),
    (0.66, 0.65, 0.65),
)
IRIS = (
    (0.16, 0.09, 0.05),
    (0.36, 0.22, 0.09),
    (0.30, 0.42, 0.22),
    (0.25, 0.46, 0.66),
    (0.5, 0.58, 0.6),
)


def draw_codes(
    ranges: Mapping[str, tuple[float, float]], ids: NDArray[np.int64], seed: int, purpose: str
) -> list[Code]:
    """Return the code of every id."""
    columns = [
        (low + (high - low) * uniform(ids, key(seed, f"synthetic.{purpose}.{name}"))).tolist()
        for name, (low, high) in ranges.items()
    ]
    return [dict(zip(ranges, row, strict=True)) for row in zip(*columns, strict=True)]


def colour_at(palette: tuple[Colour, ...], position: float) -> Colour:
    """Return the colour at a position in [0, 1] of a palette."""
    stops = np.linspace(0.0, 1.0, len(palette))
    r, g, b = (float(np.interp(position, stops, channel)) for channel in zip(*palette, strict=True))
    return r, g, b


def darker(colour: Colour, factor: float) -> Colour:
    """Return a colour with every channel times a factor."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor
