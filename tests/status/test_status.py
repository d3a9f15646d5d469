"""The status page of a damaged folder, of ranks that do not answer, and to those who ask badly."""

import json
import os
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from partialfc.__main__ import main
from partialfc.config import load, to_toml
from partialfc.monitoring.exporter import Exported, Exporter
from partialfc.monitoring.serving import QuietHandler
from partialfc.monitoring.targets import read_targets, targets_path, write_targets
from partialfc.records.ledger import Ledger
from partialfc.status import run as of_run
from partialfc.status.command import serve
from partialfc.status.page import page
from partialfc.status.run import RunFolder
from tests.support.places import ROOT
from tests.support.waiting import PATIENCE, wait_for
from tests.support.web import fetched


@pytest.fixture
def patient(monkeypatch):
    """Ranks have the time to answer, however busy the machine is."""
    monkeypatch.setattr(of_run, "_SECONDS_TO_ANSWER", PATIENCE)


@pytest.fixture
def folder(tmp_path):
    """A run with a record, a start and a targets file."""
    run = tmp_path / "run"
    run.mkdir()
    words = [f"run.folder={run}", f"monitor.targets={tmp_path / 'targets'}", "monitor.port=0"]
    (run / "config.toml").write_text(to_toml(load(ROOT / "configs" / "demo.toml", words)))
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 10, "time": time.time(), "loss": 1.0}) + "\n"
    )
    ledger = Ledger(run / "ledger.jsonl", ranks=2)
    ledger.at(10, now=True)
    return run


def announce(run, addresses):
    write_targets(targets_path(run.parent / "targets", run), addresses, run="run", scheme="http")


DAMAGED = [
    '{"step": 11, "time": 1.0, "loss": "<script>"}',
    '{"step": 11, "time": 1.0, "loss": [1]}',
    '{"step": 11, "time": 1.0, "loss": NaN}',
    '{"step": 11, "time": null, "loss": null}',
    '{"step": "11", "time": 1.0}',
    '{"step": 11, "time": 1e300, "epoch": 1e-300, "step_seconds": 1e300}',
    '{"step": 11, "time": 1.0, "loss": -1e308, "throughput": 1e308}',
    '{"step": 11, "time": 1.0, "loss": 5e-324, "throughput": -1e308, "gradient_norm": 1.7e308}',
    '{"step": 11, "time": 1.0, "epoch": 5e-324}',
    '{"step": 11, "time": 1.0, "epoch": 1, "step_seconds": 1' + "0" * 308 + "}",
    "[" * 100_000,
    "\0" * 1000,
    '{"event": "end", "time": 1.0, "step": 11, "seconds": {}, "code": "<script>", "cause": "x"}',
    '{"event": "end", "time": 1.0, "step": 11, "seconds": {}, "code": 5, "cause": "<script>"}',
    '{"event": "end", "time": 1.0, "step": 11, "seconds": {"train": "x"}}',
    '{"event": "start", "time": 1e300, "step": 11, "seconds": {}, "began": 1, "ranks": "<script>"}',
    '{"event": "start", "time": 1.0, "step": 11, "seconds": []}',
    '{"event": "spent", "time": {}, "step": 11, "seconds": {}}',
]


def test_a_folder_without_a_run_is_refused_with_where_runs_are(folder, tmp_path, capsys):
    """A page of nothing was served for any folder, and for a name that is wrong by a letter."""
    assert main(["status", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path}: there is no run: it has none of config.toml, " in told
    assert f"Runs are in {folder}." in told
    assert not (tmp_path / "page.html").exists()
    assert main(["status", str(tmp_path / "ruin")]) == 2
    assert f"Did you mean {folder}?" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".lock").touch()  # a start that has come no further
    assert main(["status", str(tmp_path / "new"), "--out", str(tmp_path / "page.html")]) == 0
    assert "nothing yet" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("file", ["metrics.jsonl", "ledger.jsonl"])
def test_a_damaged_line_costs_itself_and_never_the_page(folder, file, line):
    with (folder / file).open("a") as lines:
        lines.write(line + "\n")
    text = page(RunFolder(folder).look(), every=5)
    assert "1.0000" in text, "the line before it"
    assert "<script" not in text


def test_a_page_forbids_scripts_where_no_server_sends_headers(folder):
    """As written by --out and opened from a disk."""
    text = page(RunFolder(folder).look(), every=5)
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in text


@pytest.mark.parametrize(
    "text",
    ["", "{", "3", '{"targets": 1}', "[" * 100_000, '[null, {"targets": []}]']
    + [
        json.dumps([{"targets": [address], "labels": {"rank": rank, "__scheme__": scheme}}])
        for address, rank, scheme in (
            ("localhost:1/../x", "0", "http"),
            ("localhost:1", "-1", "http"),
            ("localhost:1", "0", "file"),
            (["localhost:1"], "0", "http"),
        )
    ],
)
def test_a_damaged_file_of_targets_names_no_rank(folder, text):
    announce(folder, ["127.0.0.1:1"])
    path = targets_path(folder.parent / "targets", folder)
    path.write_text(text)
    assert RunFolder(folder).look().ranks == []


def test_a_run_that_was_moved_says_so_once(folder, capsys):
    """A page that reloads every five seconds said it at each."""
    moved = RunFolder(folder.rename(folder.with_name("moved")))
    first, second = moved.look().config, moved.look().config
    assert first == second
    assert second.run.folder == moved.folder
    assert capsys.readouterr().err.count("run.folder is the folder that it lies in") == 1
    (moved.folder / "config.toml").write_text("nonsense")
    assert moved.look().config is None


@pytest.mark.parametrize("file", ["metrics.jsonl", "ledger.jsonl"])
def test_a_pipe_in_place_of_records_is_not_waited_for(folder, file):
    (folder / file).unlink()
    os.mkfifo(folder / file)
    looked = threading.Thread(target=RunFolder(folder).look, daemon=True)
    looked.start()
    looked.join(PATIENCE)
    assert not looked.is_alive()


@pytest.mark.parametrize("address", ["a..b:80", "[zz]:80", "[::1:80", f"{'x' * 300}:80"])
def test_an_address_that_is_none_is_a_rank_without_an_answer(folder, address):
    announce(folder, [address])
    assert [rank.step for rank in RunFolder(folder).look().ranks] == [None]


def test_targets_are_read_as_they_are_written(tmp_path):
    write_targets(tmp_path / "a.json", ["h1:1", "", "[::1]:2"], run="run", scheme="https")
    assert read_targets(tmp_path / "a.json") == [(0, "h1:1", "https"), (2, "[::1]:2", "https")]


def test_ranks_are_asked_themselves_whatever_proxy_is_set(folder, monkeypatch, patient):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    names = ("step", "last_step_timestamp_seconds", "steps_total")
    exporter = Exporter(tuple(Exported(name, "") for name in names), "127.0.0.1", 0)
    for name, value in zip(names, (10, time.time(), 3), strict=True):
        exporter.set(name, value)
    announce(folder, [f"127.0.0.1:{exporter.port}"])
    try:
        (rank,) = RunFolder(folder).look().ranks
    finally:
        exporter.close()
    assert rank.step == 10


def test_many_silent_ranks_are_waited_for_together(folder, patient):
    """Each is waited for two seconds; 64 in turns of 32 took four. Here none says anything until
    all were asked."""
    count, held, every = 64, [], threading.Event()
    with closing(socket.create_server(("127.0.0.1", 0), backlog=count)) as listening:
        announce(folder, [f"127.0.0.1:{listening.getsockname()[1]}"] * count)

        def accept():
            while len(held) < count:
                held.append(listening.accept()[0])
            every.set()
            for one in held:
                one.close()

        threading.Thread(target=accept, daemon=True).start()
        ranks = RunFolder(folder).look().ranks
    assert every.is_set(), f"{len(held)} were asked at once"
    assert [rank.step for rank in ranks] == [None] * count


NOT_A_NUMBER = (
    b"partialfc_step NaN\npartialfc_steps_total 1\npartialfc_last_step_timestamp_seconds 1\n"
)


@pytest.mark.parametrize("http", [b"", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["raw", "http"])
@pytest.mark.parametrize("answer", [b"no numbers", b"partialfc_step{ 1\n", b"\xff", NOT_A_NUMBER])
def test_a_rank_that_answers_nonsense_gives_no_answer(folder, http, answer):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        announce(folder, [f"127.0.0.1:{listening.getsockname()[1]}"])

        def reply():
            one, _ = listening.accept()
            with one:
                one.recv(4096)
                one.sendall(http + answer)

        threading.Thread(target=reply, daemon=True).start()
        (rank,) = RunFolder(folder).look().ranks
    assert rank.step is None


@pytest.fixture
def server(folder):
    server = serve(RunFolder(folder), "127.0.0.1", 0, 5)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server):
    return fetched(f"http://127.0.0.1:{server.server_port}")


def test_who_connects_and_says_nothing_blocks_nobody(server):
    with closing(socket.create_connection(server.server_address)):
        assert "1.0000" in ask(server)


def test_too_many_connections_are_sent_away_and_cost_no_threads(server, monkeypatch):
    monkeypatch.setattr(QuietHandler, "timeout", PATIENCE)  # nobody leaves by himself
    before = threading.active_count()
    idle = [socket.create_connection(server.server_address) for _ in range(100)]
    wait_for(lambda: sum(map(is_closed, idle)) == 100 - 64)
    wait_for(lambda: threading.active_count() - before <= 64)
    for one in idle:
        one.close()
    wait_for(lambda: threading.active_count() <= before)
    assert "1.0000" in ask(server)


def is_closed(one):
    one.setblocking(False)
    try:
        return one.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_thousands_of_checkpoints_are_not_looked_at_one_by_one(folder, monkeypatch):
    """With checkpoint.keep_every_steps none is deleted; a page looked at each file of all."""
    for step in range(3000):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    for step in range(2980, 3000):
        (folder / "checkpoints" / f"step_{step:08d}" / "x").write_bytes(bytes(step))
    looked = []
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: looked.append(path.name) or real(path))
    run = RunFolder(folder)
    found = run.look().checkpoints
    assert [one.step for one in found] == list(range(2999, 2987, -1))
    assert found[0].bytes == 2999
    assert len([name for name in looked if name.startswith("step_")]) == 12
    looked.clear()
    (folder / "checkpoints" / "step_00003000").mkdir()
    (folder / "checkpoints" / "step_00003000" / "x").write_bytes(b"1")
    assert [one.step for one in run.look().checkpoints][:2] == [3000, 2999]
    assert [name for name in looked if name.startswith("step_")] == ["step_00003000"]
