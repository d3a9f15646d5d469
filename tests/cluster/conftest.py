"""What the cluster tests share; each is skipped, with what is missing, where it cannot run."""

import os
import shutil

import pytest

from tests.cluster.slurm import Slurm
from tests.support.places import FIXTURES
from tools import omniglot


def need(*commands: str, root: bool = False) -> None:
    missing = [command for command in commands if shutil.which(command) is None]
    if missing or (root and os.getuid()):
        lack = f"no {', '.join(missing)} here" if missing else "not root"
        pytest.skip(f"CLUSTER TEST SKIPPED: {lack}; as root on Debian: tests/cluster/install.sh")


@pytest.fixture(scope="session")
def packs(tmp_path_factory):
    """40 identities of real handwriting."""
    folder = tmp_path_factory.mktemp("packs")
    archive = FIXTURES / "omniglot" / "omniglot_background.npz"
    size = ["--characters", "16", "--held-out", "6", "--pairs", "2400", "--size", "32"]
    assert omniglot.main([str(archive), str(folder), *size]) == 0
    return folder


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    need("slurmctld", "slurmd", "munged", root=True)
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running
