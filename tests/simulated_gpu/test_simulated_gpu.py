"""The simulated device in a process of its own, on any machine: it trains, and it sees a race."""

import os
import subprocess
import sys

import pytest

from tests.simulated_gpu.library import unable
from tests.support.places import ROOT

_TRAINS = """
import torch
from partialfc import ArcFace, RowSGD
from tests.simulated_gpu.watch import Watch
from tests.support.heads import flat_head

def trained(device):
    head = flat_head(40, 8, ArcFace(scale=16), optimizer=RowSGD(lr=1.0), device=device)
    head.centers.data.copy_(torch.linspace(-1, 1, 320).view(40, 8).sin())
    own = torch.linspace(-1, 1, 48).view(6, 8).cos().to(device).requires_grad_()
    loss = head(own, torch.arange(6, device=device))
    loss.backward()
    head.optimizer.step()
    return [loss.detach().cpu(), own.grad.cpu(), head.centers.detach().cpu()]

with Watch() as watch:
    there = trained("cuda")
    assert not watch.races, watch.races
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.ones(2, device="cuda").copy_(torch.zeros(2, device="cuda"))
    value = torch.ones(2, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        value + 1
    assert len(watch.races) == 1, watch.races
assert watch.launches > 20
for mine, theirs in zip(there, trained("cpu"), strict=True):
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.skipif(bool(unable()), reason=unable() or "")
def test_the_simulated_gpu_trains_and_sees_a_race():
    """The first run on a machine compiles the device, for twenty seconds."""
    path = os.pathsep.join([str(ROOT / "tests" / "simulated_gpu" / "site"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", _TRAINS],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
