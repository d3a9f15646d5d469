"""R16: a record that cannot be written never ends training; R19: a damaged one costs itself."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from partialfc.records.ledger import Ledger, goodput, read_ledger
from partialfc.records.lines import Lines
from partialfc.records.metrics import JsonLines, TensorBoard, read_metrics
from partialfc.records.unessential import lost_records, unessential
from tests.support.processes import python
from tests.support.runs import UNVERIFIED, losses, run, words


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True
    )
    if done.returncode:
        pytest.skip("only root mounts a file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_costs_the_records_alone(packs, tmp_path, small_disk):
    """A 900-byte record ended a night of training. Checkpoints lie on another disk here."""
    (tmp_path / "checkpoints").mkdir()
    (small_disk / "checkpoints").symlink_to(tmp_path / "checkpoints")
    with (small_disk / "others").open("wb") as file, unessential("the disk is full"):
        while True:
            os.write(file.fileno(), bytes(4096))
    done = run(packs, small_disk, "run.steps=6", "checkpoint.every_steps=3", *UNVERIFIED)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_00000003",
        "step_00000006",
    ]
    for name in ("metrics.jsonl", "ledger.jsonl", "summary.json", "training.png", "report.html"):
        assert done.stderr.count(f"{small_disk / name} cannot be written") == 1, done.stderr
    assert "No space left on device. Training goes on." in done.stderr


NOBODY_READS = """
import os, runpy, sys
reader, writer = os.pipe()
for number in (1, 2):
    os.dup2(writer, number)
os.close(reader)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_closed_pipe_ends_nothing_and_is_counted(packs, tmp_path):
    """``| head -1``, or an ssh that is lost."""
    arguments = words(packs, tmp_path, "run.steps=4", *UNVERIFIED)
    done = python("-c", NOBODY_READS, *arguments)
    assert done.returncode == 0
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["lost_records"] > 0


def test_a_pipe_that_is_closed_before_the_end_leaves_the_status_as_it_is():
    code = (
        "from partialfc.records.unessential import unessential_streams\n"
        "with unessential_streams():\n"
        "    for _ in range(10000): print('x' * 100)\n"
    )
    words = f'{sys.executable} -c "{code}" | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "warning: standard output cannot be written: Broken pipe. Training goes on.\n"
    )


def test_every_sink_survives_a_place_that_takes_nothing(tmp_path, capfd):
    before = lost_records()
    for name in ("metrics.jsonl", "ledger.jsonl", "tensorboard"):
        (tmp_path / name).symlink_to("/dev/full")
    metrics, ledger = JsonLines(tmp_path / "metrics.jsonl", 0), Ledger(tmp_path / "ledger.jsonl")
    for step in range(3):
        metrics.write(step, {"loss": 1.0})
        ledger.at(step, now=True)
    metrics.close()
    ledger.end("done", 0)
    with unessential(tmp_path / "tensorboard"):
        TensorBoard(tmp_path / "tensorboard")
    assert lost_records() - before >= 8
    errors = capfd.readouterr().err
    assert errors.count("metrics.jsonl cannot be written") == 1, errors
    assert errors.count("ledger.jsonl cannot be written") == 1
    assert errors.count("tensorboard cannot be written") == 1


def test_records_come_again_when_there_is_room(tmp_path, small_disk):
    """And what was written in half does not take the next line with it."""
    path = small_disk / "metrics.jsonl"
    lines = Lines(path)
    for step in range(3000):
        lines.append(json.dumps({"step": step, "note": 0, "more": [0] * 200}.copy()))
    shutil.copy(path, tmp_path / "whole")
    os.truncate(path, 100_123)  # in the middle of a line
    lines.append('{"step": 7000}')
    lines.append('{"step": 7001}')
    lines.close()
    assert [record["step"] for record in read_metrics(path)][-2:] == [7000, 7001]


def test_lines_come_again_after_a_server_that_forgot_the_file(tmp_path, monkeypatch):
    """Each line after the first that failed was lost, until the end of the process."""
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.append("1")
    write = os.write

    def stale(descriptor, data):
        monkeypatch.setattr(os, "write", write)
        write(descriptor, data[:1])  # half a line came through
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "write", stale)
    lines.append("2")
    (tmp_path / "metrics.jsonl").rename(tmp_path / "before")
    lines.append("3")
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "3\n"
    assert (tmp_path / "before").read_text() == "1\n2"


def written(folder):
    """A ledger of two starts and a metrics.jsonl of 60 steps."""
    for number in range(2):
        ledger = Ledger(folder / "ledger.jsonl", ranks=2, settings="a")
        for step in range(3):
            ledger.at(step + 3 * number, now=True)
        ledger.end("done", 0)
    metrics = JsonLines(folder / "metrics.jsonl", 0)
    for step in range(60):
        metrics.write(step, {"loss": 1 / (step + 1)})
    metrics.close()


def test_a_flipped_bit_costs_its_line_alone(tmp_path):
    """One kept a run from going on, at every start."""
    written(tmp_path)
    ledger, metrics = tmp_path / "ledger.jsonl", tmp_path / "metrics.jsonl"
    for path, read in ((ledger, read_ledger), (metrics, read_metrics)):
        sound, lines = path.read_bytes(), len(read(path))
        for number in range(0, 8 * len(sound), 13):
            at, bit = divmod(number, 8)
            damaged = bytearray(sound)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            found = read(path)
            assert len(found) >= lines - 2, "a line's end makes two of one, or one of two"
            if path == ledger:
                assert goodput(found)["wall"] >= 0
        path.write_bytes(sound)


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 512,
        b"\xff\xfe\x00{",
        b"[" * 100_000,
        b'{"step": 1e999, "time": 1, "event": "spent", "seconds": {}}',
        b'{"step": "7", "time": 1, "event": "spent", "seconds": {}}',
        b'{"step": 7, "time": 1, "event": "spent", "seconds": {"train": "a"}}',
        b'{"step": 7, "time": 1, "event": "spent", "seconds": {"tra\\u0069m": 1}}',
        b'{"step": 7, "time": NaN, "event": "end", "seconds": {}, "cause": "x", "code": 0}',
        b'{"step": 7, "time": 1, "event": "end", "seconds": {}}',
        b"7",
        b'{"step": 7, "loss": ' + b"9" * 5000 + b"}",
        b'{"step": 7, "loss": [1]}',
    ],
)
def test_a_line_that_is_none_is_left_out(tmp_path, line):
    """A NUL in line 50 deleted the 50 after it."""
    written(tmp_path)
    for name, read in (("ledger.jsonl", read_ledger), ("metrics.jsonl", read_metrics)):
        path = tmp_path / name
        sound, lines = read(path), path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:5], line + b"\n", *lines[5:]]))
        if name == "ledger.jsonl" or b"loss" in line or b"seconds" not in line:
            assert read(path) == sound
        assert goodput(read_ledger(tmp_path / "ledger.jsonl"))["wall"] >= 0


def test_a_pipe_in_place_of_records_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="it is no file"):
        read_metrics(tmp_path / "metrics.jsonl")
    JsonLines(tmp_path / "metrics.jsonl", 5).write(6, {"loss": 1.0})


@pytest.mark.distributed
def test_a_run_goes_on_with_damaged_records(packs, tmp_path):
    common = ("checkpoint.every_steps=3", *UNVERIFIED)
    assert run(packs, tmp_path, "run.steps=3", *common).returncode == 0
    for name in ("metrics.jsonl", "ledger.jsonl"):
        path = tmp_path / name
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0], b"\0\0\0\n", lines[1][:-9] + b"\n", *lines[2:]]))
    done = run(packs, tmp_path, "run.steps=5", *common)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path)) == [1, 3, 4, 5]
    assert "ledger.jsonl: 2 damaged lines are left out" in done.stderr
