"""Records of months: what a start, a report and a page read of them is bounded."""

import io
import json
import os
from itertools import pairwise

import pytest

from partialfc.records import ledger, lines, metrics, parts
from partialfc.status import run
from partialfc.status.run import Growing


def record(step, **values):
    return json.dumps({"step": step, "time": float(step), **values}) + "\n"


@pytest.fixture
def long(tmp_path, monkeypatch):
    """A file that counts as long: 4,000 records, of which three measure held-out sets."""
    monkeypatch.setattr(parts, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(parts, "SOME_LINES", 100)
    path = tmp_path / "metrics.jsonl"
    measured = {7, 2001, 3990}
    path.write_text(
        "".join(
            record(n, verification_accuracy=0.5) if n in measured else record(n, loss=1.0)
            for n in range(4000)
        )
    )
    return path


def test_a_long_file_is_read_in_part_with_its_ends_and_every_measure(long):
    found = metrics.read_metrics(long)
    steps = [one["step"] for one in found]
    assert 100 <= len(steps) <= 120
    assert steps == sorted(set(steps))
    assert {0, 7, 2001, 3990, 3999} <= set(steps)
    assert max(other - one for one, other in pairwise(steps)) <= 45  # evenly: each 40th


def test_a_page_reads_a_long_file_once_and_then_what_is_new(long, monkeypatch):
    parsed = []
    monkeypatch.setattr(
        "partialfc.status.run.parsed", lambda line, _: parsed.append(line) or {1: 1}
    )
    growing = Growing(long, metrics.is_sound, metrics.MEASURES)
    growing.read()
    assert len(parsed) <= 120
    parsed.clear()
    half = record(4000, loss=2.0)
    with long.open("a") as file:
        file.write(half[:9])
    growing.read()
    before = len(growing.entries)
    growing.read()
    with long.open("a") as file:
        file.write(half[9:])
    growing.read()
    assert parsed[-1].decode() == half
    assert len(growing.entries) == before + 1


def test_the_last_sign_of_life_before_every_start_is_read(tmp_path, monkeypatch):
    """What was lost, and what a fault cost, is between the two."""
    entry = {"seconds": {"train": 1.0}, "began": 0.0}
    rows = []
    for start in range(50):
        rows.append({**entry, "event": "start", "step": start, "time": start * 100.0})
        rows += [
            {
                **entry,
                "event": "spent",
                "step": start,
                "time": start * 100.0 + n,
                "seconds": {"train": float(n)},
            }
            for n in range(1, 90)
        ]
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = ledger.goodput(ledger.read_ledger(path))
    monkeypatch.setattr(parts, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(parts, "SOME_LINES", 100)
    some = ledger.read_ledger(path)
    assert len(some) <= 300
    assert ledger.goodput(some) == whole


def test_ten_thousand_starts_are_summed_in_one_pass(monkeypatch):
    """Each start looked at all later ones: eight minutes at every start and every look."""
    asked = []
    real = ledger.Start.resumed_at.fget
    monkeypatch.setattr(ledger.Start, "resumed_at", property(lambda s: asked.append(1) or real(s)))
    entries = []
    for number in range(1000):
        one = {
            "step": number,
            "time": number * 10.0,
            "began": number * 10.0,
            "seconds": {"train": 2.0},
        }
        entries += [{**one, "event": "start"}, {**one, "event": "spent", "step": number + 1}]
    sums = ledger.goodput(entries)
    assert len(asked) == 1000
    assert sums["train"] + sums["wasted"] == 2000


@pytest.mark.parametrize("block", [7, 64, 1 << 16])
@pytest.mark.parametrize("step", [0, 1, 500, 998, 999, 5000])
def test_a_resumed_run_drops_later_records_alone(tmp_path, monkeypatch, block, step):
    monkeypatch.setattr(lines, "_BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(record(n, loss=n / 7) for n in range(1, 1000)) + '{"step": 1000, "lo')
    metrics.JsonLines(path, step).write(step + 1, {"loss": 5.0})
    steps = [one["step"] for one in metrics.read_metrics(path)]
    assert steps == [*range(1, min(step, 999) + 1), step + 1]


def test_what_is_dropped_alone_is_read(tmp_path, monkeypatch):
    """A start read a month of records whole, for minutes and in 16 GB, to drop a few."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(record(n, loss=1.0) for n in range(100_000)))
    parsed = []
    monkeypatch.setattr(json, "loads", lambda text, real=json.loads: parsed.append(1) or real(text))
    metrics.JsonLines(path, 99_990)
    assert len(parsed) == 10


def test_a_line_without_an_end_is_passed_over_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", 64)
    monkeypatch.setattr(lines, "LONGEST_LINE", 256)
    path = tmp_path / "metrics.jsonl"
    path.write_text(record(1, loss=1.0) + "x" * 5000 + "\n" + record(9, loss=1.0))
    metrics.JsonLines(path, 5)
    assert path.read_text() == record(1, loss=1.0)


def test_a_short_file_is_read_whole():
    text = "".join(record(n, loss=1.0) for n in range(100)).encode()
    found = parts.some_lines(parts.lines_in(io.BytesIO(text)), len(text), metrics.MEASURES)
    assert b"".join(found) == text


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of some 50 records, of which 5 are read, and three of which measure held-out sets."""
    monkeypatch.setattr(parts, "PART_BYTES", 2500)
    monkeypatch.setattr(parts, "_LINES_OF_A_PART", 5)


def sink_of(path, last, step=0):
    """A metrics.jsonl as a run writes it, from one step to another."""
    sink = metrics.JsonLines(path, step)
    for number in range(step + 1, last + 1):
        measures = {"verification_accuracy": 0.5} if number % 300 == 7 else {}
        sink.write(number, {"loss": 1 / number, **measures})
    return sink


def test_a_long_file_is_kept_in_parts_and_read_in_part(tmp_path, small_parts, monkeypatch):
    """A month of records is 1.5 GB, and a page read it at every look."""
    path = tmp_path / "metrics.jsonl"
    sink_of(path, 1000)
    files = parts.parts_of(path)
    assert len(files) > 15
    assert path.stat().st_size < 2500
    whole = [json.loads(line)["step"] for part in (*files, path) for line in part.open()]
    assert whole == list(range(1, 1001)), "nothing is lost"
    opened, real = [], parts.opened
    monkeypatch.setattr(parts, "opened", lambda *given: opened.append(given[0]) or real(*given))
    steps = [one["step"] for one in metrics.read_metrics(path)]
    assert steps == sorted(set(steps))
    assert len(steps) < 200
    assert {1, 7, 307, 607, 907, 1000} <= set(steps)
    assert max(other - one for one, other in pairwise(steps)) <= 20
    assert not set(opened) & set(files), "a part is not opened: what is beside it is"


def test_the_sum_of_many_parts_is_bounded_too(tmp_path, small_parts, monkeypatch):
    """After a year there are thousands of them."""
    monkeypatch.setattr(parts, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(parts, "SOME_LINES", 40)
    path = tmp_path / "metrics.jsonl"
    sink_of(path, 3000)
    assert len(parts.parts_of(path)) > 50
    steps = [one["step"] for one in metrics.read_metrics(path)]
    assert len(steps) < 130
    assert {7, 2707, 3000} <= set(steps)


@pytest.mark.parametrize("spoil", ["missing", "other bytes", "damaged", "a pipe", "a folder"])
def test_what_is_beside_a_part_is_not_trusted(tmp_path, small_parts, spoil):
    path = tmp_path / "metrics.jsonl"
    sink_of(path, 300)
    expected = metrics.read_metrics(path)
    beside = tmp_path / "metrics.parts" / "000002.some.jsonl"
    text = beside.read_text()
    beside.unlink()
    if spoil == "other bytes":
        beside.write_text(text.replace('{"bytes": ', '{"bytes": 9', 1))
    elif spoil == "damaged":
        beside.write_text("[" * 100_000)
    elif spoil == "a pipe":
        os.mkfifo(beside)
    elif spoil == "a folder":
        beside.mkdir()
    found = metrics.read_metrics(path)
    assert {one["step"] for one in found} >= {one["step"] for one in expected}


@pytest.mark.parametrize("step", [0, 1, 40, 200, 299, 300, 5000])
def test_a_run_that_goes_back_drops_later_records_of_parts_too(tmp_path, small_parts, step):
    path = tmp_path / "metrics.jsonl"
    sink_of(path, 300).close()
    with path.open("a") as file:
        file.write('{"step": 301, "lo')
    sink_of(path, step + 100, step=step)
    files = (*parts.parts_of(path), path)
    whole = [json.loads(line)["step"] for part in files for line in part.open()]
    assert whole == [*range(1, min(step, 300) + 1), *range(step + 1, step + 101)]
    read = [one["step"] for one in metrics.read_metrics(path)]
    assert set(read) <= set(whole)
    assert read == sorted(read)


@pytest.mark.parametrize("failing", ["write_bytes", "led_to"])
def test_a_file_that_cannot_become_a_part_grows_on(tmp_path, small_parts, monkeypatch, failing):
    """A full disk; no record is lost, and it is tried again."""
    path = tmp_path / "metrics.jsonl"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(parts, failing, full)
        sink = sink_of(path, 200)
    assert not parts.parts_of(path)
    for number in range(201, 400):
        sink.write(number, {"loss": 1.0})
    assert parts.parts_of(path)
    files = (*parts.parts_of(path), path)
    whole = [json.loads(line)["step"] for part in files for line in part.open()]
    assert whole == list(range(1, 400))


def test_a_page_follows_a_file_that_becomes_a_part(tmp_path, small_parts):
    path = tmp_path / "metrics.jsonl"
    sink = sink_of(path, 30)
    growing = Growing(path, metrics.is_sound, metrics.MEASURES)
    for number in range(31, 400):
        sink.write(number, {"loss": 1.0})
        steps = [one["step"] for one in growing.read()]
        assert steps == sorted(set(steps))
        assert steps[0] == 1
        if path.exists():
            assert steps[-1] == number
    sink_of(path, 120, step=100)
    assert [one["step"] for one in growing.read()][-1] == 120
    sink_of(path, 5)
    assert [one["step"] for one in growing.read()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("at", ["opened", "parts_of", "earlier_lines"])
def test_a_file_that_becomes_a_part_during_a_look_is_read_once(
    tmp_path, small_parts, monkeypatch, at
):
    """As the file is opened, as its parts are looked for, and as they are read."""
    path = tmp_path / "metrics.jsonl"
    sink_of(path, 90).close()
    real, left = getattr(run, at), ["once"]

    def splitting(*given):
        found = real(*given)
        if left:
            left.pop()
            parts.split_off(path, metrics.MEASURES)
            path.write_text(record(91, loss=1.0))
        return found

    monkeypatch.setattr(run, at, splitting)
    growing = Growing(path, metrics.is_sound, metrics.MEASURES)
    first, second = ([one["step"] for one in growing.read()] for _ in range(2))
    assert not left
    assert first == sorted(set(first))
    assert first[-1] == 90
    assert second == sorted(set(second))
    assert second[-2:] == [90, 91]


def test_a_page_of_a_run_that_ended_as_its_file_became_a_part_has_all(tmp_path, small_parts):
    path = tmp_path / "metrics.jsonl"
    sink_of(path, 100)
    parts.split_off(path, metrics.MEASURES)
    assert not path.exists()
    growing = Growing(path, metrics.is_sound, metrics.MEASURES)
    found = [one["step"] for one in growing.read()]
    assert found[-1] == 100
    assert [one["step"] for one in growing.read()] == found, "it was read twice"
    sink = sink_of(path, 101, step=100)
    sink.write(102, {"loss": 1.0})
    assert [one["step"] for one in growing.read()][-1] == 102


def test_a_ledger_in_parts_sums_to_the_same(tmp_path, small_parts, monkeypatch):
    """Every start and what ended it is read, and the last sign of life before it."""
    path, clock = tmp_path / "ledger.jsonl", [1e9]
    monkeypatch.setattr(ledger.time, "time", lambda: clock[0])
    monkeypatch.setattr(ledger.time, "monotonic", lambda: clock[0])
    for start in range(20):
        one = ledger.Ledger(path)
        one.switch("train")
        for step in range(start, start + 9):
            clock[0] += 7
            one.at(step)
        if start % 3:
            one.end("killed by somebody", 5)
    lines_ = [json.loads(line) for part in (*parts.parts_of(path), path) for line in part.open()]
    assert len(parts.parts_of(path)) > 3
    assert len(ledger.read_ledger(path)) < len(lines_)
    assert ledger.goodput(ledger.read_ledger(path)) == pytest.approx(ledger.goodput(lines_))
    assert len(ledger.starts(ledger.read_ledger(path))) == 20
