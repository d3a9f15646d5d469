"""From arcface_torch and back: every layout of its files, written here with torch.save."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from partialfc.__main__ import main
from partialfc.backbones import build_backbone
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.foreign import read, read_backbone
from partialfc.checkpoint.recognition import recognise
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands import convert_checkpoint, evaluate
from partialfc.commands._convert_checkpoint import layouts, settings
from partialfc.commands._convert_checkpoint.fill import fill
from partialfc.config import ConfigError, load
from partialfc.data.dataset import open_dataset
from partialfc.data.packs.pack import open_pack
from partialfc.errors import ForeignError
from partialfc.model.build import build
from partialfc.model.step import train_step
from partialfc.training.must_match import must_match
from tests.support.arcface_torch_files import DIM, SETTINGS, SIZE, Training, cut
from tests.support.models import runtime, share
from tests.support.places import FIXTURES
from tests.support.processes import python
from tests.support.ranks import run_on_ranks
from tools import omniglot

IDENTITIES = 40


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    archive = FIXTURES / "omniglot" / "omniglot_background.npz"
    size = ["--characters", "16", "--held-out", "6", "--pairs", "200", "--size", str(SIZE)]
    assert omniglot.main([str(archive), str(folder), *size]) == 0
    assert open_pack(folder / "train.rec").num_identities == IDENTITIES
    return folder


@pytest.fixture
def their_config(packs, tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(SETTINGS.replace("REC", str(packs)))
    return path


def batches(number, start=0):
    for step in range(start, start + number):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(16, 3, SIZE, SIZE, generator=generator)
        yield images, torch.randint(0, IDENTITIES, (16,), generator=generator)


def convert(source, out, *words):
    return main(["convert-checkpoint", "in", str(source), str(out), *map(str, words)])


WORDS = (f"data.image_size={SIZE}", "run.device=cpu")


@pytest.fixture
def our_settings(packs, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(
        f'data = {{train = "{packs}/train.rec", global_batch = 16, image_size = {SIZE}}}\n'
        f'backbone = {{name = "convnet_s", embedding_dim = {DIM}}}\nprecision.compute = "fp32"\n'
        f'run = {{steps = 30, device = "cpu"}}\n'
    )
    return path


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ("checkpoint", 1),
        ("checkpoint", 7),
        ("softmax_fc", 3),
        ("rank", 4),
        ("rank", 5),
        ("model", 1),
    ],
)
def test_every_layout_of_any_number_of_ranks_becomes_a_checkpoint(
    layout, ranks, our_settings, tmp_path, capsys
):
    """A tensor that is lost, cut at the wrong row or of another rank would differ."""
    theirs = Training(IDENTITIES)
    theirs.take(batches(2), 30, 0.02)
    theirs.save(tmp_path / "theirs", layout, ranks)
    out = tmp_path / "ours"
    assert convert(tmp_path / "theirs", out, "--settings", our_settings) == 0
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name == ("step_00000002" if layout == "checkpoint" else "step_00000000")
    backbone = load_file(checkpoint / "backbone.safetensors")
    wanted = theirs.backbone.state_dict()
    assert backbone.keys() == wanted.keys()
    assert all(torch.equal(backbone[name], value) for name, value in wanted.items())
    centers = load_file(checkpoint / "centers_0000000000.safetensors")
    assert torch.equal(centers["centers"], theirs.centers) == (layout != "model")
    momentum = theirs.optimizer.state[theirs.centers]["momentum_buffer"]
    has_momentum = layout in ("checkpoint", "rank")
    if layout != "model":
        assert torch.equal(centers["momentum"], momentum if has_momentum else 0 * momentum)
    assert "every row as it was" in capsys.readouterr().out or layout == "model"
    assert open_backbone(out).step == (2 if layout == "checkpoint" else 0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_their_training_goes_on_here_as_it_would_have_there(optimizer, our_settings, tmp_path):
    """Same batches, same losses and weights for six steps: states, step and schedule are theirs."""
    theirs = Training(IDENTITIES, optimizer=optimizer)
    lr, decay = (5e-3, 5e-4) if optimizer == "sgd" else (1e-3, 0.1)
    theirs.take(batches(5), 30, lr)
    theirs.save(tmp_path, "checkpoint", 3)
    chosen = f'name = "{optimizer}", weight_decay = {decay}'
    words = [f"optimizer={{{chosen}, lr = {lr}}}", f"head.optimizer={{{chosen}}}"]
    config = load(our_settings, words)
    model = build(config, runtime(), IDENTITIES)
    fill(model, layouts.find(tmp_path), 5)
    assert model.head.optimizer.steps == 5
    expected, found = [], []
    for step, (images, identities) in enumerate(batches(6, start=5), 5):
        expected += theirs.take([(images, identities)], 30, lr)
        done = train_step(model, config, images, identities, lr * (1 - step / 30))
        found.append(float(done.loss))
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    assert found[-1] != pytest.approx(found[0], rel=1e-2), "it must have moved"
    moved = (model.head.centers - theirs.centers).norm() / theirs.centers.norm()
    assert moved < 5e-3


LR = 5e-3
CHOSEN = f"optimizer={{name = 'sgd', weight_decay = 5e-4, lr = {LR}}}"


def go_on(rank, world_size, run):
    """Three steps from the checkpoint of a run; the step it was of, and the losses."""
    here, config = runtime(), load(run / "config.toml")
    dataset = open_dataset(config.data.train, ())
    model = build(config, here, dataset.num_identities)
    found = checkpoint.newest(run / "checkpoints", here)
    begun, losses = checkpoint.load(found, model, must_match(config, dataset), here), []
    for step, batch in enumerate(batches(3, start=5), begun):
        images, identities = (share(tensor, rank, world_size) for tensor in batch)
        done = train_step(model, config, images, identities, LR * (1 - step / 30))
        losses.append(float(done.loss))
    return begun, losses


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "ranks", "now"),
    [("checkpoint", 3, 2), ("softmax_fc", 1, 2), ("rank", 5, 2), ("rank", 2, 1), ("model", 1, 2)],
)
def test_every_layout_goes_on_here_on_other_ranks_as_it_would_there(
    layout, ranks, now, our_settings, tmp_path
):
    """Converted, loaded by other ranks and trained: losses of their own training on so many.

    Rows or momentum of another rank, or a step that is lost, would show in the first three losses.
    What their files leave out (states, or the centers) begins anew on both sides.
    """
    theirs, out = Training(IDENTITIES), tmp_path / "ours"
    theirs.take(batches(5), 30, LR)
    theirs.save(tmp_path / "theirs", layout, ranks)
    assert convert(tmp_path / "theirs", out, "--settings", our_settings, CHOSEN) == 0
    if layout != "checkpoint":
        kept = theirs.optimizer.state[theirs.centers] if layout == "rank" else None
        theirs.optimizer.state.clear()
        if kept:
            theirs.optimizer.state[theirs.centers] = kept
        theirs.step = 0
    if layout == "model":
        (file,) = out.glob("checkpoints/*/centers_*.safetensors")
        theirs.centers.data.copy_(load_file(file)["centers"])
    begun, found = run_on_ranks(now, go_on, out)[0] if now > 1 else go_on(0, 1, out)
    assert begun == theirs.step
    expected = theirs.take(batches(3, start=5), 30, LR, ranks=now)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-3), "it must have moved"


def test_a_converted_checkpoint_verifies_as_their_model_does(packs, our_settings, tmp_path):
    """partialfc evaluate on the run that was made and on the model.pt of it: the same digits."""
    theirs, out = Training(IDENTITIES), tmp_path / "ours"
    theirs.take(batches(2), 30, LR)
    theirs.save(tmp_path / "theirs", "checkpoint", 2)
    assert convert(tmp_path / "theirs", out, "--settings", our_settings) == 0
    assert convert_checkpoint.main(["out", str(out), str(tmp_path / "back.pt")]) == 0
    numbers = []
    for model in (tmp_path / "theirs" / "model.pt", out, tmp_path / "back.pt"):
        words = [str(model), str(packs / "heldout_pairs.bin"), f"--image-size={SIZE}"]
        assert evaluate.main([*words, "--device=cpu", "--out", str(tmp_path / "results")]) == 0
        numbers.append(json.loads((tmp_path / "results" / "results.json").read_text())["sets"])
    assert numbers[0] == numbers[1] == numbers[2]


@pytest.mark.slow
def test_training_goes_on_at_its_step_on_two_ranks_and_comes_back_as_model_pt(
    packs, their_config, tmp_path
):
    theirs = Training(IDENTITIES, network="mobilefacenet")
    theirs.take(batches(1), 100, 0.02)
    theirs.save(tmp_path / "theirs", "checkpoint", 4)
    out = tmp_path / "ours"
    words = (*WORDS, "run.epochs=", "run.steps=3", "log.every_steps=1", "data.global_batch=16")
    assert convert(tmp_path / "theirs", out, "--config", their_config, "--ranks=2", *words) == 0
    model = tmp_path / "before.pt"
    assert convert_checkpoint.main(["out", str(out), str(model)]) == 0
    before, wanted = torch.load(model, weights_only=True), theirs.backbone.state_dict()
    assert list(before) == list(wanted), "the same keys in the same order"
    assert all(torch.equal(before[name], value) for name, value in wanted.items())
    done = python("launch/train.py", out / "config.toml", ranks=2)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == [2, 3]
    assert convert_checkpoint.main(["out", str(out), str(tmp_path / "after.pt")]) == 0
    after = read_backbone(tmp_path / "after.pt")
    strict = build_backbone("mobilefacenet", embedding_dim=DIM, image_size=SIZE)
    strict.load_state_dict(after)
    assert not torch.equal(after["conv_sep.layers.0.weight"], before["conv_sep.layers.0.weight"])


def test_their_files_are_never_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "was_run"),))

    for name, zipped in (("new.pt", True), ("old.pth", False)):
        torch.save({"weight": Hostile()}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ForeignError, match=r"Nothing in it was run"):
            read(tmp_path / name)
    script = tmp_path / "config.py"
    script.write_text(f"import os\nos.mkdir({str(tmp_path / 'was_run')!r})\n")
    with pytest.raises(ConfigError, match=r"line 2: .*is not config\.NAME = VALUE"):
        settings.parse(script)
    script.write_text(f"config.lr = os.mkdir({str(tmp_path / 'was_run')!r})\n")
    with pytest.raises(ConfigError, match=r"line 1: .*is not a plain value"):
        settings.parse(script)
    assert not (tmp_path / "was_run").exists()


def damaged(kind, folder):
    """Break one file of a folder of three ranks; return what the message must say."""
    path = folder / "checkpoint_gpu_1.pt"
    content = torch.load(path, weights_only=True)
    match kind:
        case "missing":
            path.unlink()
            return r"checkpoint_gpu_1\.pt is missing"
        case "truncated":
            path.write_bytes(path.read_bytes()[:5000])
            return r"checkpoint_gpu_1\.pt: not a file of tensors"
        case "step":
            content["global_step"] = 9
        case "centers":
            content["state_dict_softmax_fc"]["weight"] = torch.zeros(5, DIM)
        case "optimizer":
            content["state_optimizer"]["param_groups"] = []
        case "no centers":
            content["state_dict_softmax_fc"] = {}
        case "nan centers":
            content["state_dict_softmax_fc"]["weight"][3, 4] = torch.nan
        case "nan momentum":
            states = content["state_optimizer"]["state"]
            states[max(states)]["momentum_buffer"][3, 4] = torch.nan
    torch.save(content, path)
    return {
        "step": "is of step 9",
        "centers": r"momentum_buffer is \[13, 64\], its centers \[5, 64\]",
        "optimizer": "state_optimizer: its groups",
        "no centers": "must hold a matrix",
        "nan centers": "its matrix holds values that are not finite",
        "nan momentum": "momentum_buffer of its parameter .* holds values that are not finite",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "truncated",
        "step",
        "centers",
        "optimizer",
        "no centers",
        "nan centers",
        "nan momentum",
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused_by_file(
    kind, our_settings, tmp_path, capsys
):
    theirs = Training(IDENTITIES)
    theirs.take(batches(1), 30, 0.02)
    theirs.save(tmp_path / "theirs", "checkpoint", 3)
    message = damaged(kind, tmp_path / "theirs")
    code = convert(tmp_path / "theirs", tmp_path / "ours", "--settings", our_settings)
    assert code == 4
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "ours" / "checkpoints").exists()


def test_another_data_set_is_refused(our_settings, tmp_path, capsys):
    theirs = Training(IDENTITIES + 2)
    theirs.take([(i, t) for i, t in batches(1)], 30, 0.02)
    theirs.save(tmp_path / "theirs", "softmax_fc", 2)
    assert convert(tmp_path / "theirs", tmp_path / "ours", "--settings", our_settings) == 4
    assert "its centers are [21, 64], and rank 0 of 2 has [20, 64]" in capsys.readouterr().err


def test_rows_of_their_ranks_are_the_rows_of_our_identities():
    matrix = torch.arange(23.0).unsqueeze(1)
    for ranks in (1, 4, 7, 8):
        for rank in range(ranks):
            rows = layouts.rows_of(23, rank, ranks)
            assert cut(matrix, rank, ranks).flatten().tolist() == list(rows)


@pytest.mark.parametrize(
    ("name", "size"), [("iresnet18", 112), ("iresnet100", 112), ("vit_t", 112), ("convnet_s", 48)]
)
def test_a_backbone_is_recognised_by_its_tensors(name, size):
    with torch.device("meta"):
        state = build_backbone(name, embedding_dim=256, image_size=size).state_dict()
    known = recognise(state, Path("x"), image_size=size)
    assert (known.name, known.embedding_dim) == (name, 256)
    state.pop(next(iter(state)))
    with pytest.raises(ForeignError, match=rf"nearest is {name}: 1 tensor is missing"):
        recognise(state, Path("x"), image_size=size)


def translated(text, ranks=8, tmp_path=None):
    path = tmp_path / "theirs.py"
    path.write_text(text)
    toml, notes = convert_checkpoint.toml_of(settings.parse(path), ranks, path)
    return convert_checkpoint.load_text(toml, [], path), notes


def test_a_config_of_theirs_in_our_words(tmp_path):
    """Numbers of wf42m_pfc02_16gpus_r100.py: 256 x 16 images, one epoch of warm-up."""
    config, notes = translated(
        """
config.margin_list = (1.0, 0.0, 0.4)
config.network = "r100"
config.resume = False
config.output = None
config.embedding_size = 512
config.sample_rate = 0.2
config.interclass_filtering_threshold = 0.4
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 256
config.lr = 0.3
config.rec = "/train_tmp/WebFace42M"
config.num_classes = 2059906
config.num_image = 42474557
config.num_epoch = 20
config.warmup_epoch = config.num_epoch // 20
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
""",
        16,
        tmp_path,
    )
    assert config.backbone.name == "iresnet100"
    assert config.data.global_batch == 4096
    assert config.schedule.warmup_steps == 42474557 // 4096
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.3, 5e-4)
    assert config.run.epochs == 20
    assert config.precision.compute == "fp16"
    assert (config.head.sample_rate, config.head.compute) == (0.2, "fp32")
    assert config.head.optimizer.unsampled == "move"
    margin = config.head.margin
    assert (margin.name, margin.additive, margin.inter_class_filter) == ("cosface", 0.4, 0.4)
    assert [path.name for path in config.verification.pairs][1] == "cfp_fp.bin"
    assert any("num_classes" in note for note in notes)


@pytest.mark.parametrize(
    ("theirs", "name", "masked", "drop_path"),
    [
        ("vit_t_dp005_mask0", "vit_t", 0.0, 0.05),
        ("vit_b", "vit_b", 0.1, 0.1),
        ("vit_b_dp005_mask_005", "vit_b", 0.1, 0.05),
        ("vit_h", "vit_h", 0.0, 0.1),
    ],
)
def test_a_vit_of_theirs_is_masked_as_it_was_in_truth(theirs, name, masked, drop_path, tmp_path):
    """Their forward ignores a mask_ratio of 0.05: 129 of 144 patches are left, not 136."""
    config, _ = translated(f'config.network = "{theirs}"\nconfig.rec = "a"\n', 1, tmp_path)
    options = {"masked": masked, "drop_path": drop_path}
    assert config.backbone.name == name
    assert config.backbone.options.model_dump() == options


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('config.network = "r51"', "there is no such backbone here. Known: r18"),
        ("config.rec = []", r"config.rec = \[\]: must be a folder, or a list of folders"),
        ("config.margin_list = (1.35, 0.0, 0.0)", "where the first is not 1"),
        ("config.lerning_rate = 0.1", r"config\.lerning_rate = 0\.1: not a setting"),
        ("config.dali_aug = True", "that augmentation does not exist"),
        ('config.rec = "synthetic"', "must be a folder with train.rec"),
        ("config.lr = 1 / 0", "division by zero"),
        ("config.lr = -1.0", r"optimizer\.lr"),
        ('config.batch_size = "a"', "invalid literal"),
        ("config.warmup_epoch = 1", "needs config.num_image"),
    ],
)
def test_a_setting_that_cannot_be_had_is_refused_by_name(line, message, tmp_path):
    text = f'config.rec = "/data"\nconfig.num_epoch = 2\n{line}\n'
    with pytest.raises(ConfigError, match=message):
        translated(text, 8, tmp_path)


def test_words_on_top_and_comments_are_in_the_settings_that_are_printed(tmp_path, capsys):
    """They were checked, and then left out of what was printed."""
    path = tmp_path / "theirs.py"
    path.write_text(
        "# Our third run\n\n# on two machines\nfrom easydict import EasyDict as edict\n"
        'config = edict()\nconfig.rec = "/data/"\nconfig.num_epoch = 2\n# not on top\n'
    )
    words = ["head.sample_rate=0.3", "run.steps=70", "run.epochs="]
    assert main(["convert-checkpoint", "settings", str(path), "--ranks=8", *words]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Our third run\n# on two machines\n[run]\n")
    assert "not on top" not in text
    ours = tmp_path / "ours.toml"
    ours.write_text(text)
    config = load(ours)
    assert (config.head.sample_rate, config.run.steps, config.run.epochs) == (0.3, 70, None)
    assert config.data.train == (Path("/data/train.rec"),)
    assert main(["convert-checkpoint", "settings", str(path), "--ranks=8", "head.rate=0.3"]) == 2
    assert "head.rate = 0.3 (command line)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rec", "train", "pairs"),
    [
        ('["/a", "/b/"]', ["/a/train.rec", "/b/train.rec"], "/a/lfw.bin"),
        ('"/a/faces.rec"', ["/a/faces.rec"], "/a/lfw.bin"),
        ('"FOLDER"', ["FOLDER"], "FOLDER/lfw.bin"),
    ],
)
def test_what_their_rec_may_name(rec, train, pairs, tmp_path):
    """A list was written into a path, and a folder of images given a train.rec."""
    (tmp_path / "images" / "anna").mkdir(parents=True)
    folder = str(tmp_path / "images")
    text = f'config.rec = {rec}\nconfig.num_epoch = 2\nconfig.val_targets = ["lfw"]\n'
    config, _ = translated(text.replace("FOLDER", folder), 8, tmp_path)
    assert [str(path) for path in config.data.train] == [
        one.replace("FOLDER", folder) for one in train
    ]
    assert [str(path) for path in config.verification.pairs] == [pairs.replace("FOLDER", folder)]


def test_three_margins_at_once_are_what_they_do_and_the_note_says_so(tmp_path):
    text = 'config.rec = "/data"\nconfig.num_epoch = 2\nconfig.margin_list = (1.0, 0.3, 0.2)\n'
    config, notes = translated(text, 8, tmp_path)
    assert (config.head.margin.name, config.head.margin.additive) == ("cosface", 0.2)
    assert any('name = "combined"' in note for note in notes)
