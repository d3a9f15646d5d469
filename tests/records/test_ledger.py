"""The goodput ledger: seconds that add up to wall time over several starts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from partialfc.errors import Stopped
from partialfc.records.ledger import (
    KINDS,
    Ledger,
    fault_codes,
    fruitless,
    goodput,
    keeping,
    process_began,
    read_ledger,
    starts,
)


def entry(event, at, step, more=None, **seconds):
    filled = {**dict.fromkeys(KINDS, 0.0), **seconds}
    return {"event": event, "time": at, "step": step, "seconds": filled, **(more or {})}


START = {"ranks": 2, "settings": "a"}


def test_a_kill_makes_waste_and_recovery_that_add_up():
    """If the work since the checkpoint stayed in ``train``, goodput would be too good."""
    totals = goodput(
        [
            entry("start", 102, 0, {**START, "began": 100}, startup=2),
            entry("spent", 103, 0, startup=3),
            entry("spent", 113, 10, startup=3, train=8, data=1, save=1),  # the checkpoint
            entry("spent", 118, 15, startup=3, train=12, data=2, save=1),  # killed after it
            entry("start", 133, 0, {**START, "began": 130}, startup=3),
            entry("spent", 135, 10, startup=3, restore=2),
            entry("end", 145, 20, {"cause": "done", "code": 0}, startup=3, restore=2, train=10),
        ]
    )
    assert totals["wasted"] == 5
    assert totals["recovery"] == 12
    assert totals["train"] == 18
    assert totals["wall"] == 45 == sum(totals[kind] for kind in KINDS)
    assert totals["goodput"] == pytest.approx(18 / 45)


def test_a_start_that_never_came_to_a_step_is_counted_too():
    """Killed while it was loading: its seconds count, and say nothing about who resumed where."""
    first = [
        entry("start", 1, 0, {**START, "began": 0}, startup=1),
        entry("spent", 2, 0, startup=2),
        entry("spent", 12, 10, startup=2, train=10),
    ]
    killed = [entry("start", 14, 0, {**START, "began": 13}, startup=1)]
    third = [
        entry("start", 17, 0, {**START, "began": 16}, startup=1),
        entry("spent", 18, 0, startup=1, restore=1),
    ]
    totals = goodput([*first, *killed, *third])
    assert totals["wall"] == 18
    assert totals["wasted"] == 10, "the third began at step 0 again"
    assert totals["startup"] == 4


def test_time_after_somebody_stopped_it_is_not_the_runs():
    stopped = [
        entry("start", 1, 0, {**START, "began": 0}, startup=1),
        entry("end", 5, 4, {"cause": "stopped", "code": 130}, startup=1, train=4),
    ]
    again = [
        entry("start", 1001, 0, {**START, "began": 1000}, startup=1),
        entry("spent", 1002, 4, startup=1, restore=1),
    ]
    assert goodput([*stopped, *again])["wall"] == 7


def test_written_time_is_the_clocks(tmp_path, monkeypatch):
    """Nested kinds count once, and the sum is what a clock outside says."""
    path = tmp_path / "ledger.jsonl"
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    ledger = Ledger(path, ranks=2, settings="x")
    before = ledger.totals()["wall"]
    ledger.switch("train")
    with ledger.spending("other"):
        clock[0] += 1
        with ledger.spending("save"):
            clock[0] += 2
        clock[0] += 4
    clock[0] += 8
    ledger.at(3, now=True)
    totals = ledger.totals()
    assert totals["wall"] - before == pytest.approx(15)
    assert {kind: totals[kind] for kind in ("other", "save", "train")} == pytest.approx(
        {"other": 5, "save": 2, "train": 8}
    )
    ledger.end("done", 0)
    (start,) = starts(read_ledger(path))
    assert start.reached == start.resumed_at == 3
    assert start.end["cause"] == "done"


def test_a_cut_line_is_left_out_and_the_next_start_begins_a_new_one(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).end("done", 0)
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[-1][:20])
    Ledger(path)
    assert [one["event"] for one in read_ledger(path)] == ["start", "end", "start"]
    assert json.loads(path.read_text().splitlines()[-1])["event"] == "start"


def failed(at, reached, code=5, settings="a"):
    begin = entry("start", at, 0, {**START, "settings": settings, "began": at})
    return [begin, entry("end", at + 1, reached, {"cause": "x", "code": code})]


def test_only_starts_in_a_row_without_a_new_step_are_fruitless():
    """R14: progress, other settings and a person who stops it begin a new count."""
    came_far = failed(0, 7)
    in_vain = [*failed(2, 7), *failed(4, 5)]
    assert len(fruitless([*came_far, *in_vain], "a")) == 2
    assert len(fruitless([*failed(0, 0), *failed(2, 0)], "a")) == 2
    assert not fruitless([*came_far, *in_vain, *failed(6, 8)], "a")
    assert not fruitless([*came_far, *in_vain, *failed(6, 7, code=130)], "a")
    assert len(fruitless([*came_far, *in_vain, *failed(6, 0, code=143)], "a")) == 3, (
        "torchrun ends this rank because another one died"
    )
    asked = failed(6, 0, code=143)
    asked[-1]["asked"] = True
    assert not fruitless([*came_far, *in_vain, *asked], "a"), "somebody asked it to stop"
    assert fault_codes([*in_vain, *asked]) == ["5", "5"]
    assert not fruitless([*came_far, *in_vain], "b")
    killed = failed(6, 6)[:1]
    assert len(fruitless([*came_far, *in_vain, *killed], "a")) == 3


def test_a_start_that_was_asked_to_stop_is_not_a_failed_one(tmp_path):
    """R14: three times SIGTERM before the first step, as of a busy cluster, ended with code 8."""
    path = tmp_path / "ledger.jsonl"
    for asked in (True, False, True, False, False):
        with pytest.raises(Stopped), keeping(path, ranks=1, settings="a"):
            raise Stopped(15, asked=asked)
    assert len(fruitless(read_ledger(path), "a")) == 2, "from the last that somebody asked for"
    assert fault_codes(read_ledger(path)) == ["143", "143", "143"]


@pytest.mark.skipif(not Path("/proc/uptime").exists(), reason="needs Linux")
def test_a_process_knows_when_it_began():
    """Imports of several seconds belong to the start-up."""
    code = (
        "import time; time.sleep(.5); from partialfc.records.ledger import process_began; "
        "print(process_began(), time.time())"
    )
    started = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    began, loaded = map(float, done.stdout.split())
    assert started - 0.05 <= began <= loaded - 0.5
    assert process_began() <= time.time()
