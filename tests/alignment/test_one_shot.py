"""SCRFD and YuNet by their published rules, on ONNX files whose answers are known."""

import numpy as np
import pytest

from partialfc.alignment import one_shot
from partialfc.alignment.one_shot import YUNET, open_one_shot

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

STRIDES = (8, 16, 32)
POINTS = np.array([[-6.0, -5], [6, -5], [0, 1], [-4, 7], [4, 7]])
"""The five points of the faces here, from their centers, in pixels."""


def model(path, answers, *, side=None, kind="constant"):
    """An ONNX file whose outputs are ``answers`` by name, and that adds 0 times its input to each.

    With ``kind="input"`` the score of one cell is the mean of the input instead.
    """
    helper = onnx.helper
    shape = [1, 3, side or "height", side or "width"]
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "factor"], ["rest"]),
    ]
    arrays = [onnx.numpy_helper.from_array(np.float32(0 if kind == "constant" else 1), "factor")]
    outputs = []
    for name, answer in answers.items():
        arrays.append(onnx.numpy_helper.from_array(answer.astype(np.float32), f"{name}_known"))
        nodes.append(helper.make_node("Add", [f"{name}_known", "rest"], [name]))
        outputs.append(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(answer.shape))
        )
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "made", [image], outputs, initializer=arrays)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(made.SerializeToString())
    return path


def scrfd(height, width, faces):
    """Outputs of SCRFD: ``faces`` are (stride, row, column, anchor, score, left, top, right, bottom
    of the box from the cell's corner in cells)."""
    kinds = {"score": 1, "bbox": 4, "kps": 10}
    found = {}
    for kind, length in kinds.items():
        for stride in STRIDES:
            found[f"{kind}{stride}"] = np.zeros(
                (2 * (height // stride) * (width // stride), length), np.float32
            )
    for stride, row, column, anchor, score, *edges in faces:
        at = 2 * (row * (width // stride) + column) + anchor
        found[f"score{stride}"][at] = score
        found[f"bbox{stride}"][at] = edges
        found[f"kps{stride}"][at] = (POINTS / stride).ravel()
    return {str(400 + i): array for i, array in enumerate(found.values())}


def yunet(height, width, faces):
    """Outputs of YuNet: (stride, row, column, cls, obj, x, y, width, height in cells)."""
    found = {
        name: np.zeros(
            (
                1,
                (height // int(name.split("_")[1])) * (width // int(name.split("_")[1])),
                {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}[name.split("_")[0]],
            ),
            np.float32,
        )
        for name in YUNET
    }
    for stride, row, column, seen, there, x, y, wide, high in faces:
        at = row * (width // stride) + column
        found[f"cls_{stride}"][0, at] = seen
        found[f"obj_{stride}"][0, at] = there
        found[f"bbox_{stride}"][0, at] = [x, y, np.log(wide), np.log(high)]
        found[f"kps_{stride}"][0, at] = (POINTS / stride + [x, y]).ravel()
    return found


def test_scrfd_is_read_by_its_rule(tmp_path):
    """Corner of the cell less and plus distances; the worse of two that overlap goes."""
    answers = scrfd(
        64,
        96,
        [
            (8, 3, 5, 1, 0.9, 1, 2, 3, 4),
            (8, 3, 5, 0, 0.8, 1, 2, 3, 3.5),
            (32, 1, 2, 0, 0.7, 0.5, 0.25, 0.5, 0.5),
            (16, 0, 0, 0, 0.49, 1, 1, 1, 1),
        ],
    )
    detector = open_one_shot(model(tmp_path / "a.onnx", answers))
    faces = detector(np.zeros((60, 90, 3), np.uint8))  # whole cells of 32: 64 x 96
    np.testing.assert_allclose(faces.box_F4, [[32, 8, 64, 56], [48, 24, 80, 48]], atol=1e-5)
    np.testing.assert_allclose(faces.score_F, [0.9, 0.7], atol=1e-6)
    np.testing.assert_allclose(faces.point_F52[0], POINTS + np.array([40, 24]), atol=1e-5)
    np.testing.assert_allclose(faces.point_F52[1], POINTS + np.array([64, 32]), atol=1e-5)


def test_yunet_is_read_by_its_rule(tmp_path):
    """Center and logarithms of the sides in cells; the score is the geometric mean of two."""
    answers = yunet(
        64, 64, [(8, 2, 4, 1.0, 0.81, 0.5, 0.25, 3, 4), (16, 3, 0, 0.5, 0.5, 0, 0, 1, 1)]
    )
    detector = open_one_shot(model(tmp_path / "face_detection_yunet.onnx", answers, side=64))
    faces = detector(np.zeros((64, 64, 3), np.uint8))
    center = np.array([(4 + 0.5) * 8, (2 + 0.25) * 8])
    np.testing.assert_allclose(faces.box_F4, [[24, 2, 48, 34]], atol=1e-4)
    np.testing.assert_allclose(faces.score_F, [0.9], atol=1e-6)
    np.testing.assert_allclose(faces.point_F52[0], POINTS + center, atol=1e-4)


def test_a_photo_that_is_too_large_is_made_smaller_and_places_are_the_photos(tmp_path):
    answers = yunet(64, 64, [(8, 2, 4, 1, 1, 0, 0, 2, 2)])
    detector = open_one_shot(model(tmp_path / "a.onnx", answers, side=64))
    faces = detector(np.zeros((128, 256, 3), np.uint8))  # a quarter: 32 x 64 on the canvas
    np.testing.assert_allclose(faces.box_F4, [[96, 32, 160, 96]], atol=1e-4)
    np.testing.assert_allclose(faces.point_F52[0], 4 * (POINTS + np.array([32, 16])), atol=1e-4)
    small = detector(np.zeros((20, 30, 3), np.uint8))  # never larger
    np.testing.assert_allclose(small.box_F4, [[24, 8, 40, 24]], atol=1e-4)


def test_each_is_shown_the_levels_it_was_trained_on(tmp_path):
    """SCRFD: (x - 127.5) / 128, red first; YuNet: 0 to 255, blue first."""
    level, pixels = 0.55, np.full((32, 32, 3), 204, np.uint8)
    shown = (204 - 127.5) / 128
    low = scrfd(32, 32, [(8, 1, 1, 0, level - shown, 1, 1, 1, 1)])
    found = open_one_shot(model(tmp_path / "s.onnx", low, kind="input"))(pixels)
    assert found.score_F.max() > level - 1e-3
    colour = np.zeros((1, 1, 3), np.uint8) + np.uint8([10, 20, 30])
    assert one_shot.yunet_input(colour).ravel().tolist() == [30, 20, 10]
    np.testing.assert_allclose(
        one_shot.scrfd_input(colour).ravel(), (np.array([10, 20, 30]) - 127.5) / 128, rtol=1e-6
    )


def test_what_is_no_detector_is_named(tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match=r"text.onnx: no ONNX model"):
        open_one_shot(tmp_path / "text.onnx")
    with pytest.raises(FileNotFoundError):
        open_one_shot(tmp_path / "none.onnx")
    three = {name: np.zeros((1, 4)) for name in ("loc", "conf", "iou")}
    with pytest.raises(ValueError, match="its 3 outputs are loc, conf, iou; it must be an SCRFD"):
        open_one_shot(model(tmp_path / "three.onnx", three))
    nine = {str(i): np.zeros((5, 4)) for i in range(9)}
    with pytest.raises(ValueError, match="one must have 32 rows of 1 numbers"):
        open_one_shot(model(tmp_path / "nine.onnx", nine))(np.zeros((32, 32, 3), np.uint8))
