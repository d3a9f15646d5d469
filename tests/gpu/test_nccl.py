"""Collectives and a wrapped backbone over NCCL with one rank: what no simulated device has.

The same over gloo on a CPU, so that the test itself is known to run.
"""

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import python

DEVICES = [
    pytest.param("gloo", "cpu", id="gloo"),
    pytest.param(
        "nccl",
        "cuda",
        id="nccl",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not (torch.cuda.is_available() and dist.is_nccl_available()),
                reason="no CUDA device with NCCL",
            ),
        ],
    ),
]
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from partialfc import ArcFace, PartialFC, RowSGD

backend, kind = sys.argv[1:3]
device = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")

def steps(wrap):
    torch.manual_seed(0)
    backbone = wrap(torch.nn.Linear(16, 32).to(device))
    head = PartialFC(300, 32, ArcFace(scale=32), sample_rate=0.3, optimizer=RowSGD(), device=device)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(24, 16, generator=generator).to(device)
        identities = torch.randint(0, 300, (24,), generator=generator).to(device)
        loss = head(backbone(images), identities)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        head.optimizer.step()
    weights = [*backbone.parameters(), head.centers]
    return [loss.detach(), *(one.detach() for one in weights)]

alone = steps(lambda backbone: backbone)
options = {"device_id": device} if backend == "nccl" else {}
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
over = steps(DistributedDataParallel)
for mine, theirs in zip(over, alone, strict=True):
    assert torch.equal(mine, theirs), (mine - theirs).abs().max()
for dtype in (torch.float32, torch.bfloat16, torch.int64):
    rows = torch.arange(6, device=device).reshape(3, 2).to(dtype)
    gathered, own = torch.zeros_like(rows), torch.zeros_like(rows)
    dist.all_gather_into_tensor(gathered, rows)
    assert torch.equal(gathered, rows)
    if backend == "nccl" or dtype == torch.float32:
        dist.reduce_scatter_tensor(own, rows.clone())
        assert torch.equal(own, rows)
    for operation in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        reduced = rows.clone()
        dist.all_reduce(reduced, operation)
        assert torch.equal(reduced, rows)
if device.type == "cuda":
    torch.cuda.synchronize()
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.parametrize(("backend", "device"), DEVICES)
def test_one_rank_over_a_backend_is_the_run_without_one(backend, device):
    """Bit for bit, DDP around the backbone; a collective that this build lacks is seen here."""
    done = python("-c", SCRIPT, backend, device)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"]
