"""launch/status.py in a real browser, of a real run and of 512 simulated ranks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from partialfc.config import load, to_toml
from partialfc.monitoring.exporter import Exported, Exporter
from partialfc.monitoring.targets import targets_path, write_targets
from partialfc.records.ledger import Ledger
from partialfc.status.page import page
from partialfc.status.run import RunFolder
from tests.cluster.conftest import need
from tests.cluster.prometheus import close_all
from tests.cluster.training import ENVIRONMENT, arguments, last_step
from tests.support.places import ROOT
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

SHOTS = os.environ.get("SCREENSHOTS")


def browse(address, *, width=1280, height=1000, shot=None):
    """The page as the browser has built it; and its picture."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={profile}", f"--window-size={width},{height}"),
        ]
        what = [f"--screenshot={shot}"] if shot else ["--dump-dom"]
        done = subprocess.run(
            [*command, *what, address], capture_output=True, text=True, timeout=300, check=True
        )
    return done.stdout


def words_of(document):
    return re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]+>", " ", document, flags=re.S))


@pytest.fixture(scope="module")
def served(packs, tmp_path_factory):
    """A real run of two ranks with metrics, and the server of its page."""
    need("chromium")
    folder = tmp_path_factory.mktemp("status")
    run = folder / "run"
    verified = [f"verification.pairs=['{packs / 'heldout_pairs.bin'}']"]
    words = arguments(packs, run, "run.steps=100000", "checkpoint.every_steps=40", *verified)
    words += ["monitor.port=0", f"monitor.targets={folder / 'targets'}"]
    train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    training = subprocess.Popen(
        [*train, "launch/train.py", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: last_step(run) > 90)
    server = subprocess.Popen(
        [sys.executable, "launch/status.py", str(run), "--port=0", "--every=60"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield server.stdout.readline().strip(), run, training
    server.send_signal(signal.SIGINT)
    assert server.wait(300) == 0
    if training.poll() is None:
        training.send_signal(signal.SIGINT)
        training.wait(300)


def test_a_browser_shows_what_the_run_is_doing(served, tmp_path):
    address, _, _ = served
    text = words_of(browse(address))
    for word in ("running", "Loss", "Images/s", "Where", "Last step of 2 ranks", "Checkpoints"):
        assert word in text, word
    assert re.search(r"step \d+ of 100,000", text)
    assert re.search(r"accuracy 0\.\d{4}", text)
    shot = tmp_path / "page.png"
    browse(address, shot=shot)
    with Image.open(shot) as picture:
        assert np.asarray(picture.convert("L")).std() > 10, "the picture is not blank"
    if SHOTS:
        shot.rename(f"{SHOTS}/run.png")


def test_nothing_is_loaded_from_elsewhere_and_nothing_can_be_changed(served):
    address, run, _ = served
    with urllib.request.urlopen(address) as reply:
        document, headers = reply.read().decode(), reply.headers
    assert headers["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert "<script" not in document
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", document)
    assert str(run.parent) not in document
    for path, method, code in (("/", "POST", 501), ("/../../etc/passwd", "GET", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(address + path, method=method))
        assert refused.value.code == code
    with socket.socket() as outside:  # 127.0.0.2 is this machine too, but not where it listens
        outside.settimeout(3)
        assert outside.connect_ex(("127.0.0.2", int(address.rpartition(":")[2])))


def test_a_stopped_run_says_so(served):
    """The last test of this run."""
    address, _, training = served
    training.send_signal(signal.SIGINT)
    training.wait(300)
    assert "stopped" in words_of(browse(address))


@pytest.fixture(params=[64, 512])
def many(packs, tmp_path, request):
    """Ranks that are told of as a run would; one each is behind, lost and late."""
    count = request.param
    behind, lost, late = count - 7, count // 7, count // 11
    run = tmp_path / "large"
    words = arguments(packs, run, "run.steps=200000", "monitor.port=0")
    config = load(ROOT / words[0], [*words[1:], f"monitor.targets={tmp_path / 'targets'}"])
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config))
    ledger = Ledger(run / "ledger.jsonl", ranks=count)
    ledger.at(0, now=True)
    ledger.end("LostRankError: rank 3 was lost at step 61200 (train)", 7)
    ledger = Ledger(run / "ledger.jsonl", ranks=count)
    ledger.switch("train")
    ledger.at(120_000, now=True)
    with (run / "metrics.jsonl").open("w") as file:
        draw = np.random.default_rng(0)
        for step in range(10, 120_010, 10):
            loss = 30 * np.exp(-step / 3e4) * draw.lognormal(0, 0.05)
            record = {"step": step, "time": time.time(), "loss": loss, "step_seconds": 0.4}
            record |= {"throughput": 5e5 * draw.lognormal(0, 0.02), "gradient_norm": loss / 9}
            if step % 10_000 == 0:
                record["verification_accuracy"] = 1 - 0.2 * np.exp(-step / 3e4)
            file.write(json.dumps(record) + "\n")
    table = tuple(
        Exported(name, "x")
        for name in (
            "step",
            "steps_total",
            "last_step_timestamp_seconds",
            "collective_wait_seconds_total",
        )
    )
    exporters = [Exporter(table, "127.0.0.1", 0) for _ in range(count)]
    for rank, exporter in enumerate(exporters):
        exporter.set("step", 120_000 - 40 * (rank == behind))
        exporter.set("steps_total", 1000)
        exporter.set("last_step_timestamp_seconds", time.time() - 90 * (rank == behind))
        exporter.set("collective_wait_seconds_total", 0.0 if rank == late else 100.0)
    addresses = [f"127.0.0.1:{exporter.port}" for exporter in exporters]
    exporters.pop(lost).close()
    path = targets_path(config.monitor.targets, config.run.folder)
    write_targets(path, addresses, run="large", scheme="http")
    yield run, count, behind, lost, late
    close_all(exporters)


def test_a_page_of_many_ranks_is_quick_small_and_readable(many, tmp_path):
    need("chromium")
    run, count, behind, lost, late = many
    folder = RunFolder(run)
    began = time.monotonic()
    document = page(folder.look(), every=5)
    first = time.monotonic() - began
    began = time.monotonic()
    page(folder.look(), every=5)
    print(
        f"{count} ranks: first page {first:.1f} s, next {time.monotonic() - began:.2f} s, "
        f"{len(document) / 1024:.0f} KiB"
    )
    assert len(document) < 300_000
    text = words_of(document)
    assert f"Last step of {count} ranks" in text
    assert f"No answer from rank {lost} (of {count})" in text
    assert f"Behind the others: rank {behind} (of {count})" in text
    assert f"The others wait for rank {late}" in text
    assert "LostRankError: rank 3 was lost at step 61200" in text
    (tmp_path / "page.html").write_text(document, encoding="utf-8")
    measure = "document.body.dataset.over = document.documentElement.scrollWidth - innerWidth"
    allowed = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", document)
    (tmp_path / "measured.html").write_text(f"{allowed}<script>{measure}</script>")
    for width, height in ((1280, 1500), (390, 2600)):
        built = browse(f"file://{tmp_path / 'measured.html'}", width=width, height=height)
        assert int(re.search(r'data-over="(-?\d+)"', built)[1]) <= 0, "it scrolls sideways"
        shot = tmp_path / f"{count}_{width}.png"
        browse(f"file://{tmp_path / 'page.html'}", width=width, height=height, shot=shot)
        with Image.open(shot) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, "the picture is not blank"
        if SHOTS:
            shot.rename(f"{SHOTS}/{shot.name}")


def test_a_name_that_is_markup_is_shown_as_text(tmp_path):
    run = tmp_path / "<script>alert(1)<"
    run.mkdir()
    ledger = Ledger(run / "ledger.jsonl", ranks=1)
    ledger.end("<img src=x onerror=alert(1)>", 1)
    document = page(RunFolder(run).look(), every=5)
    assert "<script" not in document
    assert "<img" not in document
