import json
import re
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from partialfc.records.metrics import TABLE, JsonLines, TensorBoard, read_metrics
from partialfc.writing import write_json


def test_table_names_follow_prometheus_and_are_explained():
    names = [metric.name for metric in TABLE]
    assert len(set(names)) == len(names)
    for metric in TABLE:
        assert re.fullmatch("[a-z][a-z0-9_]*", metric.name)
        assert metric.help
        assert not metric.help.endswith(".")


def test_a_resumed_run_drops_the_records_that_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for step in range(5):
        first.write(step, {"loss": float(step)})
    first.close()
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed in the middle of a line
    resumed = JsonLines(path, 3)
    resumed.write(4, {"loss": 40.0})
    resumed.close()
    records = read_metrics(path)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[-1]["loss"] == 40.0


def test_tensorboard_reads_what_is_written(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.write(10, {"loss": 2.5})
    sink.write(20, {"loss": 1.5, "verification_accuracy": 0.75})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5), (20, 1.5)]
    assert [e.value for e in events.Scalars("verification/accuracy")] == [0.75]


def test_tensorboard_shows_a_step_once_after_a_kill(tmp_path):
    """What comes again after a checkpoint was shown twice."""
    for start, losses in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 30.0, 4: 40.0})):
        sink = TensorBoard(tmp_path, start)
        for step, loss in losses.items():
            sink.write(step, {"loss": loss})
        sink.close()
        time.sleep(1.01)  # files of one second are read in any order
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
