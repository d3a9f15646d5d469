"""A run in stages goes on from any moment as if it had never stopped."""

import hashlib
import json
import shutil
from contextlib import nullcontext

import pytest

import partialfc.training.run as training
from partialfc.checkpoint.folder import path_of, read_manifest, steps
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.config import ConfigError, load, to_toml
from partialfc.data.dataset import open_dataset
from partialfc.data.skip_list import BadRecord, write_skip_list
from partialfc.definitions.phrases import to_value
from partialfc.errors import CheckpointError, DamagedError
from partialfc.records.report import read_run, write_report
from partialfc.runtime.process import running
from partialfc.status.page import page
from partialfc.status.run import RunFolder
from partialfc.training.open_run import open_run
from partialfc.training.stages import Span, open_stages
from tests.support.models import runtime, settings
from tests.support.runs import UNVERIFIED, killed_at, losses, run, words

STAGES = [
    {"name": "sampled", "steps": 5},
    {
        "name": "large",
        "steps": 4,
        "data": {"image_size": 48, "global_batch": 12},
        "head": {"margin": {"margin": 0.2}},
        "losses": {"center": {"weight": 0.5}},
        "optimizer": {"lr": 0.02},
        "schedule": {"warmup_steps": 0},
    },
    {
        "name": "full",
        "steps": 4,
        "data": {"skip": "SKIP", "global_batch": 36},
        "head": {"sample_rate": 1.0, "margin": {"name": "arcface", "angular": 0.2}},
    },
    {"name": "again", "steps": 3},
]
"""Rate, margin and its kind, size, batch, losses and images change, and with them what the head
keeps: AdaFace has a state, and rows that no step samples move where the rate is below 1."""
LAST, ENDS = 16, (5, 9, 13)


@pytest.fixture(scope="module")
def overrides(packs, tmp_path_factory):
    """Of configs/omniglot.toml."""
    skip = tmp_path_factory.mktemp("skip") / "skip.jsonl"
    pack = open_dataset([packs / "train.rec"]).packs[0]
    write_skip_list(skip, [(pack, BadRecord.of(pack, image, "not wanted")) for image in (3, 50)])
    return (
        "backbone.name=tests.support.pooled:Pooled",
        "backbone.embedding_dim=16",
        "head.sample_rate=0.3",
        "head.margin={name='adaface'}",
        "checkpoint.every_steps=2",
        "checkpoint.keep=9",
        "log.tensorboard=false",
        f"stages={to_value(STAGES)}".replace("SKIP", str(skip)),
        *UNVERIFIED,
    )


def trained(packs, folder, overrides, dies_at=()):
    """Train in this process, through a death before each of some steps; return the settings."""
    _, path, *rest = words(packs, folder, *overrides)
    config, step_of, until = load(path, rest), training.train_step, None

    def dies(model, *others):
        if model.head.optimizer.steps == until:
            raise MemoryError
        return step_of(model, *others)

    with pytest.MonkeyPatch.context() as patch, running(config) as here:
        patch.setattr(training, "train_step", dies)
        for until in (*dies_at, None):
            with pytest.raises(MemoryError) if until else nullcontext():
                training.train(config, here)
    return config


@pytest.fixture(scope="module")
def straight(packs, overrides, tmp_path_factory):
    """A run that was never interrupted, and its settings."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, trained(packs, folder, overrides)


def digests(folder):
    """Of all that each checkpoint holds, by its step."""
    return {
        path.name: {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in path.glob("*.safetensors")
        }
        for path in steps(folder / "checkpoints")
    }


def test_a_death_at_any_moment_of_any_stage_changes_no_bit(packs, overrides, straight, tmp_path):
    """Before the first step of a stage, and in it: losses, weights, momenta and statistics."""
    trained(packs, tmp_path, overrides, dies_at=(3, 5, 8, 9, 12, 13, 15))
    assert sorted(losses(tmp_path)) == list(range(1, LAST + 1))
    assert losses(tmp_path) == losses(straight[0])
    assert digests(tmp_path) == digests(straight[0])


def test_damage_that_loading_finds_costs_the_steps_since_a_checkpoint_before(
    packs, overrides, straight, tmp_path, capsys
):
    """R6: they are compared as files are read, when the model of another stage is half filled."""
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    (folder / "summary.json").unlink()
    for step in (13, 14, 16):
        (file,) = path_of(folder / "checkpoints", step).glob("centers_*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    trained(packs, folder, overrides)
    said = capsys.readouterr().out
    for step in (13, 14, 16):
        assert f"step_{step:08d}: not a valid checkpoint: centers_0000000000.safe" in said
    assert "going on from" in said
    assert len([*(folder / "checkpoints").glob(".step_*.invalid")]) == 3
    assert digests(folder) == digests(straight[0])


def test_damage_of_a_checkpoint_that_somebody_named_says_what_to_do(
    packs, overrides, straight, tmp_path
):
    """No other is taken in its place, and it is left as it is."""
    named = tmp_path / "other" / "checkpoints" / "step_00000014"
    shutil.copytree(path_of(straight[0] / "checkpoints", 14), named)
    (file,) = named.glob("centers_*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    wanted = (*overrides, f"run.resume_from={named}")
    with pytest.raises(DamagedError, match=r"is corrupt.*\. Name a folder such as .*another"):
        trained(packs, tmp_path / "run", wanted)
    assert [*named.parent.iterdir()] == [named]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_kill_in_each_stage_changes_no_bit_on_two_ranks(packs, overrides, tmp_path):
    """And one rank goes on where two were."""
    done = run(packs, tmp_path / "straight", *overrides, ranks=2)
    assert done.returncode == 0, done.stderr
    for step in (3, 8, 12):
        assert killed_at(step, packs, tmp_path / "killed", *overrides).returncode
    done = run(packs, tmp_path / "killed", *overrides, ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert digests(tmp_path / "killed") == digests(tmp_path / "straight")
    assert killed_at(7, packs, tmp_path / "fewer", *overrides).returncode
    trained(packs, tmp_path / "fewer", overrides)
    assert sorted(losses(tmp_path / "fewer")) == [*range(1, LAST + 1)]
    assert losses(tmp_path / "fewer")[5] == losses(tmp_path / "straight")[5]


def test_each_stage_trains_with_its_own_settings(straight):
    """Rates by its own schedule, images by its own batch, in an epoch that no stage had."""
    folder, config = straight
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = {record["step"]: record for record in map(json.loads, lines) if "loss" in record}
    rates = [records[step]["learning_rate"] for step in (1, 2, 6, 10, 11, LAST)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.02])
    assert rates[3:5] == pytest.approx([0.1, 0.2])
    assert [records[step]["stage"] for step in (5, 6, LAST)] == [1, 2, 4]
    assert [step for step in records if "loss_center" in records[step]] == [6, 7, 8, 9]
    seen = [records[step]["samples_seen"] for step in (5, 9, 13, LAST)]
    assert seen == [120, 168, 312, 384]
    spans = [stage.span for stage in open_stages(config, runtime())]
    assert [span.last for span in spans] == [*ENDS, LAST]
    assert [span.epoch for span in spans] == [0, 1, 2, 3]
    assert records[LAST]["epoch"] == pytest.approx(
        sum(s.passes_at(s.last) - s.passes for s in spans)
    )


def test_a_stage_begins_a_new_epoch_behind_all_that_were_begun():
    first = Span(last=25, global_batch=8, steps_per_epoch=10)
    second = first.then(40, 4, 20)
    third = second.then(1, 8, 10)
    assert [one.epoch for one in (first, second, third)] == [0, 3, 5]
    assert (second.batch(25), second.batch(30), third.batch(65)) == (60, 65, 50)
    assert (second.images_at(27), third.images_at(66)) == (208, 368)
    assert (second.passes_at(45), third.passes_at(65)) == (3.5, 4.5)


def test_the_checkpoint_of_a_boundary_is_of_the_stage_that_ended(straight, tmp_path):
    """Exported and looked at with its size of image, whatever the next stage takes."""
    folder, config = straight
    saved = {step: folder / "checkpoints" / f"step_{step:08d}" for step in (5, 9, 13)}
    sizes = [open_backbone(path).known.image_size for path in saved.values()]
    assert sizes == [32, 48, 32]
    facts = [read_manifest(path)["facts"].get("stage") for path in saved.values()]
    assert facts == [None, {"number": 2, "begins": 5}, {"number": 3, "begins": 9}]
    with pytest.raises(ConfigError, match="of stage 9, and these settings have 4"):
        config.at({"stage": {"number": 9}})
    with open_run(folder) as found:
        assert found.config == config.in_stages()[3]


FULL = {"name": "full", "steps": 3, "head": {"sample_rate": 1.0}}


def test_a_plain_run_that_had_ended_goes_on_with_another_stage(packs, overrides, tmp_path):
    """Its checkpoints are those of a first stage of the same settings, if its rows are up to date:
    those that no step sampled have moved, and at a rate of 1 none does."""
    plain = [one for one in overrides if not one.startswith("stages=")]
    trained(packs, tmp_path, (*plain, "run.steps=4"))
    four, five = ([{"name": "whole", "steps": steps}, FULL] for steps in (4, 5))
    with pytest.raises(CheckpointError, match="Make the stage before one step longer"):
        trained(packs, tmp_path, (*plain, f"stages={to_value(four)}"))
    trained(packs, tmp_path, (*plain, f"stages={to_value(five)}"))
    assert sorted(losses(tmp_path)) == [*range(1, 9)]
    with pytest.raises(CheckpointError, match='"begins": 5'):
        trained(packs, tmp_path, (*plain, "head.sample_rate=1.0", "run.steps=9"))


def test_pages_and_pictures_know_the_stages(straight, tmp_path):
    """A table with what each changes, a mark where one ends, and how far the run is to go."""
    folder, _ = straight
    found = read_run(folder)
    assert [(one.name, one.last) for one in found.stages][:2] == [("sampled", 5), ("large", 9)]
    write_report(tmp_path / "report.html", [found])
    text = (tmp_path / "report.html").read_text()
    assert "<h2>Stages</h2>" in text
    assert "At a dashed line the next stage begins" in text
    for words_of in ("head.sample_rate", "data.image_size", "5 to 9", 'class="mark"'):
        assert words_of in text
    now = page(RunFolder(folder).look(), every=5)
    assert f"of {LAST:,}" in now
    assert f"stage again, to step {LAST}" in now
    (folder / "stages.json").write_text('{"stages": [1, {"name": 3}]}')
    assert read_run(folder).stages == []


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"data": {"image_size": 64}}, "has other weights for images of 32 pixels"),
        ({"data": {"train": "OTHER"}}, "have 6 identities, and those of one 40"),
        ({"data": {"train": "missing.rec"}}, "stages.two: data.train: "),
        ({"schedule": {"warmup_steps": 33}}, "stages.two: schedule.warmup_steps = 33"),
    ],
)
def test_a_stage_that_cannot_follow_is_refused_before_the_first_step(packs, stage, message):
    stage = json.loads(json.dumps(stage).replace("OTHER", str(packs / "heldout.rec")))
    config = settings(
        data={"train": str(packs / "train.rec"), "global_batch": 24, "image_size": 32},
        backbone={"name": "convnet_s", "embedding_dim": 16},
        stages=[{"name": "one", "steps": 2}, {"name": "two", "epochs": 1.0, **stage}],
    )
    with pytest.raises(ConfigError, match=message):
        training.look_before(config, runtime())


def test_without_stages_files_say_nothing_of_them():
    config = settings(run={"steps": 4})
    assert "[stages" not in to_toml(config).replace("[[", "[")
    assert "stages" not in config.model_dump()
