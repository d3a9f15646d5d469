"""The pages: README, the page of every room, and the settings files that they name."""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from partialfc import errors
from partialfc.__main__ import COMMANDS
from partialfc.__main__ import main as partialfc
from partialfc.backbones import build_backbone
from partialfc.config import help_text, load
from partialfc.data.images.jpeg import encode
from partialfc.definitions.phrases import to_value
from tests.support.photos import photo
from tests.support.places import ROOT
from tests.test_layering import FLOORS

README = ROOT / "README.md"
ROOMS = sorted(
    path for path in (ROOT / "partialfc").iterdir() if path.is_dir() and path.name != "__pycache__"
)
PAGES = [
    *(README, ROOT / "CHANGELOG.md", ROOT / "configs" / "README.md", ROOT / "launch" / "README.md"),
    *(ROOT / "tests" / "README.md", ROOT / "tools" / "README.md"),
    ROOT / "tools" / "bench" / "README.md",
    *sorted((ROOT / "partialfc").rglob("*.md")),
]
EXTENDING = ROOT / "partialfc" / "extending.md"
NOT_ONLY_FACES = ROOT / "partialfc" / "not_only_faces.md"
FILES = ("py", "toml", "json", "pth", "png", "md")
LONGER = {"head": 130, "commands": 130, "data": 70, "margins": 100, "config": 70, "runtime": 70}
"""Pages of rooms that users look things up in; all others are at most 60 lines."""


@pytest.fixture(autouse=True, scope="module")
def _my_faces(tmp_path_factory):
    """The module that a page names with --plugin is there."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "my_faces.py").write_text("\n".join(blocks(EXTENDING, "python")))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands_of(page):
    """Lines of its bash blocks, and what stands in backticks and begins as a command does."""
    lines = [line for text in blocks(page, "bash") for line in text.splitlines()]
    starts = r"`((?:partialfc |python tools/|bash tools/|make )[^`]+)`"
    commands = [line.split(" #")[0].strip() for line in [*lines, *re.findall(starts, prose(page))]]
    return [command for command in commands if command]


COMMAND_LINES = sorted({command for page in PAGES for command in commands_of(page)})
HELP = help_text()
SETTINGS = {
    *re.findall(r"^  ([a-z]+\.\S+)", HELP, re.MULTILINE),
    *re.findall(r"^\[([a-z_.]+)\]", HELP, re.MULTILINE),
    *(".".join(found) for found in re.findall(r"^\[([a-z_.]+)\] with (\w+) =", HELP, re.MULTILINE)),
}


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


def test_the_readme_is_short_and_has_both_commands():
    assert len(README.read_text().splitlines()) <= 250
    assert {"make demo", "make test"} <= set(commands_of(README))


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_has_a_short_page(room):
    text = (room / "README.md").read_text()
    assert len(text.splitlines()) <= LONGER.get(room.name, 60)
    assert "**Not in this room:**" in text, "what may not be in it"
    for folder in room.iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            assert f"{folder.name}/" in text, "a folder in a room is on the room's page"


def test_the_readme_has_the_floors_that_are_tested():
    rows = re.findall(r"^\| (\d) \| (.*) \|$", README.read_text(), re.MULTILINE)
    for (number, row), rooms in zip(rows, reversed(FLOORS), strict=True):
        names = {name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", row)}
        assert names == set(rooms), f"floor {number}"


def test_the_page_of_commands_has_each_with_its_example():
    page = (ROOT / "partialfc" / "commands" / "README.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == list(COMMANDS)


def test_the_exit_codes_are_those_of_the_errors():
    page = (ROOT / "partialfc" / "config" / "README.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    ours = {getattr(error, "exit_code", 0) for error in vars(errors).values()}
    assert codes == ours | {1, 76, 130, 143}, "these four are no class's"


class Parsed(BaseException):
    """A command line was understood; no command takes it for an error of its own."""


@pytest.fixture
def only_parsed(monkeypatch):
    """A parser raises Parsed where it would return, so that no command does anything."""
    depth = 0

    def stopping(parse):
        def parsed(*words, **more):
            nonlocal depth
            depth += 1
            try:
                found = parse(*words, **more)
            finally:
                depth -= 1
            if depth == 0:
                raise Parsed
            return found

        return parsed

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(parse))


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_commands_name_what_exists(command, only_parsed, monkeypatch):
    """Targets of the Makefile; scripts, commands and options; settings files and overrides."""
    words = shlex.split(command)
    if "COMMAND" in words:
        return
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[:2] == ["pip", "install"] or words[0] == "export":
        return
    if words[0] in (".", "bash", ".venv/bin/pre-commit", ".venv/bin/python"):
        places = [word for word in words if re.match(r"(tests|tools)/", word)]
        assert all((ROOT / place).exists() for place in places)
        return
    if words[0] == "torchrun":
        at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        assert all(re.match(r"--(standalone|nnodes|nproc-per-node|max-restarts|rdzv-\w+)", word)
                   for word in words[1:at])  # fmt: skip
        words = words[at + 1 :] if words[at] == "-m" else ["python", *words[at:]]
    if words[0] == "python" and words[1].startswith("launch/"):
        words = ["partialfc", Path(words[1]).stem, *words[2:]]
    assert words[0] in ("python", "partialfc"), command
    overrides = [word for word in words if re.fullmatch(r"[a-z_]+\.[a-z_.]+=.*", word)]
    if words[1] == "tools/sampling.py":
        overrides += ["head.negatives=nearest", "head.sample_rate=0.1"]  # one of its runs
    configs = [word for word in words if re.fullmatch(r"configs/.*\.toml", word)]
    for config in configs or ["configs/demo.toml"] * bool(overrides):
        load(config, overrides)
    if words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(Parsed):
            runpy.run_path(words[1], run_name="__main__")
    elif words[1] in ("train", "preflight") or len(words) == 2:
        assert words[1] in COMMANDS
    else:
        with pytest.raises(Parsed):
            partialfc(words[1:])


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, id=name_of(page)) for page in PAGES for code in blocks(page, "python")],
)
def test_python_runs(code):
    exec(compile(code, "page", "exec"), {})


def overrides_of(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from overrides_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={to_value(value)}"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=name_of(page))
        for page in PAGES
        for text in blocks(page, "toml")
        if page not in (EXTENDING, NOT_ONLY_FACES)  # test_plugins.py and test_arrays.py load them
    ],
)
def test_settings_load(text):
    settings = [*overrides_of(tomllib.loads(text))]
    instead = {
        "data.sets.": "data.train=",
        "heads.": "head=",
        "stages=": "run.epochs=",
    }  # of what the demo has
    begins = [key for key in instead if any(one.startswith(key) for one in settings)]
    load(ROOT / "configs" / "demo.toml", [*settings, *(instead[key] for key in begins)])


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem == "README"], ids=name_of)
def test_settings_and_names_exist(page):
    """What stands in backticks: settings, names of ours, files of the page's folder."""
    sections = {name.split(".")[0] for name in SETTINGS}
    for word in re.findall(r"`([^`\s]+)`", prose(page)):
        key = word.partition("=")[0]
        if re.fullmatch(r"[a-z]+(\.\w+)+", key) and key.split(".")[0] in sections:
            assert key in SETTINGS or key.rpartition(".")[2] in FILES, word
        elif re.fullmatch(r"partialfc(\.\w+)+", word):
            named(word)
        elif re.fullmatch(r"\w+\.py", word):
            assert [*page.parent.rglob(word)] or [*ROOT.glob(word)], word
        elif re.fullmatch(r"\w+/[\w/]+\.(py|toml)", word):
            assert (page.parent / word).exists() or (ROOT / word).exists(), word


def named(word):
    """The object or module of a dotted name."""
    parts = word.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(word)


def anchors_of(page):
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_exist(page):
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), link
        if anchor:
            assert anchor in anchors_of(place / "README.md" if place.is_dir() else place), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_a_page_names_exist(page):
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("record", ["head_cpu_100k", "head_cpu_100k_stay", "head_cpu_1m_w2"])
def test_times_of_the_head_are_those_of_the_record(record):
    """To the millisecond and the MiB, on every page that has the record's link in the line."""
    rows = json.loads((ROOT / f"tools/bench/results/{record}.json").read_text())["rows"]
    heads = [head for row in rows for head in row["heads"].values()]
    measured = {
        f"{head['step_seconds']['median'] * 1e3:,.0f} ms, "
        f"{head['extra_peak_bytes'] / 2**20:,.0f} MiB"
        for head in heads
    }
    for page in PAGES:
        for line in page.read_text().splitlines():
            if line.startswith("|") and f"{record}.json" in line:
                found = {*re.findall(r"[\d,]+ ms, [\d,]+ MiB", line.replace("*", ""))}
                assert found, line
                assert found <= measured, line


def test_docstrings_and_messages_name_scripts_that_exist():
    for path in [*(ROOT / "partialfc").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for word in re.findall(r"(?<![\w/.])(?:launch|tools)/[\w/]+\.(?:py|sh)", path.read_text()):
            assert (ROOT / word).exists(), f"{path.name}: {word}"


OWN_IMAGES = README.read_text().partition("## Train on your own images")[2].partition("```bash")[2]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_training_on_own_images_as_it_is_written(tmp_path):
    """Every command of that part, in a folder that has the settings files and photos alone."""
    for person in range(20):
        folder = tmp_path / "photos" / f"person {person}"
        folder.mkdir(parents=True)
        for number in range(2):
            (folder / f"{number}.jpg").write_bytes(encode(photo(person, number)[0]))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    settings = tmp_path / "configs/my_photos.toml"  # what it says one may change, for the CPU here
    shorter = ("epochs = 40 ", "epochs = 2 "), ("warmup_steps = 20 ", "warmup_steps = 0 ")
    for line, short in (*shorter, ("image_size = 112", "image_size = 64")):
        assert line in settings.read_text()
        settings.write_text(settings.read_text().replace(line, short))
    (tmp_path / "bin").mkdir()
    door = tmp_path / "bin" / "partialfc"
    door.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m partialfc "$@"\n')
    door.chmod(0o755)
    lines = OWN_IMAGES.partition("```")[0].strip().splitlines()
    assert len(lines) == 7
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/my_photos/report.html").exists()
    assert "rank-1" in (tmp_path / "results/results.json").read_text() + done.stdout
