"""Detectors of one network that a user brings: SCRFD and YuNet, told apart by their outputs.

Both say of every cell of three grids, whose cells are 8, 16 and 32 pixels wide, how likely a face
is there, where its edges are and where its five points. SCRFD: J. Guo et al., "Sample and
computation redistribution for efficient face detection", 2021, https://arxiv.org/abs/2105.04714.
YuNet: W. Wu, H. Peng, S. Yu, "YuNet: a tiny millisecond-level face detector", 2023.

Shape suffixes: N = places on a grid, F = faces.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from partialfc.alignment.boxes import Array, Faces, apart
from partialfc.alignment.network import Floats, Network, open_network

STRIDES = (8, 16, 32)
"""Pixels from cell to cell of the three grids."""
ANCHORS = 2
"""Places of SCRFD at each cell."""
LONGEST = 640
"""Longest side of the photo that a network of any size is shown, in pixels."""
YUNET = tuple(f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in STRIDES)
"""Names of the outputs of YuNet."""
MOST = 4096
"""Places that are compared with each other at most, the best ones."""

Decoder = Callable[[Mapping[str, Floats], int, int], Faces]


def open_one_shot(path: Path) -> "OneShot":
    """Return the detector of an ONNX file.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no ONNX model, or neither SCRFD with five points nor YuNet.
    """
    network = open_network(path)
    if set(network.outputs) == set(YUNET):
        return OneShot(network, yunet, yunet_input, most_overlap=0.3)
    if len(network.outputs) == 3 * len(STRIDES):
        return OneShot(network, scrfd, scrfd_input, most_overlap=0.4)
    raise ValueError(
        f"{path}: its {len(network.outputs)} outputs are {', '.join(network.outputs[:12])}; it "
        "must be an SCRFD with five points (9 outputs: scores, boxes and points of strides 8, 16 "
        f"and 32) or a YuNet of 2023 ({', '.join(YUNET)})."
    )


class OneShot:
    """A detector of one network that is shown the whole photo.

    A photo is made smaller where it does not fit, never larger, and black is put to its right and
    below: to the network's size, or for a network of any size to whole cells of the widest grid.
    """

    def __init__(
        self,
        network: Network,
        decode: Decoder,
        prepare: Callable[[NDArray[np.uint8]], Floats],
        *,
        most_overlap: float,
    ) -> None:
        self._network, self._decode, self._prepare = network, decode, prepare
        self._most_overlap = most_overlap

    def __call__(self, pixels: NDArray[np.uint8]) -> Faces:
        """Return the faces of an RGB photo [H, W, 3].

        Raises:
            ValueError: If the outputs are not of the lengths that they must have.
        """
        photo = Image.fromarray(pixels)
        fixed_height, fixed_width = self._network.input_shape[2:]
        scale = min(
            1.0, (fixed_width or LONGEST) / photo.width, (fixed_height or LONGEST) / photo.height
        )
        width, height = (max(1, round(side * scale)) for side in photo.size)
        if scale < 1:
            photo = photo.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        canvas = Image.new(
            "RGB", (fixed_width or _whole_cells(width), fixed_height or _whole_cells(height))
        )
        canvas.paste(photo, (0, 0))
        outputs = self._network.run(self._prepare(np.asarray(canvas)))
        named = dict(zip(self._network.outputs, outputs, strict=True))
        faces = self._decode(named, canvas.height, canvas.width)
        faces = faces.take(np.argsort(-faces.score_F, kind="stable")[:MOST])
        kept = faces.take(apart(faces.box_F4, faces.score_F, self._most_overlap))
        return kept.scaled(pixels.shape[1] / width, pixels.shape[0] / height)


def scrfd(outputs: Mapping[str, Floats], height: int, width: int) -> Faces:
    """Return what SCRFD says of a canvas, by the lengths of its outputs.

    A place is the corner of a cell, ``ANCHORS`` times. Its four numbers are the distances to the
    left, upper, right and lower edge of the face, its ten the way to each point, in cells.
    """
    found = []
    for stride, cell_N2 in _grids(height, width):
        place_N2 = np.repeat(cell_N2, ANCHORS, axis=0) * stride
        score_N, away_N4, way_N10 = (
            _one_of(outputs, len(place_N2), length) for length in (1, 4, 10)
        )
        likely = score_N[:, 0] > 0.5
        place_N2, away_N4 = place_N2[likely], away_N4[likely] * stride
        box_N4 = np.hstack([place_N2 - away_N4[:, :2], place_N2 + away_N4[:, 2:]])
        point_N52 = place_N2[:, None] + way_N10[likely].reshape(-1, 5, 2) * stride
        found.append(Faces(box_N4, score_N[likely, 0], point_N52))
    return _together(found)


def yunet(outputs: Mapping[str, Floats], height: int, width: int) -> Faces:
    """Return what YuNet says of a canvas, by the names of its outputs.

    The score is the geometric mean of two. A face's center is the corner of the cell and two of the
    four numbers, in cells; the other two are the logarithms of its width and height in cells.
    """
    found = []
    for stride, cell_N2 in _grids(height, width):
        kinds = (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10))
        seen_N1, there_N1, box_N4, way_N10 = (
            _rows(outputs[f"{kind}_{stride}"], len(cell_N2), length) for kind, length in kinds
        )
        score_N = np.sqrt(seen_N1.clip(0, 1) * there_N1.clip(0, 1))[:, 0]
        likely = score_N > 0.6
        cell_N2, box_N4 = cell_N2[likely], box_N4[likely]
        center_N2 = (cell_N2 + box_N4[:, :2]) * stride
        half_N2 = np.exp(box_N4[:, 2:].clip(max=10)) * stride / 2
        point_N52 = (cell_N2[:, None] + way_N10[likely].reshape(-1, 5, 2)) * stride
        found.append(
            Faces(np.hstack([center_N2 - half_N2, center_N2 + half_N2]), score_N[likely], point_N52)
        )
    return _together(found)


def scrfd_input(pixels: NDArray[np.uint8]) -> Floats:
    """Return [1, 3, H, W] in about [-1, 1], red first."""
    return _planes((pixels.astype(np.float32) - np.float32(127.5)) / np.float32(128))


def yunet_input(pixels: NDArray[np.uint8]) -> Floats:
    """Return [1, 3, H, W] in [0, 255], blue first."""
    return _planes(pixels[:, :, ::-1].astype(np.float32))


def _planes(pixels: Floats) -> Floats:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def _whole_cells(side: int) -> int:
    return -(-side // STRIDES[-1]) * STRIDES[-1]


def _grids(height: int, width: int) -> Iterator[tuple[int, Array]]:
    """Stride of each grid, and column and row of its cells, row by row."""
    for stride in STRIDES:
        rows, columns = np.mgrid[: height // stride, : width // stride]
        yield stride, np.stack([columns.ravel(), rows.ravel()], 1).astype(np.float64)


def _one_of(outputs: Mapping[str, Floats], rows: int, length: int) -> Array:
    for output in outputs.values():
        if output.shape[-1] == length and output.size == rows * length:
            return _rows(output, rows, length)
    shapes = [output.shape for output in outputs.values()]
    raise ValueError(
        f"the detector's outputs are {shapes}; one must have {rows} rows of {length} numbers."
    )


def _rows(output: Floats, rows: int, length: int) -> Array:
    if output.size != rows * length:
        raise ValueError(
            f"an output of the detector is {output.shape}, must be {rows} rows of {length}."
        )
    return np.nan_to_num(output.astype(np.float64), nan=0.0).reshape(rows, length)


def _together(found: list[Faces]) -> Faces:
    return Faces(
        np.concatenate([faces.box_F4 for faces in found]),
        np.concatenate([faces.score_F for faces in found]),
        np.concatenate([faces.point_F52 for faces in found]),
    )
