"""make monitor: a run, Prometheus and the page beside it, and nothing left of them afterwards."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.cluster.conftest import need
from tests.cluster.training import ENVIRONMENT, arguments, last_step
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster


def read(url):
    try:
        with urllib.request.urlopen(url, timeout=60) as reply:
            return reply.read().decode()
    except OSError:
        return ""


def monitor(folder, words, ports):
    names = ("--metrics-port", "--prometheus-port", "--page-port")
    options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    return [sys.executable, "tools/monitor.py", f"--folder={folder}", *options, *words]


def test_a_run_is_seen_in_prometheus_and_ctrl_c_ends_all_of_it(packs, tmp_path):
    """With one line; torchrun would answer with stack traces."""
    need("prometheus")
    _, *words = [word for word in arguments(packs, "") if not word.startswith("run.folder=")]
    ports = [free_port() for _ in range(3)]
    folder, (_, prometheus, page) = tmp_path / "monitor", ports
    running = subprocess.Popen(
        monitor(folder, [*words, "run.steps=1000000", "log.progress=false"], ports),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def ranks_seen():
        text = read(f"http://127.0.0.1:{prometheus}/api/v1/query?query=partialfc_step")
        return len(json.loads(text)["data"]["result"]) if text else 0

    try:
        wait_for(lambda: running.poll() is not None or ranks_seen() == 2)
        assert running.poll() is None, running.communicate()
        assert "running" in read(f"http://127.0.0.1:{page}")
        below = processes_below(running.pid)
        assert len(below) >= 5, "the page, Prometheus, torchrun and two ranks"
    finally:
        running.send_signal(signal.SIGINT)
        said, errors = running.communicate(timeout=300)
    assert running.returncode == 0
    assert last_step(folder / "run") > 0
    for address in (f"http://127.0.0.1:{prometheus}/alerts", f"http://127.0.0.1:{page}"):
        assert address in said
    assert "Traceback" not in said + errors
    assert said.strip().splitlines()[-1].startswith("All of it has ended")
    wait_for(lambda: not any(map(exists, below)))


def processes_below(process):
    text = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    parents = {int(a): int(b) for a, b in (line.split() for line in text.splitlines())}
    found, new = set(), {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def exists(process):
    return Path(f"/proc/{process}").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.folder=elsewhere"], "run.folder: the run is in --folder"),
        (["--page-port={taken}"], "it is taken"),
        (["--folder={full}"], "it would be emptied"),
        (["--folder={full}/mine.txt"], "it would be emptied"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path, words, message):
    """A folder of runs may have targets in it, and is no monitor's for that."""
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "targets").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        facts = {"taken": taken.getsockname()[1], "full": tmp_path}
        command = monitor(tmp_path / "new", [], [free_port() for _ in range(3)])
        done = subprocess.run(
            [*command, *(word.format(**facts) for word in words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 2
    assert message in done.stderr
    assert (tmp_path / "mine.txt").exists()
