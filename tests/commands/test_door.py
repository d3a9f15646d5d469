"""partialfc COMMAND: what every command has in common, whichever door it is called by."""

import errno
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import partialfc
from partialfc.__main__ import COMMANDS, command_line, main
from partialfc.commands._command import status_of
from partialfc.errors import EXTRAS, CheckpointError, ConfigError, in_words, near
from tests.support.places import ROOT

PARSED = sorted({*COMMANDS} - {"train", "preflight"})
"""Commands whose words argparse reads; the others take settings alone."""


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_names_every_command(words, status, capsys):
    assert main(words) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: partialfc COMMAND ..."
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == [
        *COMMANDS
    ]


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"partialfc {partialfc.__version__}\n"


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("trian", "Did you mean train?"),
        ("convert_checkpoint", "convert-checkpoint"),
        ("x", "--help"),
    ],
)
def test_an_unknown_command_is_told_the_nearest(word, remedy, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert f"no command {word!r}" in error
    assert remedy in error


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert re.match(rf"usage: partialfc {name} .*\S", capsys.readouterr().out)


@pytest.mark.parametrize("name", PARSED)
def test_a_wrong_word_is_refused_with_the_usage(name, capsys):
    assert main([name, "--no-such-option"]) == 2
    assert capsys.readouterr().err.startswith(f"usage: partialfc {name} ")


@pytest.mark.parametrize(
    "words", ["convert pack", "convert-checkpoint in", "slurm status", "slurm logs"]
)
def test_a_command_within_a_command_has_a_usage_of_its_own(words, capsys):
    assert main([*words.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: partialfc {words} ")


def door(line):
    """Run a line of the shell that calls the command; its status is that of the command."""
    return subprocess.run(
        f"{sys.executable} -m partialfc {line}; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("words", ["train --help", "--help"])
def test_a_reader_that_has_read_enough_gets_no_stack(words, buffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered)
    done = door(f"{words} | head -n 1")
    assert done.stdout.startswith("usage: partialfc ")
    assert done.stderr == ""
    assert done.returncode in (0, 141)


@pytest.mark.parametrize("buffered", ["", "1"])
def test_an_output_that_is_full_is_said_without_a_stack(buffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered)
    done = door("--version > /dev/full")
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode in (1, 2)


def test_without_an_output_the_status_is_as_ever():
    for words, status in (("--version", 0), ("nothing", 2)):
        done = door(f"{words} >&-")
        assert "Traceback" not in done.stderr
        assert done.returncode == status


WITHOUT = """
import sys
for package in sys.argv[1].split(","):
    sys.modules[package] = None
"""
BLOCKED = ",".join(package for packages in EXTRAS.values() for package in packages)


def without(packages, code):
    """Run code in a process that cannot import some packages."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code, packages],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_without_extras_a_command_works_or_names_the_line_that_installs_its_own():
    code = """
from partialfc.__main__ import COMMANDS, main
for name in COMMANDS:
    status = main([name, "--help"])
    print(f"status of {name}: {status}", file=sys.stderr)
"""
    told, started = without(BLOCKED, code).stderr.splitlines(), []
    while told:
        line = told.pop(0)
        if "is not installed" in line:
            assert re.fullmatch(r"[\w.]+ is not installed: pip install 'partialfc\[\w+\]'", line)
            assert told.pop(0).endswith(": 2")
        else:
            name, status = re.fullmatch(r"status of (.*): (\d+)", line).groups()
            assert status == "0"
            started.append(name)
    assert {"train", "preflight", "split", "search"} <= set(started)


def test_the_head_trains_with_torch_and_numpy_alone():
    code = """
import torch
from partialfc import ArcFace, PartialFC
head = PartialFC(10, 8, ArcFace(), sample_rate=0.5)
loss = head(torch.randn(4, 8, requires_grad=True), torch.arange(4))
loss.backward()
head.optimizer.step()
assert loss.isfinite()
"""
    without(f"{BLOCKED},pydantic,rich,safetensors,triton,jinja2", code)


def test_every_package_of_an_extra_is_named_with_it():
    """errors.EXTRAS knows packages by what is imported, pyproject.toml by what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = importlib.metadata.packages_distributions()
    for extra, packages in EXTRAS.items():
        named = {word.lower() for package in packages for word in distributions.get(package, ())}
        words = [re.match(r"[\w-]+", text)[0] for text in project["optional-dependencies"][extra]]
        for word in {word.replace("-", "_") for word in words} - {"partialfc"}:
            assert word in {name.replace("-", "_") for name in named}, word


def test_a_file_that_is_not_there_is_told_with_what_is(tmp_path, monkeypatch, capsys):
    """The system's words alone name neither a rule nor a remedy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "mien.rec").touch()
    missing = {
        ("show", "packs/mine.rec"): "No such file or directory. Did you mean packs/mien.rec?",
        ("split", "photos", "out"): f"No such file or directory. {tmp_path} has nothing of that",
        ("search", "a/b.npy", "c.npy"): f"directory. There is no folder a in {tmp_path}. Check",
        ("validate", "packs/mien.rec/x"): "Not a directory. Name a folder: it is a file, or one",
        ("export", "packs/mine.pt", "out"): "there is no such file. ",
    }
    for words, told in missing.items():
        assert main([*words]) in (2, 4)
        assert told in capsys.readouterr().err
    assert near(Path("packs/none")).startswith(f"{tmp_path / 'packs'} has nothing of that name")
    assert in_words(OSError(errno.EACCES, "Permission denied", b"a")).endswith("or name another.")
    assert in_words(OSError(errno.ENOENT, "No such file", 7)) == "7: No such file"


def ended(error, capsys):
    """Exit status of a command that an error ends, and what is said of it."""

    def work():
        raise error

    return status_of(work, ValueError), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("head.scale = 0"), 2),
        (CheckpointError("step_1: torn"), 4),
        (ValueError("--size must be"), 2),
        (FileNotFoundError(2, "No such file", "a.rec"), 1),
        (RuntimeError("a bug"), 1),
    ],
)
def test_only_what_nobody_foresaw_shows_a_stack(error, status, tmp_path, monkeypatch, capsys):
    """On the screen and in the summary of torchrun, which reads the error file."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    code, said = ended(error, capsys)
    assert code == status
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(file))
    summary = ChildFailedError("partialfc", {0: failure}).format_msg()
    for text in (said, summary):
        assert str(error.args[-1]) in text
        assert ("Traceback" in text) == (status == 1), text
    assert json.loads(file.read_text())["message"]["extraInfo"]["timestamp"].isdecimal()


def test_what_all_ranks_find_one_says(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "head.scale = 0\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert ended(ConfigError("head.scale = 0"), capsys) == (2, said)
    assert ended(CheckpointError("torn"), capsys) == (4, "rank 1: torn\n")


def test_a_warning_reads_as_a_sentence(monkeypatch):
    """It had a file of ours, a line number and a line of its code."""
    monkeypatch.setattr("partialfc.__main__.main", lambda words: 0)
    monkeypatch.setattr("os._exit", lambda status: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    command_line()
    ours = str(ROOT / "partialfc" / "data" / "source.py")
    assert warnings.formatwarning("so it is", UserWarning, ours, 30) == "warning: so it is\n"
    assert "source.py:30: UserWarning" in warnings.formatwarning(
        "so it is", UserWarning, "/elsewhere/source.py", 30
    )
