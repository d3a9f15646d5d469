"""The wheel, installed where no file of the checkout may be read: it is complete by itself.

The new environment sees the packages of the running one, so nothing is downloaded.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import partialfc
from partialfc.__main__ import COMMANDS
from tests.support.places import FIXTURES, ROOT

SOURCES = ("partialfc", "tests", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)
NO_CHECKOUT = f"""
import sys
def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith("{ROOT}/"):
        if not str(arguments[0]).startswith("{sys.prefix}/"):
            raise RuntimeError(f"{{arguments[0]}} is of the checkout")
sys.addaudithook(refuse)
"""
"""Runs at the start of every process of the new environment."""


def call(*words, cwd):
    """Run a command to its end, which must be good; its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, made from the checkout, and the wheel that is made from it; folders of both."""
    folder = tmp_path_factory.mktemp("build")
    source, sdist, wheel = (folder / name for name in ("source", "sdist", "wheel"))
    for path in (source, sdist, wheel):
        path.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source)
    call(sys.executable, "-c", BUILD, "build_sdist", sdist, cwd=source)
    (archive,) = sdist.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(sdist, filter="data")
    call(
        sys.executable,
        "-c",
        BUILD,
        "build_wheel",
        wheel,
        cwd=archive.with_suffix("").with_suffix(""),
    )
    return archive, next(wheel.glob("*.whl"))


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """Python of a new environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    found = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "running.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", found, "install", "--quiet"]
    call(*pip, "--no-deps", "--no-index", "--no-compile", built[1], cwd=folder)
    (packages / "sitecustomize.py").write_text(NO_CHECKOUT)
    return found


def test_the_sdist_has_what_builds_the_wheel_and_no_tests(built):
    with tarfile.open(built[0]) as tar:
        top = {Path(name).parts[1] for name in tar.getnames() if "/" in name}
    assert {"partialfc", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= top
    assert not {"tests", "tools", "launch"} & top


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built):
    ours = (ROOT / "partialfc").rglob("*")
    expected = {
        str(path.relative_to(ROOT))
        for path in ours
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (about,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(about).decode()
    assert names == expected
    for line in (
        f"Version: {partialfc.__version__}",
        "Author: partialfc developers",
        "License-Expression: MIT",
    ):
        assert f"\n{line}\n" in metadata
    assert "-URL:" not in metadata.partition("\n\n")[0]


def test_without_extras_neither_dali_nor_matplotlib_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}
    assert base == {"torch", "numpy", "pydantic", "rich", "safetensors"}


def test_the_command_is_on_the_path_and_lists_the_others(python, tmp_path):
    command = python.with_name("partialfc")
    assert call(command, "--version", cwd=tmp_path) == f"partialfc {partialfc.__version__}\n"
    listed = call(command, "--help", cwd=tmp_path)
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert "head.sample_rate" in call(command, "train", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_every_command_starts_and_the_readme_is_right_without_the_checkout(python, tmp_path):
    """In one process, since torch takes seconds to import."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    code = f"""
import json, sys, partialfc
assert partialfc.__file__.startswith(sys.prefix), partialfc.__file__
from partialfc.__main__ import COMMANDS, main
assert {{name: main([name, "--help"]) for name in COMMANDS}} == dict.fromkeys(COMMANDS, 0)
for block in json.load(open("blocks.json")):
    exec(compile(block, "README.md", "exec"), {{"__name__": "__main__"}})
try:
    open({str(ROOT / "README.md")!r})
except RuntimeError:
    sys.exit()
sys.exit("the checkout can be read")
"""
    call(python, "-c", code, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_its_report_and_its_page_are_made_without_the_checkout(python, tmp_path):
    for suffix in (".rec", ".idx"):
        shutil.copy(FIXTURES / "records" / f"insightface{suffix}", tmp_path / f"faces{suffix}")
    (tmp_path / "tiny.toml").write_text(
        """
        run = { folder = "run", steps = 3, device = "cpu" }
        data = { train = "faces.rec", global_batch = 8 }
        backbone = { name = "convnet_s", embedding_dim = 16 }
        precision = { compute = "fp32" }
        log = { every_steps = 1 }
        """
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    call(python, *torchrun, "-m", "partialfc", "train", "tiny.toml", cwd=tmp_path)
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    partialfc_ = python.with_name("partialfc")
    call(partialfc_, "report", "run", "--out", "report.html", cwd=tmp_path)
    call(partialfc_, "status", "run", "--out", "status.html", cwd=tmp_path)
    for page in ("report.html", "status.html"):
        assert "<style>" in (tmp_path / page).read_text()
