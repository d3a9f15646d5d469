"""Training over several hosts: network namespaces with addresses and names of their own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import need
from tests.cluster.hosts import Hosts, address
from tests.cluster.training import ENVIRONMENT, arguments, last_step, losses
from tests.support.places import ROOT
from tests.support.processes import send
from tests.support.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.cluster

HANG_SECONDS = 10
_SOON = "--rdzv-conf=last_call_timeout=3"  # 30 s is how long torchrun waits for more hosts


@pytest.fixture
def hosts():
    need("ip", "unshare", root=True)
    with Hosts(2) as two:
        yield two


class Agents:
    """torchrun's agents, one a host, that share a run."""

    def __init__(self, hosts, folder, script, words, *options):
        self.hosts, self.folder = hosts, folder
        self._command = [sys.executable, "-m", "torch.distributed.run", _SOON, *options]
        self._command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={address(0)}:29500"]
        self._script = [script, *words]
        self.running = {}

    def start(self, i, **environment):
        words = [*self._command, f"--local-addr={address(i)}", *self._script]
        log = (self.folder / f"host{i}.log").open("a")
        self.running[i] = subprocess.Popen(
            self.hosts.command(i, *words),
            cwd=ROOT,
            # Or torchrun keeps one store for all its rounds, with the addresses of ranks long gone.
            env={
                **ENVIRONMENT,
                "GLOO_SOCKET_IFNAME": f"ve{i}",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                **environment,
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def log(self, i):
        return (self.folder / f"host{i}.log").read_text()

    def processes(self, i):
        """All processes of a host: its agent and its ranks."""
        text = subprocess.run(
            ["ip", "netns", "pids", f"pfc{i}"], capture_output=True, text=True, check=True
        ).stdout
        return [int(process) for process in text.split()]

    def ranks(self, i):
        """Local rank -> process."""
        found = {}
        for process in self.processes(i):
            try:
                command = Path(f"/proc/{process}/cmdline").read_text()
                environment = Path(f"/proc/{process}/environ").read_text()
            except OSError:
                continue
            if "launch/train.py" in command and (
                rank := re.search(r"LOCAL_RANK=(\d)", environment)
            ):
                found[int(rank[1])] = process
        return found

    def kill_host(self, i):
        """As if its power failed."""
        for process in self.processes(i):
            send(process, signal.SIGKILL)
        self.running.pop(i).wait()

    def codes(self, seconds):
        until = time.monotonic() + seconds
        return [agent.wait(max(0.1, until - time.monotonic())) for agent in self.running.values()]

    def end(self):
        for i in list(self.running):
            self.kill_host(i)


@pytest.fixture
def agents(hosts, packs, tmp_path):
    """Make the agents of a run; whatever is left of it is killed."""
    made = []

    def make(*options, steps=1_000_000, script="launch/train.py", more=()):
        words = arguments(packs, tmp_path / "run", f"run.steps={steps}", *more)
        words.append(f"run.hang_seconds={HANG_SECONDS}")
        made.append(Agents(hosts, tmp_path, script, words, *options))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.mark.slow
def test_a_lost_host_and_one_that_joins(agents, tmp_path):
    """--nnodes=1:2: the run goes on from its checkpoint on one rank, and later on two again."""
    run = tmp_path / "run"
    two = agents(
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--max-restarts=9",
        "--rdzv-id=a",
        more=["checkpoint.every_steps=5"],
    )
    two.start(0)
    two.start(1)
    wait_for(lambda: last_step(run) >= 12)
    before, lost = last_step(run), time.monotonic()
    two.kill_host(1)
    wait_for(lambda: world_size(run) == 1)
    wait_for(lambda: last_step(run) > before + 2)
    alone = time.monotonic()
    two.start(1)
    wait_for(lambda: world_size(run) == 2)
    now = last_step(run)
    wait_for(lambda: last_step(run) > now + 2)
    print(
        f"lost host to new steps {alone - lost:.1f} s, joined to more "
        f"{time.monotonic() - alone:.1f} s"
    )
    assert sorted(losses(run)) == list(range(1, last_step(run) + 1)), "no step is missing"


def alive(process):
    """Whether a process still runs; its agent may be too busy to notice that it does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def world_size(run):
    """Ranks of the last start, by the ledger."""
    found = re.findall(r'"event": "start".*"ranks": (\d+)', (run / "ledger.jsonl").read_text())
    return int(found[-1])


def test_a_killed_rank_ends_both_hosts_and_is_named(agents, tmp_path):
    """R10: every process on both hosts exits with an error."""
    two = agents("--nnodes=2", "--nproc-per-node=2", "--max-restarts=0", "--rdzv-id=b")
    two.start(0)
    two.start(1)
    wait_for(lambda: last_step(tmp_path / "run") >= 5)
    ranks = [*two.ranks(0).values(), *two.ranks(1).values()]
    assert len(ranks) == 4
    os.kill(two.ranks(1)[1], signal.SIGKILL)
    killed = time.monotonic()
    codes = two.codes(PATIENCE)
    seconds = time.monotonic() - killed
    assert all(codes), codes
    wait_for(lambda: not any(map(alive, ranks)))
    assert re.search(r"rank 3 was lost", two.log(0)), two.log(0)[-2000:]
    print(f"killed rank to last process gone: {seconds:.1f} s")


@pytest.mark.slow
def test_a_cut_link_is_found_and_a_healed_one_goes_on(agents, hosts, tmp_path):
    """No packet says that a link is gone: only that nothing comes."""
    run = tmp_path / "run"
    two = agents(
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=9",
        "--rdzv-id=c",
        more=["checkpoint.every_steps=5"],
    )
    two.start(0)
    two.start(1)
    wait_for(lambda: last_step(run) >= 7)
    ranks = [*two.ranks(0).values(), *two.ranks(1).values()]
    hosts.cut(1)
    cut = time.monotonic()
    wait_for(lambda: not any(map(alive, ranks)))
    found = time.monotonic() - cut
    hosts.heal(1)
    healed, before = time.monotonic(), last_step(run)
    wait_for(lambda: last_step(run) > before + 2)
    print(
        f"cut link to the last rank gone {found:.1f} s, healed to new steps "
        f"{time.monotonic() - healed:.1f} s"
    )


@pytest.mark.slow
def test_a_stopped_rank_on_the_other_host_is_named(agents, tmp_path):
    """R11: with the Python stacks of the rank that lives."""
    two = agents("--nnodes=2", "--nproc-per-node=1", "--max-restarts=0", "--rdzv-id=d")
    two.start(0)
    two.start(1)
    wait_for(lambda: last_step(tmp_path / "run") >= 5)
    os.kill(two.ranks(1)[0], signal.SIGSTOP)
    stopped = time.monotonic()
    wait_for(lambda: "rank 1 gave no sign of life" in two.log(0))
    print(f"stopped rank to its name: {time.monotonic() - stopped:.1f} s")
    wait_for(lambda: len(list((tmp_path / "run" / "stacks").rglob("rank_*.txt"))) == 1)
    assert all(two.codes(PATIENCE))


def test_an_interface_that_no_other_host_reaches_is_refused_with_a_hint(agents):
    """Instead of ranks that wait for each other until a timeout."""
    two = agents("--nnodes=2", "--nproc-per-node=1", "--max-restarts=0", "--rdzv-id=e")
    two.start(0, GLOO_SOCKET_IFNAME="lo")
    two.start(1, GLOO_SOCKET_IFNAME="lo")
    assert all(two.codes(180))
    hint = "GLOO_SOCKET_IFNAME = 'lo' is 127.0.0.1, which no other host can reach"
    hinted = [i for i in (0, 1) if hint in two.log(i)]
    assert hinted
    for i in hinted:
        assert f"Set GLOO_SOCKET_IFNAME=ve{i}" in two.log(i)
    for i in {0, 1} - {*hinted}:  # a host that was refused takes torchrun's store with it
        assert "RendezvousConnectionError" in two.log(i)


@pytest.mark.slow
def test_a_host_whose_clock_is_wrong_is_named_and_the_run_may_go_on(agents, tmp_path):
    """Every process of one host has a clock that is an hour ahead."""
    clock = tmp_path / "clock"
    clock.mkdir()
    ahead = "import time\nright = time.time\ntime.time = lambda: right() + 3600\n"
    (clock / "sitecustomize.py").write_text(ahead)
    two = agents("--nnodes=2", "--nproc-per-node=1", "--rdzv-id=h", script="launch/preflight.py")
    two.start(0)
    two.start(1, PYTHONPATH=str(clock))
    assert two.codes(180) == [0, 0], two.log(0) + two.log(1)
    table = re.sub(r"[│\s]+", " ", two.log(0))
    assert re.search(r"clocks warning: 3[56]\d\d\.\d s between rank 1 and the others", table), table
    assert "Run a time service" in table


def test_preflight_measures_both_hosts_and_refuses_too_little_room(agents, tmp_path):
    """As the run would be started; and as the run's first phase."""
    two = agents("--nnodes=2", "--nproc-per-node=1", "--rdzv-id=f", script="launch/preflight.py")
    two.start(0)
    two.start(1)
    assert two.codes(180) == [0, 0], two.log(0) + two.log(1)
    table = two.log(0)
    for word in ("all-gather", "reduce-scatter", "GB/s", "images/s", "MiB/s written", "clocks"):
        assert word in table
    wide = agents(
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-id=g",
        steps=3,
        more=["run.preflight=true", "checkpoint.keep=100000000"],
    )
    wide.start(0)
    wide.start(1)
    assert all(wide.codes(180))
    assert "checkpoint.keep = 100000000 needs" in wide.log(0)
    assert not losses(tmp_path / "run")
