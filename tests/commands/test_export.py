"""Exported files next to the original, on real handwriting, and as insightface would open them."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from partialfc.__main__ import main
from partialfc.alignment.crop import TEMPLATE, align
from partialfc.backbones import build_backbone
from partialfc.checkpoint.recognition import Known
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands import export
from partialfc.commands._export import check
from partialfc.data.images.formats import resize
from partialfc.data.images.jpeg import decode
from partialfc.data.sets.pairs import read_pairs
from partialfc.protocols import unit_rows
from tests.support.models import write_convnet
from tests.support.places import FIXTURES

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

PAIRS = FIXTURES / "pairs" / "pairs_proto4.bin"
SIZE, DIM = 48, 64
SIZED = ["--image-size", str(SIZE)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_convnet(tmp_path_factory.mktemp("model") / "model.pt", size=SIZE, dim=DIM)


@pytest.fixture(scope="module", params=["outside", "inside"])
def exported(request, model, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    words = [str(model), str(out), "--check", str(PAIRS), "--data-licence", "CC0", *SIZED]
    words += ["--inside"] if request.param == "inside" else ["--formats", "onnx,fp16"]
    assert export.main(words) == 0, "a file is not the original"
    return request.param, out


def embedded(model, images):
    """What the original makes of RGB images."""
    backbone = build_backbone("convnet_s", embedding_dim=DIM, image_size=SIZE).eval()
    backbone.load_state_dict(torch.load(model, weights_only=True))
    values = (np.stack(images).astype(np.float32) - 127.5) / 127.5
    with torch.no_grad():
        return backbone(torch.from_numpy(values.transpose(0, 3, 1, 2).copy())).numpy()


class ArcFaceOnnx:
    """What insightface's runtime does with a file: shapes, names of nodes, one output."""

    def __init__(self, path):
        nodes = onnx.load(path).graph.node[:8]
        subtracts = any(node.name.startswith(("Sub", "_minus")) for node in nodes)
        multiplies = any(node.name.startswith(("Mul", "_mul")) for node in nodes)
        self.mean, self.std = (0.0, 1.0) if subtracts and multiplies else (127.5, 127.5)
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        first = self.session.get_inputs()[0]
        self.name, self.size = first.name, tuple(first.shape[2:4][::-1])
        assert len(self.session.get_outputs()) == 1

    def embed(self, images):
        assert self.size == (SIZE, SIZE)
        blob = (np.stack(images).astype(np.float32) - self.mean) / self.std
        return self.session.run(None, {self.name: blob.transpose(0, 3, 1, 2).copy()})[0]


@pytest.mark.parametrize(
    ("file", "smallest"), [("model.onnx", 0.99999), ("model_fp16.onnx", 0.999)]
)
def test_insightfaces_runtime_makes_the_originals_embeddings(exported, model, file, smallest):
    """The wrong mean, a swapped channel or a fixed batch would show here."""
    _, out = exported
    images = [decode(np.frombuffer(i, np.uint8)) for i in read_pairs(PAIRS).images[:7]]
    images = [resize(pixels, SIZE) for pixels in images]
    runtime = ArcFaceOnnx(out / file)
    wanted = embedded(model, images)
    for number in (1, len(images)):
        found = runtime.embed(images[:number])
        cosine = (found * wanted[:number]).sum(1) / (
            np.linalg.norm(found, axis=1) * np.linalg.norm(wanted[:number], axis=1)
        )
        assert cosine.min() > smallest


@pytest.mark.parametrize(("file", "smallest"), [("model.onnx", 0.9999), ("model_fp16.onnx", 0.999)])
def test_insightface_itself_opens_the_files(exported, model, file, smallest):
    """Its own class, with its own blob of images, where it is installed (pip install insightface).

    Shown with insightface 2.1: it takes shape, name, mean and std, inside and outside.
    """
    arcface_onnx = pytest.importorskip("insightface.model_zoo.arcface_onnx", exc_type=ImportError)
    kind, out = exported
    theirs = arcface_onnx.ArcFaceONNX(model_file=str(out / file))
    theirs.prepare(-1)
    assert theirs.input_size == (SIZE, SIZE)
    assert (theirs.input_mean, theirs.input_std) == (
        (0.0, 1.0) if kind == "inside" else (127.5, 127.5)
    )
    images = [decode(np.frombuffer(i, np.uint8)) for i in read_pairs(PAIRS).images[:7]]
    images = [resize(pixels, SIZE) for pixels in images]
    found, wanted = (
        theirs.get_feat([pixels[:, :, ::-1] for pixels in images]),
        embedded(model, images),
    )
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    cosine = (found * wanted).sum(1) / norms
    assert cosine.min() > smallest


def test_a_face_is_aligned_as_insightface_does_it():
    """Its template, its transform of five points that are turned, small and noisy, its pixels."""
    face_align = pytest.importorskip("insightface.utils.face_align", exc_type=ImportError)
    np.testing.assert_allclose(TEMPLATE, face_align.arcface_dst, atol=1e-4)
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    photo = resize(coarse, 300)
    turn = np.array([[0.9, -0.5], [0.5, 0.9]])
    points = TEMPLATE @ turn.T + [90, 60] + generator.normal(0, 2, (5, 2))
    theirs = face_align.norm_crop(photo, landmark=points, image_size=112)
    assert np.abs(align(photo, points).astype(int) - theirs).max() <= 3


def test_every_format_is_written_and_the_card_says_what_is_known(exported):
    kind, out = exported
    names = {path.name for path in out.iterdir()}
    if kind == "outside":
        assert names == {"README.md", "model.onnx", "model_fp16.onnx"}
        return
    assert names == {*export.FILES.values(), "README.md"}
    card = (out / "README.md").read_text()
    for words in (
        "convnet_s",
        "model_int8.onnx",
        "Licence of the training data: CC0",
        "limits",
    ):
        assert words in card
    assert str(out.parent) not in card, "no path of this machine"
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["backbone"] == "convnet_s"
    again = open_backbone(out / "model.safetensors", image_size=SIZE)
    assert again.known == Known("convnet_s", DIM, SIZE), "it was refused as of no backbone"
    fp32, int8 = onnx.load(out / "model.onnx"), onnx.load(out / "model_int8.onnx")
    (opset,) = (entry.version for entry in fp32.opset_import if entry.domain == "")
    assert opset == 18, "the README says so"
    (first,) = fp32.graph.input
    dims = first.type.tensor_type.shape.dim
    assert dims[0].dim_param, "the batch is free"
    assert [dim.dim_value for dim in dims[1:]] == [3, SIZE, SIZE]
    assert sum(node.op_type == "QuantizeLinear" for node in int8.graph.node) > 5
    assert (out / "model_int8.onnx").stat().st_size < 0.6 * (out / "model.onnx").stat().st_size
    weights = [
        w for t in int8.graph.initializer if (w := onnx.numpy_helper.to_array(t)).dtype == np.int8
    ]
    largest = max(abs(weight.astype(int)).max() for weight in weights if weight.ndim > 1)
    assert largest <= 64, "a CPU without VNNI overflows at two products of 8 bits: cosine 0.3"


def test_the_cards_lines_run_the_file_and_give_the_originals_cosine(exported, model):
    """Wrong pixels, no mirror image or another file's name would show in the cosine."""
    _, out = exported
    card = (out / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.splitlines()) - code.count("\n\n") <= 10
    images = [decode(np.frombuffer(i, np.uint8)) for i in read_pairs(PAIRS).images[:2]]
    images = [resize(pixels, SIZE) for pixels in images]
    for pixels, name in zip(images, ("one.png", "other.png"), strict=True):
        Image.fromarray(pixels).save(out / name)
    code = code.replace(".jpg", ".png")
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
    for name in ("one.png", "other.png"):
        (out / name).unlink()
    assert done.returncode == 0, done.stderr
    both = embedded(model, images) + embedded(model, [pixels[:, ::-1] for pixels in images])
    unit = both / np.linalg.norm(both, axis=1, keepdims=True)
    assert float(done.stdout) == pytest.approx(float(unit[0] @ unit[1]), abs=1e-4)


def test_the_card_says_the_threshold_at_stated_rates_and_the_rule(exported, model):
    """The cosine of the table is exceeded by as many pairs of different people as its rate allows.

    Counted again on the original, whose embeddings the file's are.
    """
    _, out = exported
    card, pairs = (out / "README.md").read_text(), read_pairs(PAIRS)
    rows = dict(re.findall(r"^\| (0\.\d+|1e-\d+) \| (-?\d\.\d+) \|$", card, re.MULTILINE))
    backbone = build_backbone("convnet_s", embedding_dim=DIM, image_size=SIZE).eval()
    backbone.load_state_dict(torch.load(model, weights_only=True))
    unit = unit_rows(check.original(backbone, pairs, SIZE, True).embeddings_ND, "original")
    cosine = (unit[0::2] * unit[1::2]).sum(1)[~pairs.same]
    assert "0.1" in rows
    for far, threshold in rows.items():
        assert (cosine > float(threshold) + 1e-3).mean() <= float(far)
        assert (cosine > float(threshold) - 1e-3).mean() > float(far)
    assert "| the original |" in card
    assert "0 lies in the interval" in card


def test_pairs_that_fell_the_other_way_are_a_change_only_beyond_chance():
    """One of 1,000 was called NOT THE ORIGINAL at cosines of 1.000000."""

    def told(lost, won, total):
        change, width = check.paired(lost, won, total)
        return abs(change) > width

    assert not told(0, 0, 1000)
    assert not told(1, 0, 1000)
    assert not told(0, 3, 1000)
    assert not told(30, 20, 6000)
    assert told(8, 0, 1000), "a fair coin falls so once in 128 times"
    assert told(40, 5, 6000)
    assert check.paired(40, 5, 6000)[0] == -35 / 6000


def shifted(model, by):
    """The same backbone, its embeddings off by a constant."""
    state = torch.load(model, weights_only=True)
    return {**state, "features.bias": state["features.bias"] + by}


def test_a_file_that_is_not_the_original_is_told_and_the_card_says_so(
    model, tmp_path, monkeypatch, capsys
):
    """A check that cannot fail is none: what is read back is another network's."""
    monkeypatch.setattr(export, "read_backbone", lambda path: shifted(model, 0.3))
    words = [str(model), str(tmp_path), "--check", str(PAIRS), "--formats", "safetensors", *SIZED]
    assert export.main(words) == 1
    assert "NOT THE ORIGINAL" in capsys.readouterr().out
    assert "**NOT THE ORIGINAL**" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr(export, "read_backbone", lambda path: shifted(model, 1e-7))
    assert export.main(words) == 0
    assert "NOT THE ORIGINAL" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "tflite", "--check", str(PAIRS)], "--formats: tflite: must be some of"),
        ([], "--check: give a .bin of pairs"),
        (["--check", "missing.bin"], "missing.bin"),
    ],
)
def test_what_cannot_be_exported_is_refused(model, tmp_path, words, message, capsys):
    assert main(["export", str(model), str(tmp_path), *words, *SIZED]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_is_done(model, tmp_path, monkeypatch, capsys):
    """A newcomer without the extra gets the command that installs it, not a stack trace."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "partialfc.commands._export.onnx_file", raising=False)
    words = [str(model), str(tmp_path / "out"), "--check", str(PAIRS), *SIZED]
    assert main(["export", *words]) == 2
    assert "onnxruntime is not installed: pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
