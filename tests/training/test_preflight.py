"""What a look at the machines finds, on one rank; tests/cluster has two hosts."""

import re
import sys
import time
from unittest.mock import Mock

import pytest
import torch

from partialfc.checkpoint.saving import Saver
from partialfc.config import ConfigError
from partialfc.model.build import build
from partialfc.model.heads import Numbering
from partialfc.runtime import network
from partialfc.training import preflight
from partialfc.training.findings import Finding
from partialfc.training.preflight import checkpoint_bytes, report
from tests.support.models import runtime, settings
from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"head": {"optimizer": {"name": "adamw"}}},
        {
            "head": {
                "center_format": "fp8",
                "optimizer": {"name": "sgd", "momentum_format": "int8"},
            }
        },
    ],
    ids=["sgd", "adamw", "fp8, int8"],
)
def test_the_size_of_a_checkpoint_is_known_before(sections, tmp_path):
    """Within 3 %: it decides whether a run is refused for want of room."""
    backbone = {"name": "convnet_s", "embedding_dim": 128}
    config = settings(backbone=backbone, data={"train": "x.rec", "image_size": 32}, **sections)
    model = build(config, runtime(), 20_000)
    with Saver(tmp_path, {}, runtime(), keep=1) as saver:
        saver.save(1, model)
    files = (tmp_path / "step_00000001").glob("*.safetensors")
    assert checkpoint_bytes(config, 20_000, 1) == pytest.approx(
        sum(file.stat().st_size for file in files), rel=0.03
    )


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "lamb", "muon", "schedule_free"])
def test_what_the_backbones_optimizer_keeps_is_known_before(name, tmp_path):
    """Of few identities, so that most of the bytes are the backbone's; a part of it is frozen."""
    backbone = {"name": "convnet_s", "embedding_dim": 128, "freeze": ["stages.3"]}
    config = settings(
        backbone=backbone,
        data={"train": "x.rec", "image_size": 32},
        optimizer={"name": name},
        schedule={"name": "linear", "final_factor": 1.0},
    )
    model = build(config, runtime(), 40)
    for one in model.backbone.parameters():
        one.grad = torch.ones_like(one) if one.requires_grad else None
    model.optimizer.step()
    with Saver(tmp_path, {}, runtime(), keep=1) as saver:
        saver.save(1, model)
    files = (tmp_path / "step_00000001").glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    assert checkpoint_bytes(config, 40, 1) == pytest.approx(size, rel=0.05)
    (finding,) = preflight._frozen(config)
    assert "weights stay as they are: stages.3" in finding.value


def test_a_disk_of_a_host_needs_room_for_its_own_rows(tmp_path, monkeypatch):
    """Of four hosts each needs a quarter of what a disk of all does."""
    place = {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    sizes = []
    for shared in (True, False):
        sections = {"run": {"folder": tmp_path}, "checkpoint": {"shared": shared}}
        config = settings(**sections)
        free = 1.2 * checkpoint_bytes(config, 8 << 20, 1)  # two are kept while a third is written
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _, free=free: Mock(free=free))
        (finding,) = preflight._disk(config, runtime(), {"": Numbering((range(8 << 20),))})
        assert (finding.level == "refused") == shared, finding
        sizes.append(float(re.search(r"checkpoint is ([\d.]+) GiB", finding.value)[1]))
    assert sizes[1] == pytest.approx(sizes[0] / 4, rel=0.1)


def test_what_is_refused_is_one_message_and_a_warning_is_none(capsys):
    warning = Finding(
        "clocks", "3 s between rank 1 and the others", "warning", "Run a time service."
    )
    report([warning], runtime())
    assert (
        "warning: 3 s between rank 1 and the others. Run a time service." in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match=r"preflight, disk: full\. Make room\."):
        report([warning, Finding("disk", "full", "refused", "Make room.")], runtime())


def versions_on_rank(rank, world_size, versions, code=("", "", "")):
    right, preflight.package_version = preflight.package_version, lambda: versions[rank]
    try:
        (finding,) = preflight._versions(runtime(), {"my_faces": code[rank]})
    finally:
        preflight.package_version = right
    return finding.level, finding.value


@pytest.mark.distributed
def test_ranks_that_differ_are_the_minority():
    """The one host with another version is named, and both versions, whichever rank one reads."""
    said, *others = run_on_ranks(3, versions_on_rank, ("1", "1", "1"))
    assert said[0] == "fine"
    assert others == [said] * 2
    for level, value in run_on_ranks(3, versions_on_rank, ("1", "2", "1")):
        assert level == "refused"
        assert re.fullmatch(
            "others on rank 1: rank 1 has python .*, partialfc 2, .*rank 0 has python .* 1, .*",
            value,
        )
    same, code = ("1", "1", "1"), ("source a", "source a", "source b")
    for level, value in run_on_ranks(3, versions_on_rank, same, code):
        assert level == "refused"
        assert "rank 2 has" in value
        assert "my_faces source b, rank 0 has" in value


def folder_on_rank(rank, world_size, folder):
    """One host whose disk refuses to be written to."""

    def refuse(path):
        raise OSError(30, "Read-only file system")

    right = preflight._write_speed
    preflight._write_speed = refuse if rank == 1 else right
    preflight.local_rank, local = (lambda: 0), preflight.local_rank
    try:
        (finding,) = preflight._disk(settings(run={"folder": str(folder)}), runtime(), None)
    finally:
        preflight._write_speed, preflight.local_rank = right, local
    return finding.level, finding.value


@pytest.mark.distributed
def test_why_one_host_cannot_write_is_said_by_all(tmp_path):
    expected = f"rank 1 cannot write in {tmp_path}: [Errno 30] Read-only file system"
    assert run_on_ranks(2, folder_on_rank, tmp_path) == [("refused", expected)] * 2


def clocks_on_rank(rank, world_size, ahead):
    time.time = lambda right=time.time: right() + ahead[rank]
    try:
        (finding,) = preflight._clocks(runtime())
    finally:
        time.time = time.time.__defaults__[0]
    return finding.level, finding.value


@pytest.mark.distributed
def test_ranks_whose_clocks_are_away_from_the_others_are_named():
    """Clocks of real processes; all ranks come to the same verdict."""
    (level, value), *others = run_on_ranks(3, clocks_on_rank, (0, 0.1, 0))
    assert level == "fine"
    assert 90 < float(value.removeprefix("within ").removesuffix(" ms")) < 500
    assert others == [(level, value)] * 2
    for level, value in run_on_ranks(3, clocks_on_rank, (0, 0.1, -40)):
        assert level == "warning"
        assert re.fullmatch(r"(39|40)\.\d s between rank 2 and the others", value)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's interfaces")
def test_the_way_to_the_first_host_decides_which_interface_is_right(monkeypatch):
    """lo for a host elsewhere is refused; one host, or all on this machine, are not looked at."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "10.9.8.7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(network, "_address_towards", lambda host: "10.9.8.6")
    monkeypatch.setattr(network, "_interface_of", lambda address: "eth7")
    with pytest.raises(
        OSError, match=r"127\.0\.0\.1, which no other host .* GLOO_SOCKET_IFNAME=eth7"
    ):
        network.refuse_unreachable()
    monkeypatch.setattr(network, "address_of", lambda name: "192.168.0.3")
    assert "GLOO_SOCKET_IFNAME = 'lo' is 192.168.0.3, but eth7" in network.refuse_unreachable()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert network.refuse_unreachable() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(network, "_address_towards", lambda host: "127.0.0.1")
    assert network.refuse_unreachable() is None


def test_a_store_that_torchrun_shares_between_its_rounds_is_warned_of(monkeypatch):
    """On several hosts with restarts only; it made a healed run fail to find its ranks."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in network.stale_store()
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert network.stale_store() is None
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert network.stale_store() is None
