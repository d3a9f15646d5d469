"""Weights as other people have them: every container, name and number format, and what is none."""

import argparse
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from partialfc.__main__ import main
from partialfc.backbones import BACKBONES, build_backbone
from partialfc.checkpoint import foreign
from partialfc.checkpoint.recognition import Known, recognise
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.checkpoint.warm_start import warm_start
from partialfc.commands._convert_checkpoint import layouts
from partialfc.config import ConfigError
from partialfc.errors import ForeignError
from tests.support.models import flat_model, runtime, settings

SIZE, DIM = 32, 48
NETWORK = "convnet_s"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    network = build_backbone(NETWORK, embedding_dim=DIM, image_size=SIZE).train()
    with torch.no_grad():
        network(torch.randn(8, 3, SIZE, SIZE))
    return network.state_dict()


def opened(path):
    return open_backbone(path, image_size=SIZE)


def refused(path):
    """The message about a file that must be refused, which never advises to load it unsafely."""
    with pytest.raises(ForeignError) as error:
        opened(path)
    message = str(error.value)
    assert message.startswith(str(path)), message
    for word in ("False", "weights_only", "\x1b", "\n"):
        assert word not in message, message
    return message


def same(found, state):
    return list(found) == list(state) and all(torch.equal(found[k], v) for k, v in state.items())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "iresnet2060" else ())
        for name in BACKBONES
    ],
)
def test_any_order_of_names_is_recognised_as_safetensors_has_it(name):
    """The embedding's size was taken from the last vector: by name that is another tensor."""
    with torch.device("meta"):
        state = build_backbone(name, embedding_dim=192, image_size=112).state_dict()
    shuffled = {key: state[key] for key in sorted(state, key=lambda key: key[::-1])}
    assert recognise(shuffled, Path("x")) == Known(name, 192, 112)


def test_safetensors_are_read_wherever_a_file_of_weights_is(state, tmp_path, capsys):
    save_file(state, tmp_path / "model.safetensors")
    trained = opened(tmp_path / "model.safetensors")
    assert trained.known == Known(NETWORK, DIM, SIZE)
    assert same(trained.state, state)
    assert layouts.find(tmp_path).source == tmp_path / "model.safetensors"
    out = tmp_path / "out"
    words = ["convert-checkpoint", "in", str(tmp_path / "model.safetensors"), str(out)]
    words += ["data.train=none.rec", "data.global_batch=8", "run.epochs=1"]
    assert main([*words, f"data.image_size={SIZE}"]) == 2
    assert "none.rec" in capsys.readouterr().err, "the backbone was recognised, the data is missing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_half_and_double_weights_become_fp32(state, dtype, suffix, tmp_path):
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    path = tmp_path / f"model.{suffix}"
    save_file(stored, path) if suffix == "safetensors" else torch.save(stored, path)
    trained = opened(path)
    wanted = {k: v.float() if v.is_floating_point() else v for k, v in stored.items()}
    assert same(trained.state, wanted)
    assert trained.backbone()(torch.zeros(1, 3, SIZE, SIZE)).dtype == torch.float32


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "backbone.", "model.", "module.model._orig_mod.module.backbone."],
)
def test_what_wrappers_put_before_the_names_is_taken_off(state, prefix, tmp_path):
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "a.pt")
    assert same(opened(tmp_path / "a.pt").state, state)


def test_compiled_parts_and_entries_of_a_larger_checkpoint(state, tmp_path):
    inside = {f"model.{k.replace('.', '._orig_mod.', 1)}": v for k, v in state.items()}
    torch.save({"epoch": 3, "state_dict": inside, "optimizer": {"lr": 0.1}}, tmp_path / "a.pt")
    assert same(opened(tmp_path / "a.pt").state, state)
    torch.save({**state, "module.fc.weight": state["fc.weight"]}, tmp_path / "b.pt")
    assert "module.fc.weight is there twice" in refused(tmp_path / "b.pt")


def zipped(source, path, kind=zipfile.ZIP_STORED, change=lambda name, data: data):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_a_compressed_file_is_read_and_not_mapped(state, tmp_path):
    """Mapped, the bytes of the compressed records were taken for weights without a word."""
    torch.save(state, tmp_path / "a.pt")
    zipped(tmp_path / "a.pt", tmp_path / "b.pt", zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.pt").stat().st_size < (tmp_path / "a.pt").stat().st_size
    assert same(opened(tmp_path / "b.pt").state, state)


def test_a_damaged_byte_is_seen(state, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[content.find(state["fc.weight"].numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(content)
    assert "is damaged: its checksum" in refused(path)


def test_records_that_are_too_short_or_unpack_without_end_are_refused(state, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    largest = state["fc.weight"].numel() * 4

    def short(name, data):
        return data[:-4096] if len(data) == largest else data

    zipped(tmp_path / "a.pt", tmp_path / "short.pt", change=short)
    assert "not a file of tensors" in refused(tmp_path / "short.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data/0", bytes(1 << 24))
    assert "it unpacks to 16,777,216 bytes" in refused(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.to("meta"), "fc.weight is on the meta device"),
        (lambda v: v.to_sparse(), "fc.weight is sparse"),
        (lambda v: v.to(torch.complex64), "fc.weight is of torch.complex64"),
        (lambda v: v[:1, :1].clone().expand(v.shape), "numbers of which fewer are stored"),
        (lambda v: v * torch.nan, "1 of 30 tensors hold values that are not finite: fc.weight"),
    ],
)
def test_a_tensor_without_its_values_is_refused_by_name(state, change, message, tmp_path):
    torch.save({**state, "fc.weight": change(state["fc.weight"])}, tmp_path / "a.pt")
    assert message in refused(tmp_path / "a.pt")


def test_what_is_no_file_is_not_waited_for(tmp_path, capsys):
    for suffix in ("pt", "safetensors"):
        pipe = tmp_path / f"pipe.{suffix}"
        os.mkfifo(pipe)
        assert "it is no file" in refused(pipe)
        assert main(["convert-checkpoint", "in", str(pipe), str(tmp_path / "out")]) == 4
        assert "it is no file" in capsys.readouterr().err
    assert "it is no file" in refused(Path("/dev/zero"))


def test_objects_are_named_without_the_advice_to_run_them(state, tmp_path):
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": state}, tmp_path / "a.pt")
    assert "it holds an object of argparse.Namespace" in refused(tmp_path / "a.pt")
    zipped(tmp_path / "a.pt", tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    assert "it is a TorchScript archive" in refused(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04 no zip")
    assert "it is damaged or of another format" in refused(tmp_path / "c.pt")


def test_the_nearest_network_is_named_with_what_differs():
    with torch.device("meta"):
        state = build_backbone("iresnet18", embedding_dim=256).state_dict()
    other = {**state, "conv1.weight": torch.empty(64, 3, 7, 7), "se.weight": torch.empty(3)}
    del other["layer1.0.bn1.bias"]
    with pytest.raises(ForeignError) as error:
        recognise(other, Path("x"))
    for part in (
        "The nearest is iresnet18",
        "1 tensor is of another shape (conv1.weight is [64, 3, 7, 7], must be [64, 3, 3, 3])",
        "1 tensor is missing (layer1.0.bn1.bias)",
        "1 tensor is too many (se.weight)",
    ):
        assert part in str(error.value)
    with pytest.raises(ForeignError, match="it is iresnet18 for images of 112 pixels, not of 96"):
        recognise(state, Path("x"), image_size=96)
    with pytest.raises(ForeignError, match=r"1 tensor is missing \(features.running_var\)"):
        recognise({k: v for k, v in state.items() if k != "features.running_var"}, Path("x"))
    stranger = {"input_layer.0.weight": torch.empty(64, 3, 3, 3), "bias": torch.empty(512)}
    with pytest.raises(ForeignError, match=r"its 2 tensors \(input_layer.0.weight, bias\) are of"):
        recognise(stranger, Path("x"))


def test_a_start_from_another_backbone_names_what_differs(state, tmp_path):
    """torch's own list of sixty words was passed on."""
    path = tmp_path / "model.pt"
    torch.save(state, path)
    config = settings(
        data={"train": "x.rec", "global_batch": 24, "image_size": SIZE},
        backbone={"name": NETWORK, "embedding_dim": DIM},
    )
    with pytest.raises(ConfigError) as error:
        warm_start(path, config, flat_model(config), runtime(), None)
    for part in ("another backbone than convnet_s", f"of {DIM} for", "missing (project.weight, "):
        assert part in str(error.value)


class Named:
    """Pickled as a call of what a name says."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_numbers_of_numpy_are_read_as_numbers(state, tmp_path):
    """A trainer's best accuracy, an np.float64 beside the weights, made the file unreadable."""
    numbers = {
        "best": np.float64(0.97),
        "epoch": np.int64(-7),
        "big": np.array(0.5, ">f4")[()],
        "done": np.bool_(True),
    }
    for name, number in ({"half": np.float16(0.5), "byte": np.uint8(255)} | numbers).items():
        numbers[name] = number
    torch.save({"state_dict": state, **numbers}, tmp_path / "a.pt")
    assert same(opened(tmp_path / "a.pt").state, state)
    found = foreign.read(tmp_path / "a.pt")
    for name, number in numbers.items():
        assert found[name] == number
        assert type(found[name]) is type(number.item())
    assert np.dtype("f8") == np.float64, "numpy's own stays what it is"


def test_what_is_no_number_of_numpy_is_refused(state, tmp_path):
    """Objects, arrays and texts; a hostile dtype, state and bytes, which never reach numpy."""
    scalar, eight = np.float64(0).__reduce__()
    for value, message in (
        (np.array([1, object()], object), "numpy"),
        (np.str_("text"), "it holds a value of numpy of kind 'U4', which is no number"),
        (np.datetime64("2020-01-01"), "of numpy of kind 'M8', which is no number"),
        (Named(scalar, (np.dtype("O"), b"")), "of numpy of kind 'O8', which is no number"),
        (Named(scalar, (eight[0], b"\0" * 7)), "a number of numpy of 7 bytes, not 8"),
        (Named(scalar, (7, b"\0" * 8)), "an object of numpy that is no number"),
        (Named(np.dtype, (["f8"],)), "of numpy of kind ['f8'], which is no number"),
        (Named(np.dtype, ("f8", False, True), (3, "%s")), "without its byte order"),
    ):
        torch.save({"state_dict": state, "best": value}, tmp_path / "a.pt")
        assert message in refused(tmp_path / "a.pt")


def test_a_state_dict_of_nothing_is_refused(tmp_path):
    for content, message in (
        ([1, 2], "holds a list, must be tensors by name"),
        ({}, "holds a dict, must be tensors by name"),
        ({"epoch": 3}, "its entry 'epoch' is a int, must be a tensor"),
    ):
        torch.save(content, tmp_path / "a.pt")
        assert message in refused(tmp_path / "a.pt")
    assert foreign.read(tmp_path / "a.pt") == {"epoch": 3}
