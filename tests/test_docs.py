"""Every shipped config, and every command, link and example of the README."""

import re
import subprocess
import sys

import pytest
import torch

from partialfc.backbones import build_backbone
from partialfc.config import load
from tests.support.places import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
_TORCHRUN = {
    *("--nproc-per-node", "--standalone", "--nnodes", "--max-restarts"),
    *("--rdzv-backend", "--rdzv-endpoint"),
}
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language in ("bash", "sh")
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_configs_load_and_their_backbone_exists(path):
    config = load(path)
    with torch.device("meta"):
        build_backbone(
            config.backbone.name,
            embedding_dim=config.backbone.embedding_dim,
            image_size=config.data.image_size,
        )
    config.check(2)


def test_the_readme_has_both_commands():
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_name_what_exists(command):
    """Targets of the Makefile, scripts that start, configs and overrides that load."""
    words = command.split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    scripts = [word for word in words if re.fullmatch(r"(launch|tools)/[\w/]+\.py", word)]
    for script in scripts:
        help_page = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert help_page.returncode == 0, help_page.stderr
        for option in (word for word in words if word.startswith("--") and word != "--help"):
            if option.split("=")[0] not in _TORCHRUN:
                assert option.split("=")[0] in help_page.stdout, option
    configs = [word for word in words if re.fullmatch(r"configs/\w+\.toml", word)]
    for config in configs:
        load(ROOT / config, [word for word in words if re.fullmatch(r"[a-z_.]+=.*", word)])
    assert scripts or configs or words[0] in ("git", "cd", "export", "tensorboard", "curl"), command


@pytest.mark.parametrize("number", range(sum(language == "python" for language, _ in BLOCKS)))
def test_readme_python_runs(number, tmp_path):
    block = [text for language, text in BLOCKS if language == "python"][number]
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_readme_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in slugs, anchor
