"""Ranks on hosts of their own leave copies, hosts are lost, and others go on from what is left.

A host is a folder here: what a rank of another host has not in its own came over the network.
"""

import errno
import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.folder import MANIFEST
from partialfc.checkpoint.peers.memory import Memory, Slot
from partialfc.checkpoint.peers.run import LINE, Peers
from partialfc.config import ConfigError
from partialfc.distributed.links import rounds
from partialfc.errors import CheckpointError
from partialfc.model.batch_norm import statistics
from partialfc.model.step import train_step
from partialfc.runtime.descriptors import Groups, needed
from tests.runtime.test_descriptors import sockets
from tests.support.models import batch, flat_model, normed_model, runtime, settings, share
from tests.support.ranks import run_on_ranks
from tests.training.test_train_over_ranks import HEADS, global_state, joined

pytestmark = pytest.mark.distributed

FACTS = {"seed": 2048}
COPIED = ["fp16, int8, move", "fp8, int8, in host memory", "a margin's average", "bias"]


def sections(folder, host):
    os.environ["GROUP_RANK"] = str(host)
    return {
        "run": {"folder": folder},
        "checkpoint": {"peers_every_steps": 1, "peers_folder": folder / f"host{host}"},
    }


def model_of(head, folder, host):
    if head == "BatchNorm":
        return normed_model(**sections(folder, host))
    config = settings(**sections(folder, host))
    return config, flat_model(config, **HEADS[head])


def step_of(model, config, step, rank, world_size):
    images, identities = (share(part, rank, world_size) for part in batch(step, 24))
    return train_step(model, config, images, identities, 0.05).loss.item()


def state_of(model):
    own = {name: value.clone().numpy() for name, value in statistics(model.backbone).items()}
    return global_state(model), own


def copy_on_rank(rank, world_size, folder, head):
    """Copies of steps 2 and 4; two more steps are lost."""
    config, model = model_of(head, folder, rank)
    peers = Peers(config, runtime())
    assert peers.found is None
    peers.begin(model, 0, from_copies=False)
    for step in range(4):
        step_of(model, config, step, rank, world_size)
        if step % 2:
            peers.copy(step + 1, model, FACTS, "", None)
    state = state_of(model)
    losses = [step_of(model, config, step, rank, world_size) for step in (4, 5)]
    peers._copier.wait()
    assert peers.last.step == 4
    return state, losses


def go_on_on_rank(rank, world_size, folder, head, hosts):
    config, model = model_of(head, folder, hosts[rank])
    peers = Peers(config, runtime())
    if peers.found is None:
        return None
    with peers.fetched(model) as path:
        assert checkpoint.load(path, model, FACTS, runtime()) == peers.step
    state = state_of(model)
    left = [*path.parent.glob(".read*")]
    losses = [step_of(model, config, step, rank, world_size) for step in range(peers.step, 6)]
    return state, losses, peers.step, left


def copies(folder, head):
    return run_on_ranks(3, copy_on_rank, folder, head)


def go_on(folder, head, hosts):
    return run_on_ranks(len(hosts), go_on_on_rank, folder, head, hosts)


def lose(folder, *hosts):
    for host in hosts:
        shutil.rmtree(folder / f"host{host}")


def assert_same(expected, found):
    """Rows and states of all ranks together, what they share, and the steps."""
    before = [state for (state, _), *_ in expected]
    after = [state for (state, _), *_ in found]
    for one, other in zip(joined(before), joined(after), strict=True):
        assert np.array_equal(one, other)
    for _, shared, steps in after:
        assert steps == before[0][2]
        assert all(map(np.array_equal, shared, before[0][1]))


def sockets_on_rank(rank, world_size, folder):
    """Those that copies have, while they are made and at the end."""
    config, model = model_of(COPIED[0], folder, rank)
    before = sockets()
    peers = Peers(config, runtime())
    peers.begin(model, 0, from_copies=False)
    opened = sockets() - before
    peers.copy(1, model, FACTS, "", None)
    peers._copier.wait()
    copied = sockets() - before
    peers.end()
    return opened, copied, sockets() - before


def test_copies_connect_a_rank_with_a_few_others(tmp_path):
    """They had a gloo group: a connection with each of 4,096 ranks, and as many addresses."""
    few = 2 * rounds(3) + 2
    assert run_on_ranks(3, sockets_on_rank, tmp_path) == [(few, few, 0)] * 3
    groups = {"nccl": True, "ranks_per_copy": frozenset()}
    with_copies, without = (
        sum(needed(1, 4096, Groups(peers=peers, **groups)).values()) for peers in (True, False)
    )
    assert with_copies - without == 2 * rounds(4096) + 1 + 4


@pytest.mark.parametrize(
    "head", [COPIED[0], *(pytest.param(head, marks=pytest.mark.slow) for head in COPIED[1:])]
)
def test_what_hosts_lose_comes_from_the_others_on_fewer_as_many_and_more_ranks(head, tmp_path):
    """R21: every byte of rows, states and what is shared, and the steps after."""
    expected = copies(tmp_path, head)
    lose(tmp_path, 2)
    for hosts in ([1, 0], [0, 1, 9], [1, 8, 0, 9]):
        found = go_on(tmp_path, head, hosts)
        assert {step for *_, step, _ in found} == {4}
        assert not any(left for *_, left in found)
        assert_same(expected, found)
        if len(hosts) == 3:
            assert [losses for _, losses, *_ in found] == [losses for _, losses in expected]
    lose(tmp_path, 1)  # with it, what is left of the rank there
    assert go_on(tmp_path, head, [0, 5]) == [None, None]


@pytest.mark.slow
def test_each_rank_gets_its_own_statistics_where_there_are_as_many(tmp_path):
    expected = copies(tmp_path, "BatchNorm")
    lose(tmp_path, 2)
    found = go_on(tmp_path, "BatchNorm", [0, 1, 9])
    for (_, own), (_, got) in zip((s for s, _ in expected), (s for s, *_ in found), strict=True):
        assert own.keys() == got.keys() != set()
        assert all(np.array_equal(own[name], got[name]) for name in own)
    assert [losses for _, losses, *_ in found] == [losses for _, losses in expected]
    assert go_on(tmp_path, "BatchNorm", [0, 1])[0][2] == 4


def test_a_kill_while_hosts_write_leaves_the_older_copy(tmp_path):
    """Two parts of the newer one are whole nowhere: of rank 1 it and its keeper were writing."""
    copies(tmp_path, "bias")
    torn = [*tmp_path.glob("host*/*/*/*_of_000001_1")]
    assert len(torn) == 2
    for part in torn:
        (part / MANIFEST).unlink()
    assert {step for *_, step, _ in go_on(tmp_path, "bias", [0, 1, 2])} == {2}


def test_checkpoints_that_were_taken_back_take_the_copies_with_them(tmp_path, capfd):
    """Copies that were made after a checkpoint do not undo that somebody removed it."""
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    copies(tmp_path, "bias")
    assert go_on(tmp_path, "bias", [0, 1])[0][2] == 4
    (tmp_path / "checkpoints" / "step_00000003").rmdir()
    assert go_on(tmp_path, "bias", [0, 1]) == [None, None]
    (tmp_path / LINE).unlink()  # the folder was emptied: another run
    assert go_on(tmp_path, "bias", [0, 1]) == [None, None]


def other_rows_on_rank(rank, world_size, folder):
    config, model = model_of("bf16, adagrad", folder, rank)
    peers = Peers(config, runtime())
    try:
        with peers.fetched(model):
            return "fetched"
    except CheckpointError as error:
        return str(error)


def test_rows_of_another_format_are_refused_on_every_rank(tmp_path):
    copies(tmp_path, "fp16, int8, move")
    for said in run_on_ranks(3, other_rows_on_rank, tmp_path):
        assert "centers is torch.float16" in said
        assert "the settings want torch.bfloat16" in said


def no_room_on_rank(rank, world_size, folder, at):
    config, model = model_of("bias", folder, rank)
    peers = Peers(config, runtime())
    full = OSError(errno.ENOSPC, "No space left on device")
    try:
        if at == "fetch":
            with pytest.MonkeyPatch.context() as patch:
                if rank == 1:
                    patch.setattr(Slot, "begin", Mock(side_effect=full))
                with peers.fetched(model):
                    return "fetched"
        peers.begin(model, 3, from_copies=False)
        peers.copy(4, model, FACTS, "", None)
        peers._copier.wait()
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(Memory, "keep_only", Mock(side_effect=full))
            peers.copy(5, model, FACTS, "", None)
        return f"off: {peers._off}"
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize(
    ("at", "words"), [("fetch", "rank 1 has no room for what it reads"), ("copy", "off: True")]
)
def test_a_rank_without_room_is_heard_of_by_all(at, words, tmp_path):
    """Alone, it would leave the others in a collective."""
    copies(tmp_path, "bias")
    for said in run_on_ranks(3, no_room_on_rank, tmp_path, at):
        assert words in said


def too_little_on_rank(rank, world_size, folder):
    config, model = model_of("bias", folder, rank)
    peers = Peers(config, runtime())
    import partialfc.checkpoint.peers.run as peers_run

    free_bytes, peers_run.free_bytes = peers_run.free_bytes, lambda _: 1000 * (1 + rank)
    try:
        peers.begin(model, 0, from_copies=False)
    except ConfigError as error:
        peers.begin(model, 3, from_copies=False)  # a run that can go on is not ended for it
        peers.copy(1, model, FACTS, "", None)
        return str(error), peers.last
    finally:
        peers_run.free_bytes = free_bytes
    return None


def test_memory_that_is_too_small_is_refused_before_the_first_step(tmp_path):
    for said, last in run_on_ranks(2, too_little_on_rank, tmp_path):
        assert "checkpoint.peers_folder" in said
        assert "1,000 are free" in said
        assert last is None


def alone_on_rank(rank, world_size, folder):
    os.environ["GROUP_RANK"] = "0"
    config = settings(**sections(folder, 0))
    model = flat_model(config)
    peers = Peers(config, runtime())
    step = peers.step
    peers.begin(model, 0, from_copies=False)
    step_of(model, config, 0, rank, world_size)
    peers.copy(step + 2, model, FACTS, "", None)
    peers._copier.wait()
    torch.distributed.barrier()
    names = sorted(path.name for path in folder.glob("host0/*/*/*"))
    peers.end()
    torch.distributed.barrier()
    return step, names, [*(folder / "host0").iterdir()]


def test_one_host_has_what_is_common_once_and_leaves_nothing_when_it_ends(tmp_path):
    for step, names, left in run_on_ranks(2, alone_on_rank, tmp_path):
        assert step == -1
        assert names == ["000000_common_0", "000000_of_000000_0", "000001_of_000001_0"]
        assert left == []
