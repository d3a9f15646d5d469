"""wandb, MLflow and one's own class follow a run; what they do never ends it."""

import json
import struct
import sys
import threading
from collections import Counter
from contextlib import suppress

import pytest

from partialfc.config import ConfigError, load
from partialfc.errors import in_words
from partialfc.records.sinks import beside
from partialfc.records.sinks.beside import Beside
from partialfc.records.sinks.run_sink import Opening, find
from partialfc.records.unessential import lost_records
from tests.records.test_unessential import small_disk  # noqa: F401
from tests.support.places import ROOT
from tests.support.processes import ENVIRONMENT, Python, python
from tests.support.runs import UNVERIFIED, losses, words
from tests.support.sinks import Quiet, Raises
from tests.support.waiting import wait_for

OFFLINE = {
    **ENVIRONMENT,
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_DISABLE_GIT": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


STANDS_AT_5 = """
import runpy, sys, time
from partialfc.training.recorder import Recorder

def stepped(self, step, *more):
    inner(self, step, *more)
    while step == 5:
        time.sleep(0.05)

inner, Recorder.stepped = Recorder.stepped, stepped
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log of W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def wandb_steps(folder):
    """Steps that are on the disk; the last record may be half there."""
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        with suppress(Exception):  # DecodeError of a module that may be missing
            for record in wandb_records(path):
                for item in record.history.item:
                    if "step" in (item.key, *item.nested_key):
                        yield json.loads(item.value_json)


def mlflow_steps(folder):
    for path in folder.glob("store/*/*/metrics/train/loss"):
        yield from (int(line.split()[-1]) for line in path.read_text().splitlines()[-1:])


def has_5(steps):
    return 5 in [*steps]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_run_is_one_run_with_every_step_once(packs, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    arguments = words(
        packs,
        folder,
        "run.steps=7",
        "checkpoint.every_steps=3",
        "log.sinks=['wandb', 'mlflow']",
        f"log.tracking_uri={(tmp_path / 'store').as_uri()}",
        "log.project=faces",
        "log.upload_checkpoint=true",
        "run.hang_seconds=0",
        *UNVERIFIED,
    )
    said = tmp_path / "stdout", tmp_path / "stderr"
    first = Python(["-c", STANDS_AT_5, *arguments], said, env=OFFLINE)
    wait_for(lambda: first.poll() or (has_5(wandb_steps(folder)) and has_5(mlflow_steps(tmp_path))))
    assert first.poll() is None, said[1].read_text()
    first.kill()
    done = python(*arguments, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" not in done.stderr
    expected = losses(folder)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6, 7]

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name("faces")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "run"
    assert found.data.params["run.steps"] == "7"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [metric.step for metric in history] == sorted(expected)
    assert {metric.step: metric.value for metric in history} == pytest.approx(expected)
    names = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert names == {"training.png", "report.html", "step_00000007"}

    rows, pictures, artifacts, identities = Counter(), 0, set(), set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("run"):
                identities.add(record.run.run_id)
                config = {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
                assert config["run"]["steps"] == 7
                assert record.run.project == "faces"
            if record.HasField("artifact"):
                artifacts.add(record.artifact.type)
            if record.HasField("history"):
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                pictures += "training" in row or "training._type" in row
                if "train/loss" in row:
                    rows[row["step"]] += 1
                    assert row["train/loss"] == pytest.approx(expected[row["step"]])
    assert len(identities) == 1
    assert rows == dict.fromkeys(range(1, 8), 1)
    assert pictures == 1
    assert artifacts == {"checkpoint", "report"}


@pytest.mark.distributed
def test_sinks_that_fail_end_no_run(packs, tmp_path, small_disk):  # noqa: F811
    with (small_disk / "others").open("wb") as file:
        file.write(bytes(400_000))
    done = python(
        *words(
            packs,
            tmp_path / "run",
            "run.steps=4",
            "log.sinks=['mlflow', 'tests.support.sinks:Raises']",
            f"log.tracking_uri={(small_disk / 'store').as_uri()}",
            *UNVERIFIED,
        ),
        env=OFFLINE,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]
    for name in ("mlflow", "tests.support.sinks:Raises"):
        assert done.stderr.count(f"log.sinks = '{name}' cannot be written") == 1, done.stderr
    assert "the server is gone. Training goes on." in done.stderr
    assert "No space left on device" in done.stderr


def followed(folder, make, step=0):
    """A sink beside a run that is in a folder, and the sinks that were made for it."""
    made = []

    def making(opening):
        made.append(make(opening))
        return made[-1]

    return Beside("one", making, Opening(folder=folder, settings={}), step), made


def test_a_step_that_comes_again_is_not_recorded_again(tmp_path):
    first, _ = followed(tmp_path, Quiet)
    first.write(5, {"loss": 1.0})
    first.close()
    again, made = followed(tmp_path, Quiet, step=3)
    for step in (4, 5, 6):
        again.write(step, {"loss": 2.0})
    again.write(5, {"verification_accuracy": 0.5})
    again.finish(6, tmp_path / "a.png", [tmp_path])
    assert made[0].given == [
        (6, {"train/loss": 2.0}),
        (5, {"verification/accuracy": 0.5}),
        ("picture", tmp_path / "a.png"),
        ("artifact", tmp_path),
    ]
    assert made[0].done is True


@pytest.mark.parametrize("kept", ["", "[]", '{"id": 7, "recorded": {}}', "[" * 99_999])
def test_what_was_kept_is_not_trusted(tmp_path, kept, capsys):
    (tmp_path / "sinks").mkdir()
    (tmp_path / "sinks" / "one.json").write_text(kept)
    sink, made = followed(tmp_path, Quiet, step=3)
    sink.write(4, {"loss": 2.0})
    sink.close()
    assert made[0].given == [(4, {"train/loss": 2.0})]
    assert made[0].done is False
    assert "one.json: it is damaged" in capsys.readouterr().err


def test_a_start_at_step_0_is_a_new_run(tmp_path):
    first, _ = followed(tmp_path, Quiet)
    first.write(5, {"loss": 1.0})
    first.close()
    again, made = followed(tmp_path, Quiet)
    again.write(1, {"loss": 2.0})
    again.close()
    assert made[0].opening.id is None
    assert made[0].given == [(1, {"train/loss": 2.0})]


def test_a_sink_that_hangs_holds_nothing_up(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(beside, "_WAITING_RECORDS", 3)
    monkeypatch.setattr(beside, "_SECONDS_TO_END", 0.1)
    goes_on = threading.Event()

    class Hangs(Quiet):
        def record(self, step, values):
            goes_on.wait()

    before = lost_records()
    sink, _ = followed(tmp_path, Hangs)
    for step in range(9):
        sink.write(step, {"loss": 1.0})
    sink.close()
    goes_on.set()
    assert lost_records() - before >= 5
    assert capfd.readouterr().err.count("'one' cannot be written: 3 records wait") == 1


def test_a_sink_that_cannot_be_opened_is_asked_again_later(tmp_path, monkeypatch):
    def refuses(opening):
        tries.append(opening)
        raise Raises.OwnError

    tries, before = [], lost_records()
    sink, _ = followed(tmp_path, refuses)
    for step in range(3):
        sink.write(step, {"loss": 1.0})
    sink.close()
    assert len(tries) == 1
    assert lost_records() - before == 3
    monkeypatch.setattr(beside, "_SECONDS_BETWEEN_TRIES", 0)
    sink, _ = followed(tmp_path, refuses)
    for step in range(3):
        sink.write(step, {"loss": 1.0})
    sink.close()
    assert len(tries) == 4


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["log.sinks=['wandbb']"],
            'log.sinks = "wandbb": must be one of mlflow, wandb, or a class',
        ),
        (["log.project='faces'"], 'log.project = "faces" without log.sinks: nothing takes it'),
        (["log.upload_checkpoint=true"], "log.upload_checkpoint = true without log.sinks"),
    ],
)
def test_settings_that_lead_nowhere_are_refused(overrides, told):
    with pytest.raises(ConfigError) as caught:
        load(ROOT / "configs" / "omniglot.toml", overrides)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_program_is_named_with_the_line_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"partialfc.records.sinks.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError) as caught:
        find([name])
    assert in_words(caught.value) == f"{name} is not installed: pip install 'partialfc[{name}]'"


@pytest.mark.parametrize("place", ["tests.support.nothing:Quiet", "tests.support.sinks:Nothing"])
def test_a_class_that_is_not_there_is_named(place):
    with pytest.raises(ConfigError, match=r"there is no module|has no Nothing"):
        find([place])
