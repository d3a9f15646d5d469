"""Paints a procedural face: signed distances to simple shapes, on a canvas of numpy planes.

A canvas has coordinates in [-1, 1]. (p, q) are those of the head as seen, (a, b, z) a unit sphere
inside its outline, (u, v) the surface turned by yaw and pitch: what is drawn at a (u, v) moves and
narrows with the pose.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from partialfc.keyed import key, uniform
from tools._faces.face_code import HAIR, IRIS, SKIN, Code, Colour, colour_at, darker

Plane = np.ndarray
"""Float32, one value per pixel of a window."""
Window = tuple[slice, slice]


def paint(f: Code, s: Code, *, size: int, seed: int) -> NDArray[np.uint8]:
    """Return the image [size, size, 3] of a face ``f`` in a shot ``s``."""
    c = _Canvas(f, s, size)
    skin = colour_at(SKIN, f["melanin"])
    skin = (skin[0] * (1 + 0.04 * f["undertone"]), skin[1], skin[2] * (1 - 0.08 * f["undertone"]))
    hair = colour_at(HAIR, f["hair_tone"])
    _background(c, s)
    _behind(c, f, s, skin, hair)
    _ears(c, f, skin)
    _head(c, f, skin)
    _mouth(c, f, s, skin)
    _nose(c, f, s, skin)
    _eyes(c, f, s, hair)
    _hair(c, f, s, hair)
    _glasses(c, f, s)
    _light(c, s)
    _occlude(c, s)
    return _camera(c, s, seed).transpose(1, 2, 0)


@lru_cache(maxsize=4)
def _axis(size: int) -> Plane:
    return ((np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)


@lru_cache(maxsize=2)
def _grain(seed: int) -> Plane:
    index = np.arange(1 << 18, dtype=np.int64)
    total = np.sum([uniform(index, key(seed, "synthetic.grain", i)) for i in range(4)], axis=0)
    grain: Plane = ((total - 2.0) * 3.0**0.5).astype(np.float32)
    return grain


class _Canvas:
    """The image under work, and every pixel's place on the head; ``c`` in what paints on it.

    Attributes:
        canvas: RGB planes [3, size, size], linear light, about [0, 1].
        shade: What the light of the scene is multiplied by, [size, size].
        edge: Width of an anti-aliased edge.
        skin: How much of each pixel is head.
    """

    def __init__(self, face: Code, shot: Code, size: int) -> None:
        self.face, self.shot, self.size = face, shot, size
        self.canvas = np.empty((3, size, size), np.float32)
        self.shade = np.ones((size, size), np.float32)
        self.edge = 2.4 / size
        x = _axis(size)[None, :] - shot["shift_x"]
        y = _axis(size)[:, None] - shot["shift_y"]
        self.cos_roll, self.sin_roll = float(np.cos(shot["roll"])), float(np.sin(shot["roll"]))
        self.p = (x * self.cos_roll + y * self.sin_roll) / shot["scale"]
        self.q = (y * self.cos_roll - x * self.sin_roll) / shot["scale"]
        self.sy, self.cy = float(np.sin(shot["yaw"])), float(np.cos(shot["yaw"]))
        self.sp, self.cp = float(np.sin(shot["pitch"])), float(np.cos(shot["pitch"]))
        b = self.q / face["height"]
        a = self.p / (face["width"] * self._taper(b))
        a2, b2 = a * a, b * b
        self.r2 = a2 + b2 - face["square"] * np.minimum(a2 * b2, 1.0)
        z = np.sqrt(np.maximum(1.0 - self.r2, 0.0))
        self.a, self.b, self.z = a, b, z
        z1 = a * self.sy + z * self.cy
        self.u = (a * self.cy - z * self.sy) * face["width"]
        self.v = (b * self.cp - z1 * self.sp) * face["height"]
        self.skin = self.cover((np.sqrt(self.r2) - 1.0) * face["width"])

    def _taper(self, b: Plane) -> Plane:
        lower, upper = np.maximum(b, 0.0), np.minimum(b, 0.0)
        taper: Plane = 1.0 + self.face["jaw"] * lower**2 + self.face["crown"] * upper**2
        return taper

    def cover(self, distance: Plane) -> Plane:
        """How much of a pixel is inside, from its signed distance to the edge."""
        covered: Plane = np.clip(0.5 - distance * (1.0 / self.edge), 0.0, 1.0)
        return covered

    def window(self, u: float, v: float, radius: float) -> Window:
        """The pixels around a point of the face, so that a small part costs little."""
        f, s = self.face, self.shot
        x, y = u / f["width"], v / f["height"]
        z = max(0.0, 1 - x * x - y * y + f["square"] * x * x * y * y) ** 0.5
        b = y * self.cp + z * self.sp
        z1 = -y * self.sp + z * self.cp
        a = x * self.cy + z1 * self.sy
        p, q = a * f["width"] * float(self._taper(np.asarray(b))), b * f["height"]
        cx = s["shift_x"] + s["scale"] * (p * self.cos_roll - q * self.sin_roll)
        cy = s["shift_y"] + s["scale"] * (p * self.sin_roll + q * self.cos_roll)
        half, n = radius * s["scale"] * 1.25 + self.edge, self.size

        def span(c: float) -> slice:
            low = int((c - half + 1) * n / 2)
            high = int((c + half + 1) * n / 2) + 1
            return slice(min(max(low, 0), n), min(max(high, 0), n))

        return span(cy), span(cx)

    def lay(self, where: Window, mask: Plane, colour: Colour) -> None:
        part = self.canvas[:, where[0], where[1]]
        part += mask * (np.asarray(colour, np.float32)[:, None, None] - part)

    def multiply(self, where: Window, mask: Plane, factor: float) -> None:
        self.canvas[:, where[0], where[1]] *= 1.0 + mask * (factor - 1.0)


ALL: Window = (slice(None), slice(None))


def _background(c: _Canvas, s: Code) -> None:
    x, y = _axis(c.size)[None, :], _axis(c.size)[:, None]
    along = x * np.float32(np.cos(s["back_angle"])) + y * np.float32(np.sin(s["back_angle"]))
    tone = 1.0 + s["back_slope"] * along
    back = np.asarray((s["back_red"], s["back_green"], s["back_blue"]), np.float32)
    c.canvas[:] = back[:, None, None] * tone
    c.multiply(
        ALL,
        (np.cos(along * s["back_pitch"] + 9 * s["clutter_x"]) > 0.3),
        0.6 + 0.8 * s["clutter_tone"],
    )
    dx, dy = x - s["clutter_x"], y - s["clutter_y"]
    blob = c.cover(np.sqrt(dx * dx + dy * dy) - s["clutter_size"])
    c.lay(ALL, blob, (s["back_blue"], s["clutter_tone"], s["back_red"]))


def _behind(c: _Canvas, f: Code, s: Code, skin: Colour, hair: Colour) -> None:
    absp = np.abs(c.p)
    neck = np.maximum(absp - 0.62 * f["width"], 0.4 * f["height"] - c.q)
    c.lay(ALL, c.cover(neck), darker(skin, 0.72))
    dp, dq = c.p / 1.15, c.q - f["height"] * 1.62
    c.lay(
        ALL,
        c.cover(np.sqrt(dp * dp + dq * dq) - 0.72),
        (s["cloth_red"], s["cloth_green"], s["cloth_blue"]),
    )
    if f["bald"] > 0:
        return
    grow = f["hair_volume"] + 0.03
    dp, dq = c.p / (f["width"] + grow), (c.q + 0.06) / (f["height"] + grow)
    cap = (np.sqrt(dp * dp + dq * dq) - 1.0) * f["width"]
    upper = np.maximum(cap, c.q - 0.15)
    long = np.maximum(
        absp - f["width"] - 0.8 * grow, np.maximum(c.q - f["hair_length"], -0.1 - c.q)
    )
    distance = np.minimum(upper, long) if f["hair_length"] > 0 else upper
    c.lay(ALL, c.cover(distance), darker(hair, 0.62))


def _ears(c: _Canvas, f: Code, skin: Colour) -> None:
    for side in (-1.0, 1.0):
        dp = (c.p - side * f["width"] * (1.0 - 0.05 * abs(c.sy)) + 0.18 * c.sy) / (
            0.5 * f["ear_size"] + 0.02
        )
        dq = (c.q - f["ear_v"]) / (f["ear_size"] + 0.05)
        d = np.sqrt(dp * dp + dq * dq)
        c.lay(ALL, c.cover((d - 1.0) * 0.08), darker(skin, 0.9))
        c.multiply(ALL, c.cover((d - 0.6) * 0.08), 0.8)


def _head(c: _Canvas, f: Code, skin: Colour) -> None:
    c.lay(ALL, c.skin, skin)
    wave = (
        np.float32(np.cos(f["pattern_angle"])) * c.u + np.float32(np.sin(f["pattern_angle"])) * c.v
    )
    if f["pattern"] > 0:
        c.canvas *= 1.0 + c.skin * f["pattern"] * np.cos(
            wave * f["pattern_pitch"] + f["pattern_phase"]
        )
    if f["freckles"] > 0:
        k = f["freckle_pitch"]
        dots = np.cos(c.u * k + 3 * np.cos(c.v * 9 + f["pattern_phase"])) * np.cos(
            c.v * k + 2 * np.cos(c.u * 11)
        )
        band = np.clip(1.0 - np.abs(c.v - f["eye_v"] - 0.18) * 3.5, 0.0, 1.0)
        c.multiply(ALL, np.clip(dots * 2.5 - 1.2, 0.0, 1.0) * band * c.skin, 1.0 - f["freckles"])
    for first, second in (("mole_1", "mole_2"), ("mole_3", "mole_4")):
        u, v = 0.4 * f[first], 0.25 + 0.4 * f[second]
        w = c.window(u, v, 0.05)
        du, dv = c.u[w] - u, c.v[w] - v
        c.lay(w, 0.85 * c.cover(np.sqrt(du * du + dv * dv) - 0.018), darker(skin, 0.35))


def _eyes(c: _Canvas, f: Code, s: Code, hair: Colour) -> None:
    iris = colour_at(IRIS, f["iris_tone"])
    height = f["eye_height"] * min(1.0, s["eye_open"]) + 0.004
    for side in (-1.0, 1.0):
        u, v = side * f["eye_gap"], f["eye_v"]
        w = c.window(u, v, f["eye_width"] + 0.05)
        out, dv = (c.u[w] - u) * side, c.v[w] - v
        dv = dv + f["eye_tilt"] * out
        across = out / f["eye_width"]
        lid = height * (1.0 - across * across)
        d = np.abs(dv) - lid
        opening = c.cover(d * 0.8)
        c.multiply(w, c.cover(np.abs(dv + 0.02) - lid - 0.035), 0.86)
        c.lay(w, opening, (0.93, 0.92, 0.90))
        look = out * side - 0.25 * f["eye_width"] * s["gaze"]
        d_iris = np.sqrt(look * look + dv * dv)
        c.lay(w, opening * c.cover(d_iris - f["iris"]), iris)
        c.lay(w, opening * c.cover(d_iris - 0.45 * f["iris"]), (0.03, 0.03, 0.03))
        upper = np.maximum(np.abs(dv + lid) - f["eye_lid"], np.abs(out) - f["eye_width"])
        c.lay(w, 0.9 * c.cover(upper), (0.10, 0.07, 0.06))
        u, v = u * 1.06, v - f["brow_lift"] - s["brow_raise"]
        w = c.window(u, v, f["brow_width"] + 0.06)
        out, dv = (c.u[w] - u) * side, c.v[w] - v
        dv = dv + f["brow_tilt"] * out + f["brow_arch"] * (out * out - 0.006)
        across = out / f["brow_width"]
        d = np.maximum(
            np.abs(dv) - f["brow_thickness"] * (1.15 - 0.5 * across), np.abs(out) - f["brow_width"]
        )
        c.lay(w, 0.92 * c.cover(d), darker(hair, 0.75))


def _nose(c: _Canvas, f: Code, s: Code, skin: Colour) -> None:
    top = f["eye_v"] + 0.02
    length, width = f["nose_length"], f["nose_width"]
    w = c.window(0.0, top + 0.55 * length, 0.75 * length + width + 0.05)
    t = np.clip((c.v[w] - top) / length, 0.0, 1.2)
    du = c.u[w] - f["nose_depth"] * c.sy * c.cy * t
    dv = c.v[w] - top - length - f["nose_depth"] * c.sp * t
    across = du / (width * (0.4 + 0.6 * t * t))
    body = (
        np.clip(1.0 - across * across, 0.0, 1.0)
        * np.clip(1.0 - dv * 18.0, 0.0, 1.0)
        * np.minimum(1.0, 4 * t)
    )
    side = across * body * (2.2 * s["light_x"] * s["diffuse"])
    c.shade[w] *= 1.0 + np.clip(side, -0.5, 0.5) * 0.6
    c.canvas[:, w[0], w[1]] *= 1.0 + 0.10 * body * t
    tip = np.sqrt((du / width) ** 2 + (dv / f["nose_tip"]) ** 2)
    c.multiply(w, c.cover((np.abs(tip - 1.0) - 0.22) * f["nose_tip"]) * (dv > 0), 0.62)
    for sign in (-1.0, 1.0):
        hole = np.sqrt(
            ((du - sign * 0.5 * width) / (0.3 * width)) ** 2
            + ((dv - 0.2 * f["nose_tip"]) / 0.017) ** 2
        )
        c.lay(w, 0.85 * c.cover((hole - 1.0) * 0.017), darker(skin, 0.3))


def _mouth(c: _Canvas, f: Code, s: Code, skin: Colour) -> None:
    half = f["mouth_width"] + s["smile_width"]
    curve = f["mouth_curve"] + s["smile"]
    opened = max(0.0, s["mouth_open"])
    w = c.window(0.0, f["mouth_v"], half + 0.12)
    du, dv = c.u[w], c.v[w] - f["mouth_v"]
    across = du / half
    bend = np.maximum(1.0 - across * across, 0.0)
    dv = dv - curve * (bend - 0.6)
    bow = 1.0 - 0.35 * np.exp(-((across * 5.0) ** 2))
    upper, lower = f["lip_upper"] * bend * bow, f["lip_lower"] * bend + opened * bend
    lips = np.maximum(-dv - upper, dv - lower)
    tone = 0.86 - 0.16 * f["lip_red"]
    red = (
        skin[0] * tone * 1.02,
        skin[1] * tone * (0.62 + 0.1 * f["lip_red"]),
        skin[2] * tone * 0.66,
    )
    c.multiply(w, c.cover(np.abs(dv - lower - 0.035) - 0.016 * bend), 0.88)
    c.lay(w, c.cover(lips) * (bend > 0), red)
    inner = np.maximum(-dv, dv - opened * bend) - 0.006 * bend
    c.lay(w, c.cover(inner) * (bend > 0), (0.16, 0.04, 0.05))
    if opened > 0.02:
        c.lay(
            w,
            c.cover(np.maximum(-dv, dv - 0.4 * opened * bend)) * (bend > 0.15),
            (0.92, 0.91, 0.87),
        )
    if f["chin_cleft"] > 0.5:
        w = c.window(0.0, 0.86 * f["height"], 0.12)
        du, dv = c.u[w], c.v[w] - 0.86 * f["height"]
        c.multiply(w, c.cover(np.maximum(np.abs(du) - 0.008, np.abs(dv) - 0.05)), 0.75)
    if f["cheek_line"] > 0:
        for side in (-1.0, 1.0):
            u, v = side * (f["nose_width"] + 0.07), f["mouth_v"] - 0.11
            w = c.window(u, v, 0.16)
            du, dv = (c.u[w] - u) * side, c.v[w] - v
            c.multiply(
                w,
                c.cover(np.maximum(np.abs(du - 0.45 * dv) - 0.008, np.abs(dv) - 0.1)),
                1.0 - 0.35 * f["cheek_line"],
            )


def _hair(c: _Canvas, f: Code, s: Code, hair: Colour) -> None:
    if f["beard"] > 0:
        edge = f["mouth_v"] - f["beard_v"] * 0.4 + 0.9 * f["beard_v"] - 1.3 * c.u * c.u
        d = np.maximum(edge - c.v, 0.0 - c.v)
        mouth = (
            np.sqrt((c.u / (f["mouth_width"] + 0.02)) ** 2 + ((c.v - f["mouth_v"]) / 0.10) ** 2)
            - 1.0
        )
        c.lay(
            ALL,
            c.skin
            * c.cover(np.maximum(d * 0.6, -0.06 * mouth))
            * (0.35 + 0.6 * min(1.0, f["beard"] * 2)),
            darker(hair, 0.85),
        )
    if f["moustache"] > 0:
        v = f["mouth_v"] - f["lip_upper"] - 0.045
        w = c.window(0.0, v, 0.26)
        du, dv = c.u[w], c.v[w] - v - 1.2 * c.u[w] * c.u[w]
        d = np.maximum(np.abs(dv) - 0.032, np.abs(du) - f["mouth_width"])
        c.lay(w, 0.85 * c.cover(d), darker(hair, 0.85))
    if f["bald"] > 0:
        return
    line = -f["hair_line"] * f["height"] + f["hair_bend"] * (c.u - 0.4 * f["hair_part"]) ** 2 * 0.5
    line = line + s["tousle"] * c.u + f["hair_jag"] * np.cos(c.u * f["hair_strand"])
    strands = 1.0 + 0.14 * np.cos((c.u + 0.35 * f["hair_part"] * c.v) * f["hair_strand"])
    front = c.cover(
        np.maximum(c.v - line, (np.sqrt(c.r2) - 1.0) * f["width"] - 0.5 * f["hair_volume"]) * 0.8
    )
    c.canvas *= 1.0 + front * (strands - 1.0)
    c.canvas += front * (np.asarray(hair, np.float32)[:, None, None] * strands - c.canvas)


def _glasses(c: _Canvas, f: Code, s: Code) -> None:
    if f["glasses"] <= 0 or s["wears"] > 0.85:
        return
    for side in (-1.0, 1.0):
        u, v = side * f["eye_gap"], f["eye_v"]
        w = c.window(u, v, f["glasses_size"] * 1.4)
        du, dv = (
            np.abs(c.u[w] - u) / f["glasses_size"],
            np.abs(c.v[w] - v) / (0.8 * f["glasses_size"]),
        )
        round_, square = np.sqrt(du * du + dv * dv), np.maximum(du, dv)
        d = (
            np.abs(round_ + f["glasses_square"] * (square - round_) - 1.0) * f["glasses_size"]
            - 0.014
        )
        c.lay(w, c.cover(d), (f["glasses_tone"], 0.6 * f["glasses_tone"], 0.5 * f["glasses_tone"]))
    w = c.window(0.0, f["eye_v"], 0.2)
    du, dv = c.u[w], c.v[w] - f["eye_v"]
    d = np.maximum(np.abs(dv) - 0.014, np.abs(du) - f["eye_gap"] + f["glasses_size"])
    c.lay(w, c.cover(d), (f["glasses_tone"], 0.6 * f["glasses_tone"], 0.5 * f["glasses_tone"]))


def _light(c: _Canvas, s: Code) -> None:
    lx, ly = s["light_x"], s["light_y"]
    norm = (lx * lx + ly * ly + 0.6) ** 0.5
    lit = np.maximum((c.a * lx + c.b * ly + c.z * 0.6**0.5) / norm, 0.0)
    inside = np.clip((1.15 - c.r2) * 4.0, 0.0, 1.0)
    c.shade *= 1.0 + inside * s["diffuse"] * (1.25 * lit - 1.0)
    warm, tint, gain = s["warmth"], s["tint"], np.exp(s["gain"])
    light = np.asarray((1 + warm, 1 + tint, 1 - warm), np.float32) * np.float32(gain)
    c.canvas *= c.shade * light[:, None, None]


def _occlude(c: _Canvas, s: Code) -> None:
    if s["occluder"] <= 0:
        return
    x, y = _axis(c.size)[None, :] - s["occluder_x"], _axis(c.size)[:, None] - s["occluder_y"]
    co, si = np.float32(np.cos(s["occluder_angle"])), np.float32(np.sin(s["occluder_angle"]))
    dx, dy = x * co + y * si, y * co - x * si
    d = np.sqrt((dx / s["occluder_long"]) ** 2 + (dy / s["occluder_short"]) ** 2) - 1.0
    c.lay(
        ALL,
        c.cover(d * s["occluder_short"]),
        (s["occluder_red"], s["occluder_green"], s["occluder_blue"]),
    )


def _camera(c: _Canvas, s: Code, seed: int) -> NDArray[np.uint8]:
    img = c.canvas
    grey = img.mean(axis=0)
    img = grey + s["saturation"] * (img - grey)
    amount, index = s["blur"], np.arange(c.size)
    following = np.minimum(index + 1, c.size - 1)
    while amount > 0:
        k = 0.25 * min(1.0, amount)
        for axis in (1, 2):
            before, after = img.take(np.maximum(index - 1, 0), axis), img.take(following, axis)
            img = img + k * (before + after - 2.0 * img)
        amount -= 1.0
    grain = _grain(seed)
    start = int(s["noise_offset"] * (len(grain) - img.size))
    img = img + s["noise"] * grain[start : start + img.size].reshape(img.shape)
    img = np.exp(np.exp(np.float32(s["gamma"])) * np.log(np.clip(img, 0.004, 1.4)))
    pixels: NDArray[np.uint8] = np.clip((img + s["bright"]) * 255.0, 0.0, 255.0).astype(np.uint8)
    return pixels
