"""Checkpoints of hosts that share no disk: a host is a folder, and a rank sees that of its host."""

import errno
import io
import os
import random
import shutil
from contextlib import redirect_stdout
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint import local_disks
from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.folder import MANIFEST, path_of, read_manifest, steps
from partialfc.checkpoint.local_disks.disks import LocalDisks
from partialfc.checkpoint.parts import parts_of, writers
from partialfc.errors import CheckpointError
from partialfc.head.sharding import Sharding
from tests.checkpoint.test_peers import COPIED, assert_same, model_of, state_of, step_of
from tests.support.models import runtime
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

FACTS = {"seed": 2048}
SAVED = 3


def disk(folder, host):
    return folder / f"disk{host}"


def save_on_rank(rank, world_size, folder, head, hosts):
    """Checkpoints of steps 1 to 4, of which each host keeps the last three; the state at each."""
    config, model = model_of(head, folder, hosts[rank])
    local = LocalDisks(disk(folder, hosts[rank]), runtime())
    states = {}
    with checkpoint.Saver(
        disk(folder, hosts[rank]), FACTS, runtime(), keep=SAVED, disks=local
    ) as saver:
        for step in range(1, 5):
            step_of(model, config, step, rank, world_size)
            saver.save(step, model)
            states[step] = state_of(model)
    losses = [step_of(model, config, step, rank, world_size) for step in (5, 6)]
    return states, losses


class Dies(Disk):
    """It fails from the k-th operation on, as all disks of a host do when it dies."""

    def __init__(self, k):
        self.left = k

    def __getattribute__(self, name):
        if name in ("make_folder", "write", "sync", "rename", "remove"):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.EIO, "the host is gone")
        return super().__getattribute__(name)


def die_on_rank(rank, world_size, folder, at):
    """Host 1 dies in the save of step 5; returns the states of steps 4 and 5."""
    config, model = model_of("bias", folder, rank)
    own = disk(folder, rank)
    local = LocalDisks(own, runtime())
    load_path = local.newest()
    local.bring(model.heads)
    checkpoint.load(load_path, model, FACTS, runtime(), verified=True)
    states = {4: state_of(model)}
    step_of(model, config, 5, rank, world_size)
    states[5] = state_of(model)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(shutil, "rmtree", Mock())  # a kill cleans nothing up
        try:
            with checkpoint.Saver(
                own, FACTS, runtime(), keep=1, disks=local, disk=Dies(at) if rank == 1 else None
            ) as saver:
                saver.save(5, model)
        except CheckpointError as error:
            return states, str(error)
    return states, ""


def load_on_rank(rank, world_size, folder, head, hosts, full=None):
    config, model = model_of(head, folder, hosts[rank])
    local = LocalDisks(disk(folder, hosts[rank]), runtime())
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        if rank == full:
            error = OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(Disk, "write", Mock(side_effect=error))
        try:
            path = local.newest()
            if path is None:
                return None
            local.bring(model.heads)
        except CheckpointError as error:
            return str(error)
    step = checkpoint.load(path, model, FACTS, runtime(), verified=True)
    state = state_of(model)
    losses = [step_of(model, config, step, rank, world_size) for step in (5, 6)]
    return state, losses, step, said.getvalue()


def ill_on_rank(rank, world_size, folder, hosts, name, value):
    """Rank 0, alone, has something else in the place of a function; what each rank raises."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(f"{local_disks.__name__}.{name}", value)
        model = model_of("bias", folder, hosts[rank])[1]
        local = LocalDisks(disk(folder, hosts[rank]), runtime())
        try:
            local.newest()
            local.bring(model.heads)
        except (CheckpointError, dist.DistError) as error:
            return type(error).__name__, str(error)
        return None


def with_another_name(path):
    manifest = read_manifest(path)
    note = manifest["files"]["backbone.safetensors"]
    return {**manifest, "files": {**manifest["files"], "/../../outside": note}}


def saved(folder, head="bias", hosts=(0, 1, 2)):
    return run_on_ranks(len(hosts), save_on_rank, folder, head, hosts)


def load(folder, hosts, head="bias", full=None):
    return run_on_ranks(len(hosts), load_on_rank, folder, head, hosts, full)


def assert_state(expected, found, step):
    assert [one[2] for one in found] == [step] * len(found)
    assert_same([(states[step], losses) for states, losses in expected], found)


def files_of(folder, step, ending=".safetensors"):
    return sorted(folder.glob(f"disk*/step_{step:08d}/*{ending}"))


def flip(path, generator):
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "head", [COPIED[0], *(pytest.param(head, marks=pytest.mark.slow) for head in COPIED[1:])]
)
def test_what_hosts_wrote_is_read_on_as_many_fewer_more_and_other_hosts(head, tmp_path):
    """Every byte of rows, states and what is shared; each host had its own files alone."""
    expected = saved(tmp_path, head)
    for host in range(3):
        assert [path.name for path in steps(disk(tmp_path, host))] == [
            path_of(tmp_path, step).name for step in (2, 3, 4)
        ]
    assert [len(files_of(tmp_path, 4, name)) for name in ("backbone.safetensors", MANIFEST)] == [
        1,
        3,
    ]
    assert len(files_of(tmp_path, 4)) == len({path.name for path in files_of(tmp_path, 4)})
    alone = checkpoint.verify(path_of(disk(tmp_path, 0), 4))
    assert "belongs together in one folder" in alone  # for who looks at one host's
    found = load(tmp_path, (0, 1, 2), head)
    assert_state(expected, found, 4)
    assert [losses for _, losses, *_ in found] == [losses for _, losses in expected]
    for hosts in ((2, 0, 1), (0, 1, 2, 7), (2, 1, 1, 0)):
        assert_state(expected, load(tmp_path, hosts, head), 4)
    shutil.rmtree(disk(tmp_path, 0))  # what it alone had went to host 7, or to others
    assert_state(expected, load(tmp_path, (1, 2, 7), head), 4)


def test_a_host_that_is_missing_is_named_and_nothing_is_touched(tmp_path):
    expected = saved(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for said in load(tmp_path, (0, 1)):
        assert "step_00000004: 1 of its" in said
        assert "centers_" in said
        assert f"of host {os.uname().nodename} (rank 2)" in said
        assert "no checkpoint" in said
        assert "peers_every_steps" in said
    assert sorted(tmp_path.rglob("*")) == before
    for step in (2, 3, 4):  # a host of which no sound manifest is left is no reason to begin anew
        (path_of(disk(tmp_path, 0), step) / MANIFEST).write_text("{}")
    for said in load(tmp_path, (0,)):
        assert "without a sound manifest" in said
    assert_state(expected, load(tmp_path, (0, 1, 2)), 4)
    assert load(tmp_path, (8, 9)) == [None, None]


def uncommit(path):
    """As a kill between two hosts' renames leaves it."""
    place = path.with_name(f".{path.name}.partial")
    path.rename(place)
    return place


def test_a_step_that_one_host_did_not_come_to_commit_is_whole_all_the_same(tmp_path):
    """All had written it; the first one of a run would have no other before it."""
    expected = saved(tmp_path)
    (uncommit(path_of(disk(tmp_path, 1), 4)) / MANIFEST).unlink()
    uncommit(path_of(disk(tmp_path, 2), 4))
    for _ in range(2):
        assert_state(expected, load(tmp_path, (0, 1, 2)), 4)
        assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.invalid")]


def test_a_step_that_one_host_has_not_is_passed_over_and_set_aside_on_each(tmp_path):
    expected = saved(tmp_path)
    torn = uncommit(path_of(disk(tmp_path, 1), 4))
    next(torn.glob("centers_*.safetensors")).unlink()
    found = load(tmp_path, (0, 1, 2))
    assert_state(expected, found, 3)
    said = found[0][-1]
    assert "step_00000004: passed over: 1 of its" in said
    assert "(rank 1)" in said
    for host in range(3):
        assert [path.name for path in steps(disk(tmp_path, host))][-1] == "step_00000003"
    assert len([*tmp_path.glob("disk*/.step_00000004.invalid")]) == 2
    assert not [*tmp_path.rglob("*.partial")]


def test_a_flipped_bit_on_one_host_is_as_a_missing_file(tmp_path):
    """R6: of a file that another host has too, it comes from there; of one that is alone, the step
    before is taken. No bit that is read differs."""
    expected, generator = saved(tmp_path), random.Random(24)
    assert_state(expected, load(tmp_path, (0, 1, 2)), 4)  # the backbone is on every host now
    copies = [*tmp_path.glob("disk*/step_00000004/backbone.safetensors")]
    assert len(copies) == 3
    whole = copies[0].read_bytes()
    for path in generator.sample(copies, 2):
        flip(path, generator)
    assert_state(expected, load(tmp_path, (0, 1, 2)), 4)
    assert all(path.read_bytes() == whole for path in copies)
    for step, ending in ((4, ".safetensors"), (3, ".json")):
        flip(
            generator.choice([*tmp_path.glob(f"disk*/step_{step:08d}/centers_*{ending}")]),
            generator,
        )
        assert_state(expected, load(tmp_path, (0, 1, 2)), step - 1)


def test_the_writer_of_each_part_is_known_by_arithmetic():
    """Also of a head that lies on ranks 2 and 3 of four, and where a rank has no row."""
    sizes = {"num_identities": 3, "canonical_shards": 4}
    manifest = {
        "heads": {"all": sizes, "few": {"num_identities": 9, "canonical_shards": 8}},
        "parts": {
            "statistics": 2,
            "centers": {
                "all": {"ranks": 4, "rows_per_identity": 2},
                "few": {"ranks": 2, "rows_per_identity": 1},
            },
        },
        "first_ranks": {"few": 2},
    }
    sharding = Sharding(**sizes, world_size=4)
    expected = {
        f"centers_all_{2 * sharding.owned(rank).start:010d}": rank
        for rank in range(4)
        if sharding.owned(rank)
    }
    found = {file.removesuffix(".safetensors"): rank for file, rank in writers(manifest)}
    few = {name: found.pop(name) for name in [*found] if name.startswith("centers_few_")}
    assert [*few.values()] == [2, 3]
    assert found == {**expected, "statistics_000000": 0, "statistics_000001": 1}
    assert {f"{name}.safetensors" for name in (*found, *few)} == {*parts_of(manifest)}


@pytest.mark.slow
def test_a_host_that_dies_at_any_moment_of_a_save_leaves_the_old_or_the_new_one(tmp_path):
    """R5, R8: before the commit of all hosts none has removed the checkpoint before."""
    saved(tmp_path / "first", hosts=(0, 1))
    ends = []
    for at in range(99):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "first", folder)
        died = run_on_ranks(2, die_on_rank, folder, at)
        found = load(folder, (0, 1))
        ends.append(found[0][2])
        before = [states[ends[-1]] for states, _ in died]
        assert_same([(state, ()) for state in before], found)
        assert bool(died[0][1]) == bool(died[1][1])
        if ends[-1] == 5 and not [*disk(folder, 1).glob("step_00000004")]:
            break  # the disk outlived the save, and what it removes
    assert ends == sorted(ends)
    assert {*ends} == {4, 5}
    assert len(ends) > 10


def test_a_host_without_room_is_heard_of_by_all(tmp_path):
    """Alone, it would leave the others in a collective."""
    expected = saved(tmp_path)
    for said in load(tmp_path, (0, 1, 2), full=1):
        assert "rank 1: " in said
        assert "No space left" in said
    torn = path_of(disk(tmp_path, 1), 4) / ".optimizer.safetensors.partial"
    torn.touch()  # as a kill leaves one that this host does not ask for again
    assert_state(expected, load(tmp_path, (0, 1, 2)), 4)
    assert not [*tmp_path.rglob("*.partial")]


def test_names_that_come_from_another_host_are_those_of_a_checkpoint(tmp_path):
    """A file is written where a name says, so it may not lead out of the folder."""
    saved(tmp_path, hosts=(0, 1))
    before = sorted(tmp_path.rglob("*"))
    ill = "disks.read_manifest", with_another_name
    said = run_on_ranks(2, ill_on_rank, tmp_path, (0, 1), *ill)
    assert all("is no name of a part" in words for _, words in said)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_start_that_another_left_behind_does_not_mix_with_it(tmp_path):
    """Two starts wrote a step of one number: files of one are none of the other's."""
    saved(tmp_path, hosts=(0, 1))
    expected = saved(tmp_path / "other", hosts=(0, 1))
    shutil.rmtree(disk(tmp_path, 0))
    shutil.copytree(disk(tmp_path / "other", 0), disk(tmp_path, 0))
    for said in load(tmp_path, (0, 1)):
        assert "no checkpoint" in said
    shutil.copytree(disk(tmp_path / "other", 1), disk(tmp_path, 5))
    assert_state(expected, load(tmp_path, (0, 1, 5)), 4)
    assert [*disk(tmp_path, 1).glob(".step_00000004.invalid")]
