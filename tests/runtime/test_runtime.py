"""How a process ends: a Ctrl-C at a bad moment, and an error on another rank."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from partialfc.runtime import network, process
from tests.support.models import settings
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE

PROGRAM = """
import os, signal
from partialfc.runtime import preemption

class Callback:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))
        print("never")

with preemption.listening():
    Callback()
    print("it was lost")
    with preemption.stepping():
        print(preemption.asked())
"""


def test_an_interrupt_that_is_lost_in_a_destructor_is_found_at_the_next_step(tmp_path):
    """Python prints and drops what a destructor or a callback of DALI raises: the run went on."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "it was lost\nTrue\n"
    assert "Exception ignored" in done.stderr
    assert done.returncode == 0, done.stderr


ONE_FAILS = """
import sys
import torch
import torch.distributed as dist
from partialfc.config import Config
from partialfc.errors import exit_code_of
from partialfc.runtime.process import running

settings = {"data": {"train": "x.rec"}, "precision": {"compute": "fp32"}}
try:
    with running(Config.model_validate(settings)) as runtime:
        if runtime.ranks.rank == 1:
            raise ValueError("the cause")
        dist.all_reduce(torch.zeros(1))
except RuntimeError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(exit_code_of(error))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_loses_another_tells_that_ones_error(tmp_path):
    """Without it, one rank of a thousand knows why, and 999 say: connection reset by peer."""
    program = tmp_path / "one_fails.py"
    program.write_text(ONE_FAILS)
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ports = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=localhost"]
    ports.append(f"--master-port={free_port()}")
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *ports, f"--node-rank={rank}", program],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (agent.communicate(timeout=PATIENCE)[0] for agent in agents)
    assert "LostRankError: rank 1 failed first, at step 0: ValueError: the cause" in first
    assert "exitcode  : 7" in first
    assert "ValueError: the cause" in second


@pytest.mark.parametrize(("silent", "seconds"), [(60, 3660), (0, 1800), (5, 1800)])
def test_a_collective_may_take_as_long_as_the_watchdog_lets_a_rank(silent, seconds, monkeypatch):
    """NCCL ended a run after 10 minutes, in which one rank hashed a part of 256 GB."""
    given = {}
    monkeypatch.setattr(process.dist, "init_process_group", lambda name, **how: given.update(how))
    process._join(settings(run={"hang_seconds": silent}), torch.device("cpu"))
    assert given["timeout"] == timedelta(seconds=seconds)


@pytest.mark.parametrize(("silent", "seconds"), [(60, 7200), (0, 7200), (5, 7200), (600, 36600)])
def test_ranks_that_agree_on_a_checkpoint_wait_two_hours_at_least(silent, seconds, monkeypatch):
    """A slow file system ended a run whose watchdog is off, after half an hour."""
    given = []
    monkeypatch.setattr(process, "Links", lambda ranks, address, seconds: given.append(seconds))
    with process.running(settings(run={"hang_seconds": silent, "device": "cpu"})) as here:
        here.links()
        here.links(30.0)
    assert given == [seconds, 30.0]


def test_a_name_is_asked_for_once(monkeypatch):
    """Each connection to the store asked for it again, on every rank."""
    asked = []

    def answer(name, *words, **more):
        asked.append(name)
        found = {"host0": ["10.0.0.7"], "two": ["10.0.0.7", "10.0.0.8"]}[name]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in found]

    monkeypatch.setattr(network.socket, "getaddrinfo", answer)
    for name, expected in (("host0", "10.0.0.7"), ("two", "two")):
        monkeypatch.setenv("MASTER_ADDR", name)
        network.resolve_once()
        assert os.environ["MASTER_ADDR"] == expected
    assert asked == ["host0", "two"]


def test_ranks_of_several_hosts_are_linked_by_the_address_that_leads_to_rank_0(monkeypatch):
    """A host's name may stand for 127.0.1.1 on it, where no other rank finds it."""
    leads = {"10.0.0.1": "10.0.0.9", "127.0.1.1": "127.0.0.1", "192.0.2.1": "10.0.0.1"}
    monkeypatch.setattr(network, "_address_towards", leads.get)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for master, own in (("10.0.0.1", "10.0.0.9"), ("127.0.1.1", "10.0.0.1")):
        monkeypatch.setenv("MASTER_ADDR", master)
        assert network.own_address() == own
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert network.own_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert network.own_address() == "127.0.0.1"  # one host: no other reaches it
