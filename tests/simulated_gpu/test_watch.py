"""What the watch sees: every kind of disorder and of waiting, one by one; and nothing in order."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tests.simulated_gpu import library

pytestmark = pytest.mark.skipif(
    not library.loaded, reason="make test-simulated-gpu runs it, on the simulated GPU"
)

if library.loaded:
    from tests.simulated_gpu.watch import Watch


@pytest.fixture
def side():
    return torch.cuda.Stream()


def races_of(act):
    with Watch() as watch:
        act()
    return len(watch.races)


@pytest.mark.parametrize("waits", [True, False])
def test_a_stream_reads_what_another_writes(side, waits):
    def act():
        value = torch.ones(8, device="cuda")
        if waits:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            value + 1

    assert (races_of(act) == 0) == waits


@pytest.mark.parametrize("waits", [True, False])
def test_a_stream_writes_what_another_still_reads(side, waits):
    value = torch.ones(8, device="cuda")

    def act():
        with torch.cuda.stream(side):
            value + 1
            read = side.record_event()
        if waits:
            torch.cuda.current_stream().wait_event(read)
        value.zero_()

    assert (races_of(act) == 0) == waits


@pytest.mark.parametrize("waits", [True, False])
def test_the_host_reads_pinned_memory_that_a_copy_has_not_reached(side, waits):
    def act():
        there = torch.empty(8, pin_memory=True)
        there.copy_(torch.ones(8, device="cuda"), non_blocking=True)
        if waits:
            torch.cuda.current_stream().synchronize()
        there.sum()

    assert (races_of(act) == 0) == waits


@pytest.mark.parametrize("waits", [True, False])
def test_a_thread_writes_what_nobody_has_waited_for(waits):
    value = torch.zeros(8)

    def act():
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(value.fill_, 1)
            if waits:
                done.result()
            value.sum()

    assert (races_of(act) == 0) == waits


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_is_given_out_again_while_a_stream_is_at_it(side, recorded):
    def act():
        value = torch.ones(8, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            value + 1
        if recorded:
            value.record_stream(side)
        del value
        torch.ones(8, device="cuda")

    assert (races_of(act) == 0) == recorded


def test_memory_may_be_given_out_after_its_stream_has_waited(side):
    def act():
        value = torch.ones(8, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            value + 1
        del value
        torch.cuda.current_stream().wait_stream(side)
        torch.ones(8, device="cuda")

    assert races_of(act) == 0


def test_training_on_one_stream_is_in_order_and_waits_for_nothing():
    """Autograd's thread, BatchNorm, a fused optimizer and clipping."""
    images = torch.randn(4, 3, 8, 8, device="cuda")
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4)).cuda()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
    with Watch() as watch:
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                network(images).square().mean().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert watch.launches > 50
    assert not watch.races
    assert not watch.waits


WAITS = {
    "item": lambda t: t.sum().item(),
    "tolist": lambda t: t.tolist(),
    "truth": lambda t: bool(t.any()),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "write by a mask": lambda t: t.__setitem__(t > 0, t[:8] + 1),
    "index of the host": lambda t: t[torch.tensor([0, 1])],
    "unique": lambda t: t.unique(),
    "repeat": lambda t: torch.repeat_interleave(t, t.long()),
    "bincount": lambda t: t.long().bincount(),
    "to the host": lambda t: t.cpu(),
    "from pageable memory": lambda t: t.copy_(torch.zeros(8), non_blocking=True),
    "a new tensor of numbers": lambda t: torch.tensor([1.0, 2.0], device="cuda"),
    "stream": lambda t: torch.cuda.current_stream().synchronize(),
    "event": lambda t: torch.cuda.current_stream().record_event().synchronize(),
    "device": lambda t: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits(name):
    value = torch.ones(8, device="cuda")
    with Watch() as watch:
        WAITS[name](value)
        assert watch.waits
        assert watch.waits[0].places[0][0] == "tests/simulated_gpu/test_watch.py"
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchronizing"):
                WAITS[name](value)
        finally:
            torch.cuda.set_sync_debug_mode("default")


DOES_NOT_WAIT = {
    "to pinned memory": lambda t: torch.empty(8, pin_memory=True).copy_(t, non_blocking=True),
    "from pinned memory": lambda t: t.copy_(torch.zeros(8).pin_memory(), non_blocking=True),
    "fill by a mask": lambda t: t.__setitem__(t > 0, 0.0),
    "where": lambda t: torch.where(t > 0, t, 0.0),
    "repeat of a size": lambda t: torch.repeat_interleave(t, t.long(), output_size=8),
    "assert": lambda t: torch._assert_async((t > -9).all()),
    "number of the host": lambda t: t * torch.tensor(2.0),
}


@pytest.mark.parametrize("name", DOES_NOT_WAIT)
def test_the_host_does_not_wait(name):
    value = torch.ones(8, device="cuda")
    with Watch() as watch:
        DOES_NOT_WAIT[name](value)
    assert not watch.waits


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: there @ here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: there.index_select(0, torch.tensor([0])),
        lambda there, here: torch.where(there > 0, there, here),
    ],
)
def test_an_operator_takes_tensors_of_one_device(mix):
    with pytest.raises(RuntimeError, match="device"):
        mix(torch.ones(8, device="cuda"), torch.ones(8))


def test_only_the_host_has_pinned_memory():
    with pytest.raises(RuntimeError, match="pinned"):
        torch.empty(8, device="cuda", pin_memory=True)
    assert torch.ones(8).pin_memory().is_pinned()
    assert not torch.ones(8).is_pinned()
