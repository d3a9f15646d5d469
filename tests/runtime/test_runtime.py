"""How a process ends: a Ctrl-C at a bad moment, and an error on another rank."""

import os
import subprocess
import sys

import pytest

from tests.support.places import ROOT

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
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120
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
    ports.append(f"--master-port={20000 + os.getpid() % 20000}")
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
    first, second = (agent.communicate(timeout=120)[0] for agent in agents)
    assert "LostRankError: rank 1 failed first, at step 0: ValueError: the cause" in first
    assert "exitcode  : 7" in first
    assert "ValueError: the cause" in second
