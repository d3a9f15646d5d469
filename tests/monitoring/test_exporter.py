"""What Prometheus would read, and where it would find it, without Prometheus."""

import json
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import suppress

import pytest
import torch
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch.overrides import TorchFunctionMode

from partialfc.config import ConfigError
from partialfc.distributed import ranks as collectives
from partialfc.distributed.ranks import Ranks
from partialfc.monitoring.exporter import OF_EVERY_RANK, OF_RANK_0, Exported, Exporter
from partialfc.monitoring.monitor import Monitor
from partialfc.monitoring.serving import CONNECTIONS, QuietHandler
from partialfc.monitoring.targets import remove_targets, targets_path, write_targets
from partialfc.records.ledger import Ledger
from partialfc.records.metrics import TABLE
from tests.support.models import runtime, settings
from tests.support.waiting import PATIENCE, wait_for
from tests.support.web import fetched


def read(port):
    text = fetched(f"http://127.0.0.1:{port}/metrics")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_names_have_base_units_and_only_counters_end_in_total():
    names = [entry.name for entry in (*OF_EVERY_RANK, *OF_RANK_0)]
    names += [metric.exported or metric.name for metric in TABLE]
    for name in names:
        assert not name.endswith(("_ms", "_mib", "_gib", "_percent", "_count", "_minutes")), name
    for unit, suffixes in {
        "seconds": ("_seconds",),
        "bytes": ("_bytes",),
        "images/s": ("_images_per_second",),
    }.items():
        for metric in TABLE:
            if metric.unit == unit:
                assert (metric.exported or metric.name).endswith(suffixes), metric.name


def test_a_run_of_one_rank_exports_its_records_phases_and_checkpoint(tmp_path):
    """Values as they were given, after one step and one record; nothing of the machine's paths."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step_00000007").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000007" / "manifest.json").write_text("1234567")
    config = settings(
        run={"folder": str(folder)}, monitor={"port": 0, "targets": str(tmp_path / "targets")}
    )
    before = Ledger(folder / "ledger.jsonl")
    before.end("CheckpointError: disk full", 4)
    monitor = Monitor(config, runtime(), Ledger(folder / "ledger.jsonl"), 100)
    (target,) = json.loads(next((tmp_path / "targets").iterdir()).read_text())
    monitor.stepped(8)
    monitor.write(8, {"loss": 2.5, "goodput": 0.75, "spent_save_seconds": 3.0, "skipped_steps": 1})
    monitor.write(8, {"epoch": 1.5, "epoch_small": 4.25})
    found = read(target["targets"][0].rpartition(":")[2])
    for name, value in {
        ("partialfc_step",): 8,
        ("partialfc_steps_total",): 1,
        ("partialfc_images_total",): config.data.global_batch,
        ("partialfc_planned_steps",): 100,
        ("partialfc_loss",): 2.5,
        ("partialfc_epoch",): 1.5,
        ("partialfc_epoch_of_set", ("set", "small")): 4.25,
        ("partialfc_goodput_ratio",): 0.75,
        ("partialfc_skipped_steps_total",): 1,
        ("partialfc_spent_seconds", ("kind", "save")): 3.0,
        ("partialfc_checkpoint_last_step",): 7,
        ("partialfc_checkpoint_size_bytes",): 7,
        ("partialfc_starts",): 2,
        ("partialfc_failed_starts",): 1,
        ("partialfc_last_failure_info", ("code", "4")): 1,
    }.items():
        assert found[name] == value, name
    assert found[("partialfc_phase_seconds_total", ("phase", "startup"))] > 0
    assert len(found) <= 100
    assert not [name for name in found if str(tmp_path) in str(name)]
    monitor.close()
    assert not list((tmp_path / "targets").iterdir())


class NoTensor(TorchFunctionMode):
    """Anything that asks a tensor for something may wait for its device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} during a scrape")


def test_a_scrape_asks_no_tensor(tmp_path):
    """So it never synchronises a GPU, whatever is exported."""
    config = settings(run={"folder": str(tmp_path)}, monitor={"port": 0})
    monitor = Monitor(config, runtime(), Ledger(None), 100)
    monitor.stepped(1)
    monitor.write(1, {metric.name: 1.0 for metric in TABLE})
    with NoTensor():
        with pytest.raises(AssertionError, match="during a scrape"):
            torch.ones(1).item()
        families = list(monitor._exporter.collect())
        text = generate_latest(monitor._exporter)
    assert len(families) > 40
    assert b"partialfc_loss 1.0" in text
    monitor.close()


def test_by_default_only_this_machine_may_ask():
    exporter = Exporter((Exported("step", "x"),), type(settings().monitor)().host, 0)
    with socket.socket() as outside:  # 127.0.0.2 is this machine too, but not where it listens
        outside.settimeout(3)
        assert outside.connect_ex(("127.0.0.2", exporter.port))
    exporter.close()


def test_scrapes_while_the_training_writes(tmp_path):
    """A series that appears during a scrape must not break it."""
    exporter = Exporter((Exported("phase_seconds_total", "x"),), "127.0.0.1", 0)
    done = threading.Event()

    def write():
        number = 0
        while not done.is_set():
            number += 1
            exporter.set("phase_seconds_total", number, phase=str(number % 3000))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(10):
            read(exporter.port)
    finally:
        done.set()
        writer.join()
        exporter.close()


def test_a_taken_port_is_replaced():
    table = (Exported("step", "x"),)
    first = Exporter(table, "127.0.0.1", 0)
    second = Exporter(table, "127.0.0.1", first.port)
    second.set("step", 5)
    assert second.port != first.port
    assert read(second.port)[("partialfc_step",)] == 5
    first.close()
    second.close()


def test_a_certificate_that_cannot_be_used_is_a_mistake_in_the_settings(tmp_path):
    (tmp_path / "key.pem").write_text("no key")
    certificate = {"certificate": str(tmp_path / "key.pem"), "key": str(tmp_path / "key.pem")}
    config = settings(monitor={"port": 0, **certificate})
    with pytest.raises(ConfigError, match=r"monitor\.certificate"):
        Monitor(config, runtime(), Ledger(None), 1)


def test_targets_of_two_runs_with_one_name_are_two_files(tmp_path):
    one, other = (targets_path(tmp_path, tmp_path / part / "run") for part in "ab")
    assert one != other
    write_targets(one, ["h:1", "", "h:3"], run="run", scheme="http")
    labels = [entry["labels"]["rank"] for entry in json.loads(one.read_text())]
    assert labels == ["0", "2"], "a rank that serves nothing is left out"
    assert [path.name for path in tmp_path.iterdir()] == [one.name], "no half-written file"
    remove_targets(one)
    remove_targets(one)
    assert not list(tmp_path.iterdir())


def test_collectives_are_timed_where_there_are_ranks(monkeypatch):
    """One rank has none; the host's clock runs while a CPU's collective does."""
    collectives.sum_over_ranks(torch.ones(2), Ranks())
    before = collectives.wait_seconds().get("all_reduce", 0.0)
    clock = iter([10.0, 10.25])
    monkeypatch.setattr(collectives.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(collectives.dist, "all_reduce", lambda *words, **more: None)
    collectives.sum_over_ranks(torch.ones(2), Ranks(0, 2))
    assert collectives.wait_seconds()["all_reduce"] - before == pytest.approx(0.25)


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_who_connects_and_says_nothing_keeps_no_scrape_and_few_descriptors(
    secure, tmp_path, monkeypatch
):
    """A training has 1,024 descriptors for its gloo pairs, and a handshake may never come."""
    monkeypatch.setattr(QuietHandler, "timeout", PATIENCE)  # nobody leaves by himself
    named = {}
    context = None
    if secure:
        if not shutil.which("openssl"):
            pytest.skip("needs openssl")
        key, certificate = own_certificate(tmp_path)
        named = {"certificate": certificate, "key": key}
        context = ssl.create_default_context(cafile=certificate)
    exporter = Exporter((Exported("step", "x"),), "localhost", 0, **named)
    before = threading.active_count()
    exporter.set("step", 7)
    scheme = "https" if secure else "http"
    try:
        idle = [socket.create_connection(("localhost", exporter.port)) for _ in range(CONNECTIONS)]
        idle.pop().close()  # a place for the scrape
        url = f"{scheme}://localhost:{exporter.port}/metrics"

        def scraped():
            with suppress(OSError):  # sent away until the place is free
                return fetched(url, context=context)

        assert "partialfc_step 7.0" in wait_for(scraped)
        more = [socket.create_connection(("localhost", exporter.port)) for _ in range(200)]
        wait_for(lambda: threading.active_count() - before <= CONNECTIONS)
        for one in (*idle, *more):
            one.close()
    finally:
        exporter.close()


def own_certificate(folder):
    """A key and a certificate of localhost, signed by itself."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    words = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    words += ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    return key, certificate
