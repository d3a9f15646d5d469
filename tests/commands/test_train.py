"""launch/train.py as a user starts it: real processes, real kill -9."""

import json
import shutil
import signal
import subprocess
from functools import cache

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.support.places import FIXTURES, ROOT
from tests.support.processes import ENVIRONMENT, python
from tests.support.runs import UNVERIFIED, command, held, kill_all, losses, run
from tests.support.waiting import PATIENCE, wait_for
from tools import omniglot

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [None, 3])
def test_a_run_leaves_all_that_it_promises(packs, tmp_path, ranks):
    done = run(packs, tmp_path, "run.steps=5", "verification.every_steps=3", ranks=ranks)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["world_size"] == (ranks or 1)
    assert summary["steps"] == 5
    assert summary["samples_seen"] == 5 * 24
    assert 0.5 <= summary["verification"]["accuracy"] <= 1
    assert 0.4 <= summary["verification"]["accuracy_untrained"] <= 1
    assert summary["identification"]["sets"]["heldout"]["num_gallery"] == 6
    for positive in ("seconds", "images_per_second", "peak_memory_bytes"):
        assert summary[positive] > 0
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5]
    with Image.open(tmp_path / "training.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5, "the picture is not blank"
    assert list((tmp_path / "tensorboard").glob("events*"))
    page = (tmp_path / "report.html").read_text()
    assert "ROC of heldout_pairs" in page
    assert "at step 0</span>" in page, "the curve of the untrained network"
    assert "commit" in page
    if ranks is None:
        again = python("launch/train.py", tmp_path / "config.toml", "run.steps=5")
        assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision.compute=bf16", "backbone.checkpoint_activations=true", "data.last_batch=pad"],
        ["precision.compute=fp16", "precision.initial_loss_scale=1024.0", "data.loader=torch"],
        [
            "optimizer={name='adamw', lr=0.001, accumulation=2}",
            "head.optimizer={name='adamw'}",
            "schedule={name='polynomial', warmup_steps=2, power=2.0}",
            "head.margin={name='cosface', scale=16.0}",
        ],
        [
            "head.center_format=fp16",
            "head.optimizer={name='sgd', momentum_format='int8', unsampled='stay'}",
            "head.keep_mib=0",
            "data.images_per_identity=4",
            "data.augment.crop=0.5",
        ],
        [
            "head.center_format=bf16",
            "head.compute=bf16",
            "head.optimizer={name='adagrad', lr_factor=0.5}",
            "data.block=50",
            "data.block_window=4",
        ],
    ],
    ids=["bf16", "fp16", "adamw", "fp16 centers, P x K", "bf16 centers, adagrad, blocks"],
)
def test_settings_reach_the_training(packs, tmp_path, overrides):
    """Each path trains and resumes: every state it has goes through a checkpoint."""
    common = ["run.steps=6", "checkpoint.every_steps=3", *UNVERIFIED, *overrides]
    done = run(packs, tmp_path, *common)
    assert done.returncode == 0, done.stderr
    first = losses(tmp_path)
    assert all(np.isfinite(list(first.values())))
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    done = run(packs, tmp_path, *common)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == first


@pytest.fixture(scope="module")
def short_training(tmp_path_factory):
    """The Omniglot recipe in small: 60 characters, 300 steps; summary and mean last losses."""
    folder = tmp_path_factory.mktemp("short")
    archive = FIXTURES / "omniglot" / "omniglot_background.npz"
    size = ["--characters", "90", "--held-out", "30", "--pairs", "1000", "--size", "32"]
    assert omniglot.main([str(archive), str(folder), *size]) == 0
    short = ["run.steps=300", "data.global_batch=128", "log.every_steps=10", "optimizer.lr=0.1"]

    @cache
    def train(*overrides):
        out = folder / f"run{len(list(folder.glob('run*')))}"
        done = run(folder, out, *short, "schedule.warmup_steps=50", *overrides, ranks=2)
        assert done.returncode == 0, done.stderr
        summary = json.loads((out / "summary.json").read_text())
        return summary, float(np.mean(list(losses(out).values())[-10:]))

    return train


@pytest.mark.slow
@pytest.mark.xdist_group("short training")
def test_a_short_training_recognises_unseen_characters(short_training):
    """It must learn, and from little."""
    summary, _ = short_training()
    assert summary["verification"]["accuracy_untrained"] < 0.75
    assert summary["verification"]["accuracy"] > 0.85
    assert summary["identification"]["rank_1"] > 2 * summary["identification"]["rank_1_untrained"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (("head.center_format=fp16", "head.optimizer.momentum_format=int8"), 0.03),
        (
            ("head.compute=bf16", "head.center_format=bf16", "head.optimizer.momentum_format=bf16"),
            0.03,
        ),
        (("head.center_format=fp8", "head.optimizer.momentum_format=int8"), 0.08),
    ],
    ids=["fp16 int8", "bf16 bf16", "fp8 int8"],
)
@pytest.mark.xdist_group("short training")
def test_fewer_bits_train_to_the_same_loss(short_training, overrides, tolerance):
    """Within 3 % of the loss of fp32, centers of fp8 within 8 %; within 0.02 of its accuracy."""
    (plain, expected), (summary, loss) = short_training(), short_training(*overrides)
    assert loss == pytest.approx(expected, rel=tolerance)
    difference = summary["verification"]["accuracy"] - plain["verification"]["accuracy"]
    assert abs(difference) <= 0.02


@pytest.mark.slow
@pytest.mark.xdist_group("short training")
def test_offloaded_rows_of_fewer_bits_learn_the_same(short_training):
    """Centers and momentum in host memory: the digits of those on the device, over 60 steps.

    With the test above: offloaded, 16-bit and plain runs recognise unseen characters as well.
    """
    bits = ("head.center_format=fp16", "head.optimizer.momentum_format=int8", "run.steps=60")
    (resident, loss), (offloaded, found) = (
        short_training(*bits, *there)
        for there in ((), ("head.centers_in=host", "head.states_in=host"))
    )
    assert found == loss
    assert offloaded["verification"] == resident["verification"]
    assert offloaded["identification"] == resident["identification"]


def final_tensors(folder, step):
    tensors = {}
    for path in sorted((folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")):
        for name, value in load_file(path).items():
            tensors[f"{path.name}:{name}"] = value
    return tensors


@pytest.mark.parametrize("loader", ["dali", pytest.param("torch", marks=pytest.mark.slow)])
def test_kill_9_and_the_same_command_continue_bit_for_bit(packs, tmp_path, loader):
    """Every loss after the resume, the backbone, the centers and all optimizer states are equal."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    common = ("run.steps=40", "checkpoint.every_steps=4", f"data.loader={loader}", *UNVERIFIED)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = run(packs, straight, *common, ranks=2)
    assert done.returncode == 0, done.stderr

    process = subprocess.Popen(
        held(30, command(packs, killed, *common, ranks=2)),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: list((killed / "checkpoints").glob("step_*")))
    kill_all(process)
    assert max(losses(killed), default=0) < 40, "it was killed before its end"
    resumed = run(packs, killed, *common, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(killed) == losses(straight)
    expected, found = final_tensors(straight, 40), final_tensors(killed, 40)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(value, found[name]), name


@pytest.mark.slow
def test_rows_in_host_memory_train_to_the_same_bits(packs, tmp_path):
    """And a checkpoint goes on with them on the device: where they lie decides nothing."""
    common = ("run.steps=12", "checkpoint.every_steps=6", "head.sample_rate=0.3", *UNVERIFIED)
    there = ("head.centers_in=host", "head.states_in=host", f"head.host_folder={tmp_path / 'rows'}")
    straight, hosted = tmp_path / "straight", tmp_path / "hosted"
    for folder, overrides in ((straight, ()), (hosted, there)):
        done = run(packs, folder, *common, *overrides)
        assert done.returncode == 0, done.stderr
    expected = final_tensors(straight, 12)
    for again in (False, True):
        if again:
            shutil.rmtree(hosted / "checkpoints" / "step_00000012")
            done = run(packs, hosted, *common)
            assert done.returncode == 0, done.stderr
        assert losses(hosted) == losses(straight)
        found = final_tensors(hosted, 12)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert np.array_equal(value, found[name]), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.sample_rat=0.1", "head.sample_rate"),
        ("data.train=missing.rec", "missing.rec"),
        ("backbone.name=iresnet51", "iresnet50"),
        ("data.global_batch=100000", "data.global_batch"),
        ("verification.pairs=['missing.bin']", "verification.pairs"),
        ("head.canonical_shards=0", "head.canonical_shards"),
        ("data.image_size=50", "image_size"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(packs, tmp_path, override, message):
    done = run(packs, tmp_path, "run.steps=3", override)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_another_run_in_the_same_folder_is_refused_by_name(packs, tmp_path):
    assert run(packs, tmp_path, "run.steps=3", *UNVERIFIED).returncode == 0
    done = run(packs, tmp_path, "run.steps=4", "run.seed=7")
    assert done.returncode == 4
    assert "run.seed = 2048, this run has 7" in done.stderr
    done = run(packs, tmp_path, "run.steps=4", "head.margin.angular=0.1")
    assert done.returncode == 4
    assert "head.margin" in done.stderr
    done = run(packs, tmp_path, "run.steps=4", "run.resume=false")
    assert done.returncode == 2
    assert "run.folder" in done.stderr


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is_and_a_longer_one_goes_on(packs, tmp_path):
    assert run(packs, tmp_path, "run.steps=3").returncode == 0
    before = (tmp_path / "summary.json").read_bytes()
    done = run(packs, tmp_path, "run.steps=3")
    assert done.returncode == 0
    assert "the run ended at step 3" in done.stdout
    assert (tmp_path / "summary.json").read_bytes() == before
    (tmp_path / "summary.json").unlink()  # as if it was killed just before its end
    assert run(packs, tmp_path, "run.steps=3").returncode == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["verification"]["accuracy"] == json.loads(before)["verification"]["accuracy"]
    untrained = json.loads((tmp_path / "curves.json").read_text())["heldout_pairs"]["untrained"]
    assert run(packs, tmp_path, "run.steps=5").returncode == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 5
    curves = json.loads((tmp_path / "curves.json").read_text())["heldout_pairs"]
    assert curves["untrained"] == untrained != {"far": curves["far"], "tar": curves["tar"]}


@pytest.mark.slow
def test_ctrl_c_ends_with_two_lines(packs, tmp_path):
    process = subprocess.Popen(
        command(packs, tmp_path, "run.steps=100000", "checkpoint.every_steps=5"),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list((tmp_path / "checkpoints").glob("step_*")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "The same command goes on" in errors
    assert errors.count("\n") == 2
    assert "Traceback" not in errors


def test_help_shows_every_setting():
    done = python("launch/train.py", "--help")
    assert done.returncode == 0
    for key in ("run.folder", "head.sample_rate", "head.margin.angular", "schedule.power"):
        assert key in done.stdout
