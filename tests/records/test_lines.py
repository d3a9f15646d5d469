"""Records of months: what a start, a report and a page read of them is bounded."""

import io
import json
from itertools import pairwise

import pytest

from partialfc.records import ledger, lines, metrics
from partialfc.status.run import Growing


def record(step, **values):
    return json.dumps({"step": step, "time": float(step), **values}) + "\n"


@pytest.fixture
def long(tmp_path, monkeypatch):
    """A file that counts as long: 4,000 records, of which three measure held-out sets."""
    monkeypatch.setattr(lines, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(lines, "SOME_LINES", 100)
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
    monkeypatch.setattr(lines, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(lines, "SOME_LINES", 100)
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
    assert b"".join(lines.some_lines(io.BytesIO(text), len(text), metrics.MEASURES)) == text
