"""What a process takes from its machine: its place, its device, its threads."""

import os
import socket
import subprocess
import sys
import time
import types
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from partialfc import cores
from partialfc.__main__ import main
from partialfc.config import ConfigError
from partialfc.distributed.ranks import Ranks
from partialfc.runtime import device, place
from partialfc.runtime.device import device_of, threads_of
from partialfc.runtime.place import Place, elastic_warning, refuse_unusable
from tests.support.models import settings
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.processes import ENVIRONMENT, python
from tests.support.ranks import run_on_ranks
from tests.support.runs import UNVERIFIED, run, words

CGROUPS = {
    "version 2": (
        "0::/user/job",
        {"user/job/cpu.max": "max 100000", "user/cpu.max": "250000 100000"},
    ),
    "version 2 in a container": ("0::/far/away", {"cpu.max": "250000 100000"}),
    "version 1": (
        "4:cpu,cpuacct:/job\n0::/",
        {
            "cpu,cpuacct/job/cpu.cfs_quota_us": "250000",
            "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    ),
    "none": ("0::/", {"cpu.max": "max 100000"}),
    "a share of one CPU": ("0::/", {"cpu.max": "50000 100000"}),
}


@pytest.mark.parametrize("kind", CGROUPS)
def test_threads_know_the_quota_of_a_container(kind, tmp_path):
    """Every Kubernetes limit is one; the machine below it may have a hundred cores."""
    groups, files = CGROUPS[kind]
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    expected = {"none": 0, "a share of one CPU": 1}.get(kind, 2)
    assert cores.quota(tmp_path / "cgroup", tmp_path / "mounted") == expected


THREADS = """
import os, torch
from partialfc.config import Config
from partialfc.runtime.process import running
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
with running(Config.model_validate({"data": {"train": "x.rec"}, "precision": {"compute": "fp32"}})):
    print(torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux's affinity")
@pytest.mark.parametrize(("own", "expected"), [(None, 1), ("3", 3)])
def test_threads_are_those_that_the_process_may_use(own, expected):
    """One core of many, as a scheduler gives; what the user says goes before."""
    without = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    told = {} if own is None else {"OMP_NUM_THREADS": own}
    # A forked process has the threads of its server: as torch would have them at its import.
    code = f"import torch; torch.set_num_threads({own or 7}){THREADS}"
    done = python("-c", code, env=without | told)
    assert done.stdout == f"{expected}\n", done.stderr


def threads_on_rank(rank, world_size, allowed, quota):
    right = cores.affinity, cores.quota, os.environ.pop("OMP_NUM_THREADS", None)
    cores.affinity, cores.quota = (lambda: frozenset(allowed[rank])), (lambda: quota)
    try:
        return threads_of(None, Ranks.of(), Place(rank, world_size, rank, world_size))
    finally:
        cores.affinity, cores.quota = right[:2]
        if right[2]:
            os.environ["OMP_NUM_THREADS"] = right[2]


@pytest.mark.distributed
def test_threads_are_divided_among_the_ranks_that_may_use_the_same_cores():
    """All under torchrun; none where a job binds each task to cores of its own."""
    same, own = [range(8)] * 2, [range(6), range(6, 8)]
    assert run_on_ranks(2, threads_on_rank, same, 0) == [4, 4]
    assert run_on_ranks(2, threads_on_rank, own, 0) == [6, 2]
    assert run_on_ranks(2, threads_on_rank, own, 4) == [2, 2]


def test_threads_of_torchrun_are_not_the_users(monkeypatch):
    """It sets 1 where nobody set anything: only its own environment tells the two apart."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert place.set_own_threads()
    for before, own in (["HOME=/"], False), (["HOME=/", "OMP_NUM_THREADS=1"], True):
        monkeypatch.setattr(place, "of_torchrun", lambda what, before=before: before)
        assert place.set_own_threads() is own
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert place.set_own_threads()


def test_the_number_of_cores_is_asked_for_in_one_place():
    for folder in ("partialfc", "launch", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "cores.py":
                assert "cpu_count" not in path.read_text(encoding="utf-8"), path


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
@pytest.mark.parametrize(
    ("variable", "value"), [("CUDA_VISIBLE_DEVICES", "0"), ("SLURM_GPUS_PER_NODE", "h100:1")]
)
def test_a_gpu_that_was_asked_for_and_is_not_there_is_refused(variable, value, packs, tmp_path):
    """It used to train on the CPU, at a hundredth of the speed, and end with 0."""
    done = python(*words(packs, tmp_path / "run"), env={**ENVIRONMENT, variable: value})
    assert done.returncode == 2
    assert f"{variable} = '{value}': a GPU is asked for, and torch sees no GPU" in done.stderr
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_are_not_asked_for(value, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert device_of("auto", Place()).type == "cpu"
    with pytest.raises(ConfigError, match=r"a GPU is asked for, and torch sees no"):
        device_of("cuda", Place())


@pytest.mark.distributed
def test_the_first_line_of_a_run_says_where_it_is(packs, tmp_path):
    done = run(packs, tmp_path / "run", "run.steps=3", *UNVERIFIED, "run.device=cpu", ranks=2)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[0]
    assert said == "2 ranks on cpu, 1 thread each; backbone fp32, head fp32"


def device_on_rank(rank, world_size, port, names):
    """A machine whose ranks each see one GPU, under the same number."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(meeting, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    right = torch.cuda.device_count, torch.cuda.get_device_properties
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(uuid=names[rank])
    try:
        return str(device_of("auto", Place(rank, world_size, rank, world_size)))
    except ConfigError as error:
        return str(error)
    finally:
        torch.cuda.device_count, torch.cuda.get_device_properties = right
        for name in (*meeting, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
            del os.environ[name]


@pytest.mark.distributed
def test_one_gpu_a_task_is_its_own_and_one_for_two_ranks_is_refused():
    """--gpus-per-task=1 hands every task another GPU, and each sees it as cuda:0."""
    for names, expected in (
        (["GPU-a", "GPU-b"], "cuda:0"),
        (["GPU-a", "GPU-a"], "2 ranks on this host for 1 GPUs, and each rank needs its own"),
    ):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        found = run_on_ranks(2, device_on_rank, store.port, names)
        assert all(expected in one for one in found), found


def late_on_rank(rank, world_size, port):
    """Rank 0 serves the store, as in a Slurm job, and is done while rank 1 has yet to ask."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    right, right_gpu = device.rendezvous, torch.cuda.get_device_properties
    torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(uuid=f"GPU-{rank}")

    def late(*arguments, **named):
        store, *place = next(right(*arguments, **named))
        known = store.set

        def set_and_wait(*words):
            known(*words)
            time.sleep(0.7 * rank)

        yield types.SimpleNamespace(set=set_and_wait, get=store.get, store=store), *place

    device.rendezvous = late
    try:
        return device._has_its_own(Place(rank, world_size, rank, world_size))
    finally:
        device.rendezvous, torch.cuda.get_device_properties = right, right_gpu
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]


@pytest.mark.distributed
def test_a_late_rank_still_finds_the_store_that_rank_0_serves():
    """--gpus-per-task=1 in a Slurm job: it ended in a DistNetworkError, by chance."""
    assert run_on_ranks(2, late_on_rank, free_port()) == [True, True]


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '': must be an integer"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE = 4: RANK is not set"),
        ({"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "at most 1"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK = 1: must be at most 0 of 1 ranks"),
        ({"GLOO_SOCKET_IFNAME": "nope7"}, "no interface 'nope7'. Set one of lo"),
    ],
)
def test_a_wrong_environment_is_told_in_words_and_first(left, said, tmp_path):
    """Each ended in a traceback with exit code 1, some after minutes."""
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    more = launched if "GLOO_SOCKET_IFNAME" in left else {}
    command = words(tmp_path, tmp_path / "run")
    done = python(*command, env={**ENVIRONMENT, **more, **left})
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (1024, ["can go on with 1, 2, 4 hosts, not with 3. data.global_batch = 1024", "960 or"]),
        (960, []),
    ],
)
def test_an_elastic_start_says_which_numbers_of_hosts_can_run(batch, said, monkeypatch):
    """One host of four lost, and all restarts died of the batch that 24 ranks cannot share."""
    command = ["python", "-m", "torch.distributed.run", "--nnodes=1:4", "--nproc-per-node=8"]
    monkeypatch.setattr(place, "of_torchrun", lambda what: command)
    config = settings(data={"train": "x.rec", "global_batch": batch})
    warning = elastic_warning(config, Place(0, 32, 0, 8)) or ""
    assert all(part in warning for part in said)
    assert bool(said) == bool(warning)
    monkeypatch.setattr(place, "of_torchrun", lambda what: ["torchrun", "--nnodes", "4"])
    assert elastic_warning(config, Place(0, 32, 0, 8)) is None


@pytest.mark.parametrize("command", ["train", "preflight"])
@pytest.mark.parametrize("inside", ["", "/run"])
def test_a_run_folder_that_cannot_be_is_told_first(command, inside, tmp_path, capsys):
    """It was known when images were opened and the model was built."""
    file = tmp_path / "file"
    file.touch()
    folder = f"{file}{inside}"
    assert main([command, *words(tmp_path, folder)[1:]]) == 2
    said = capsys.readouterr().err
    assert f"run.folder = '{folder}': cannot be made or written to: {file}: it is no folder" in said


def test_a_port_of_the_system_is_no_matter_of_certificates(monkeypatch, tmp_path):
    class Refused(socket.socket):
        def bind(self, address):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", Refused)
    for port, refused in ((80, True), (9400, False), (0, False)):
        config = settings(run={"folder": str(tmp_path)}, monitor={"port": port})
        with pytest.raises(ConfigError, match=r"monitor\.port = 80") if refused else nullcontext():
            refuse_unusable(config)


def test_where_there_is_no_signal_for_users_training_can_be_imported():
    code = "import signal; del signal.SIGUSR2; from partialfc.commands.train import main; main([])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "usage: partialfc train" in done.stdout


LARGE_PAGES = """
import os, sys
import partialfc.commands.train as train
right = train.use_large_pages
def told(config):
    right(config)
    print("torch" in sys.modules, os.environ["THP_MEM_ALLOC_ENABLE"], flush=True)
    os._exit(0)
train.use_large_pages = told
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("own", "expected"), [(None, "1"), ("0", "0")])
def test_large_pages_are_asked_for_before_torch_is_there(own, expected, tmp_path):
    """It reads the variable at its first allocation, and never again."""
    environment = {**ENVIRONMENT, "THP_MEM_ALLOC_ENABLE": own}
    if own is None:
        del environment["THP_MEM_ALLOC_ENABLE"]
    tail = ["configs/demo.toml", "data.train=none.rec", "run.device=cpu", f"run.folder={tmp_path}"]
    command = [sys.executable, "-c", LARGE_PAGES, *tail]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == f"False {expected}", done.stderr


def test_an_elastic_start_with_no_end_of_hosts_starts(monkeypatch):
    """A maximum of 100,000, for any number, took hours before the first step."""
    monkeypatch.setenv("PET_NNODES", f"1:{10**9}")
    config = settings(data={"train": "x.rec", "global_batch": 96})
    assert "can go on with 1, 2, 3, 4, 6, 8, 12, 16 and" in elastic_warning(config, Place(0, 4))


@pytest.mark.parametrize("text", [b"garbage", b"0::/\xff\n\xff", b"4:cpu:/" + b"x" * 5000])
def test_a_damaged_list_of_control_groups_limits_nothing(tmp_path, text):
    (tmp_path / "cgroup").write_bytes(text)
    (tmp_path / "cpu.max").write_bytes(b"\xff 1" + b"0" * 5000)
    assert cores.quota(tmp_path / "cgroup", tmp_path) == 0
