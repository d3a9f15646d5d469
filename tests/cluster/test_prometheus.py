"""A real Prometheus reads real runs; the shipped rules, alerts and dashboard are queried."""

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import urllib.request

import pytest

from partialfc.config import load, to_toml
from partialfc.monitoring.exporter import Exported, Exporter
from partialfc.monitoring.targets import targets_path, write_targets
from partialfc.records.ledger import Ledger
from partialfc.status.page import page
from partialfc.status.run import RunFolder
from tests.cluster.conftest import need
from tests.cluster.prometheus import MONITORING, Prometheus, close_all
from tests.cluster.training import ENVIRONMENT, arguments, last_step
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

LAST_STEP = "last_step_timestamp_seconds"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
QUERIES = [
    (panel["title"], target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]


def start(ranks, words, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, f"--nproc-per-node={ranks}", "launch/train.py", *words],
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop(process):
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    return output


@pytest.fixture(scope="module")
def scraped(packs, tmp_path_factory):
    """Prometheus and a run of two ranks that it has read for a while."""
    need("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    run = folder / "run"
    verified = [
        f"verification.pairs=['{packs / 'heldout_pairs.bin'}']",
        f"verification.identification=['{packs / 'heldout.rec'}']",
    ]
    words = arguments(packs, run, "run.steps=1000000", "checkpoint.every_steps=100", *verified)
    words += ["monitor.port=0", f"monitor.targets={folder / 'targets'}"]
    with Prometheus(folder) as prometheus:
        process = start(2, words)
        # 2m windows need two samples, and rules a moment more.
        wait_for(lambda: prometheus.value("partialfc:lateness:ratio") is not None)
        wait_for(lambda: prometheus.value("partialfc:checkpoint_age_seconds") is not None)
        yield prometheus, run, process
        if process.poll() is None:
            stop(process)


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{t}: {q}"[:60] for t, q in QUERIES])
def test_every_query_of_the_dashboard_has_an_answer(scraped, title, query):
    prometheus, run, _ = scraped
    samples = prometheus.query(query.replace("$run", run.name))
    assert samples, f"{title}: {query}"
    assert all(sample["value"][1] not in ("NaN", "+Inf", "-Inf") for sample in samples)


def test_runs_are_found_and_their_starts_are_marked(scraped):
    """The dashboard's variable and its annotation, which is there for two minutes."""
    prometheus, run, _ = scraped
    with urllib.request.urlopen(f"{prometheus.url}/api/v1/label/run/values") as reply:
        assert json.load(reply)["data"] == [run.name]
    (starts,) = DASHBOARD["annotations"]["list"]
    marks = prometheus.query(f"max_over_time(({starts['expr']})[10m:1s])".replace("$run", run.name))
    assert len(marks) == 1


def test_what_a_rank_exports_is_small_and_tells_nothing_private(scraped):
    """At most 100 series a rank, promtool's conventions, no path, no user."""
    prometheus, run, _ = scraped
    series = prometheus.query(
        'count by (rank) ({job="partialfc", __name__!~"scrape_.*|up|ALERTS.*"})'
    )
    counts = {sample["metric"]["rank"]: int(sample["value"][1]) for sample in series}
    assert sorted(counts) == ["0", "1"]
    assert max(counts.values()) <= 100, counts
    # The quickest of each rank: another one may have waited for a busy machine.
    quickest = 'max(min_over_time(scrape_duration_seconds{job="partialfc"}[10m]))'
    seconds = prometheus.value(quickest)
    print(f"series {counts}, a scrape {1e3 * seconds:.0f} ms")
    address = prometheus.query("up")[0]["metric"]["instance"]
    with urllib.request.urlopen(f"http://{address}/metrics") as reply:
        text = reply.read().decode()
    check = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout + check.stderr
    assert str(run.parent) not in text
    assert address.startswith("127.0.0.1:")


@pytest.mark.slow
def test_the_steps_that_prometheus_sees_are_those_of_the_run(scraped):
    prometheus, run, _ = scraped
    before = last_step(run)
    for rank in (0, 1):  # what it had reached is seen, and what it has not reached is not
        seen = f'partialfc_step{{rank="{rank}"}}'
        wait_for(lambda: prometheus.value(seen) >= before)  # noqa: B023
        assert prometheus.value(seen) <= last_step(run) + 1
    assert prometheus.value("partialfc_planned_steps") == 1000000
    assert prometheus.value("partialfc_ranks") == 2
    # Both of one instant: two queries are of two, and a loaded machine is not even.
    for query in (
        "partialfc_images_total / partialfc_steps_total",
        "partialfc:images:rate / on (run) sum by (run) (partialfc:steps:rate)",
    ):
        ratios = [float(sample["value"][1]) for sample in prometheus.query(query)]
        assert ratios
        assert ratios == pytest.approx([24] * len(ratios), rel=0.1)


@pytest.mark.slow
def test_a_stopped_rank_answers_and_its_last_step_grows_old(scraped):
    """The alert looks at the last step, because a process that hangs is still `up`."""
    prometheus, run, process = scraped
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    victim = int(ranks.stdout.split()[-1])
    os.kill(victim, signal.SIGSTOP)
    try:
        wait_for(
            lambda: (
                min(
                    float(sample["value"][1])
                    for sample in prometheus.query("partialfc:seconds_since_step")
                )
                > 3
            )
        )
        assert len(prometheus.query("up == 1")) >= 1
    finally:
        os.kill(victim, signal.SIGCONT)
    now = last_step(run)
    wait_for(lambda: last_step(run) > now)


def test_targets_are_gone_when_the_run_ends(scraped):
    """This is the last test of this run."""
    prometheus, run, process = scraped
    path = targets_path(prometheus.targets, run)
    assert [entry["labels"]["rank"] for entry in json.loads(path.read_text())] == ["0", "1"]
    stop(process)
    assert not path.exists()
    wait_for(lambda: not prometheus.query('up{job="partialfc"}'))


def test_a_taken_port_and_a_folder_that_cannot_be_written_do_not_stop_training(packs, tmp_path):
    port = free_port()
    held = Exporter((Exported("step", "x"),), "127.0.0.1", port)
    (tmp_path / "file").write_text("")
    words = arguments(packs, tmp_path / "run", "run.steps=3", f"monitor.port={port}")
    process = start(2, [*words, f"monitor.targets={tmp_path / 'file'}"])
    output, _ = process.communicate(timeout=300)
    held.close()
    assert process.returncode == 0, output
    assert f"port {port} is taken; metrics are on port" in output
    assert "Prometheus is not told of this run" in output


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and what it signed for a server and a client."""
    need("openssl")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["req", "-newkey", "rsa:2048", "-nodes"]
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    for name in ("server", "client"):
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "extra").write_text("subjectAltName=IP:127.0.0.1\n")
        sign = [
            "x509",
            "-req",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
        ]
        openssl(*sign, "-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "extra")
    return folder


def page_of(run):
    return page(RunFolder(run).look(), every=5)


def secure(packs, folder, certificates, certificate):
    """Arguments of a run that serves over TLS, to those with a certificate of the authority."""
    words = arguments(packs, folder / "run", "run.steps=1000000", "monitor.port=0")
    return [
        *words,
        f"monitor.targets={folder / 'targets'}",
        f"monitor.client_ca={certificates / 'ca.pem'}",
        f"monitor.certificate={certificate.with_suffix('.pem')}",
        f"monitor.key={certificate.with_suffix('.key')}",
    ]


def test_tls_with_client_certificates(packs, certificates, tmp_path):
    """Prometheus and the page read with a certificate; without one nobody does."""
    need("prometheus")
    files = {name: str(certificates / name) for name in ("ca.pem", "client.pem", "client.key")}
    tls = {"ca_file": files["ca.pem"], "cert_file": files["client.pem"]}
    words = secure(packs, tmp_path, certificates, certificates / "server")
    with Prometheus(tmp_path, tls_config={**tls, "key_file": files["client.key"]}) as prometheus:
        process = start(1, words)
        try:
            wait_for(lambda: prometheus.value("partialfc_step") is not None)
            shown = page_of(tmp_path / "run")
            assert "Last step of 1 rank<" in shown
            assert "No answer" not in shown
            address = prometheus.query("up")[0]["metric"]["instance"]
            context = ssl.create_default_context(cafile=files["ca.pem"])
            with pytest.raises(OSError):
                urllib.request.urlopen(f"https://{address}/metrics", context=context, timeout=60)
            with pytest.raises(OSError):
                urllib.request.urlopen(f"http://{address}/metrics", timeout=60)
        finally:
            stop(process)
    wrong = [*words[:-1], f"monitor.key={certificates / 'client.key'}"]
    process = start(1, wrong)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "monitor.certificate" in output


@pytest.mark.parametrize("own", ["server", "lone"])
def test_the_page_of_ranks_that_are_closed_to_it_does_not_call_them_lost(
    packs, certificates, tmp_path, own
):
    """It shows them the run's own certificate, which may not be of their clients' authority."""
    if own == "lone":
        new = ["req", "-newkey", "rsa:2048", "-nodes", "-x509", "-days", "2", "-subj", "/CN=lone"]
        files = ["-keyout", "lone.key", "-out", "lone.pem"]
        subprocess.run(["openssl", *new, *files], cwd=tmp_path, check=True, capture_output=True)
    at = (tmp_path if own == "lone" else certificates) / own
    words = secure(packs, tmp_path, certificates, at)
    config, run = load(ROOT / words[0], words[1:]), tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config))
    Ledger(run / "ledger.jsonl", ranks=2).at(0, now=True)
    table = tuple(Exported(name, "x") for name in ("step", "steps_total", LAST_STEP))
    tls = config.monitor.model_dump(include={"certificate", "key", "client_ca"})
    exporters = [Exporter(table, "127.0.0.1", 0, **tls) for _ in range(2)]
    for exporter in exporters:
        exporter.set("step", 7)
        exporter.set("steps_total", 7)
        exporter.set(LAST_STEP, time.time())
    addresses = [f"127.0.0.1:{exporter.port}" for exporter in exporters]
    write_targets(targets_path(tmp_path / "targets", run), addresses, run="run", scheme="https")
    shown = page_of(run)
    assert ("Last step of 2 ranks" in shown) == (own == "server")
    assert ("certificate of monitor.client_ca, and this page has none" in shown) == (own == "lone")
    assert "No answer" not in shown
    exporters.pop().close()
    assert "No answer from rank 1" in page_of(run)
    close_all(exporters)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [64, 512])
def test_prometheus_reads_many_ranks(tmp_path, ranks):
    """Simulated ranks: one process with that many exporters, found through one targets file."""
    need("prometheus")
    table = tuple(
        Exported(name, "x")
        for name in (
            "step",
            "steps_total",
            "last_step_timestamp_seconds",
            "collective_wait_seconds_total",
        )
    )
    exporters = [Exporter(table, "127.0.0.1", 0) for _ in range(ranks)]
    began = time.monotonic()

    def advance():
        for rank, exporter in enumerate(exporters):
            steps = int(10 * (time.monotonic() - began))
            exporter.set("step", steps)
            exporter.set("steps_total", steps)
            exporter.set("last_step_timestamp_seconds", time.time())
            late = rank == ranks - 7
            exporter.set("collective_wait_seconds_total", steps * (0.0 if late else 0.05))
        return True

    advance()
    with Prometheus(tmp_path, scrape_interval="10s") as prometheus:  # all share one interpreter
        addresses = [f"127.0.0.1:{exporter.port}" for exporter in exporters]
        write_targets(
            targets_path(prometheus.targets, tmp_path / "big"), addresses, run="big", scheme="http"
        )
        wait_for(lambda: advance() and prometheus.value('sum(up{run="big"})') == ranks)
        wait_for(lambda: advance() and prometheus.query("partialfc:lateness:ratio"))
        panels = {title: query.replace("$run", "big") for title, query in QUERIES}

        def latest():
            samples = prometheus.query(panels["Whom the others wait for"])
            return max(samples, key=lambda sample: float(sample["value"][1]))["metric"]["rank"]

        wait_for(lambda: advance() and latest() == str(ranks - 7))
        for title in ("Oldest last steps", "Whom the others wait for"):
            query = panels[title]  # whose rule may not have come to every rank yet
            wait_for(lambda query=query: advance() and len(prometheus.query(query)) == 8)
        seconds = prometheus.value('quantile(0.99, scrape_duration_seconds{run="big"})')
        print(f"{ranks} ranks: 99 of 100 scrapes within {1e3 * seconds:.0f} ms")
    close_all(exporters)


def test_promtool_accepts_rules_and_alerts_and_every_alert_is_tested_both_ways():
    need("promtool")
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=MONITORING, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    alerts = set(re.findall(r"alert: (\w+)", (MONITORING / "alerts.yml").read_text()))
    tested = (MONITORING / "alerts_test.yml").read_text()
    cases = re.findall(r"alertname: (\w+)\n +exp_alerts:( \[\])?", tested)
    assert {name for name, silent in cases if silent} == alerts
    assert {name for name, silent in cases if not silent} == alerts
