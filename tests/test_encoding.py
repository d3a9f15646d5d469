"""Text is UTF-8 in every locale, and what a user named is never read as markup."""

import ast
import os
import subprocess
import sys

import pytest

from partialfc.__main__ import main
from partialfc.config import load
from partialfc.definitions.phrases import to_value
from partialfc.records.console import show_table
from tests.support.places import ROOT
from tests.support.processes import python
from tests.support.runs import UNVERIFIED, words

SOURCES = sorted(
    path for folder in ("partialfc", "launch", "tools") for path in (ROOT / folder).rglob("*.py")
)


def text_without_encoding(tree: ast.Module) -> list[str]:
    """Return the calls that read or write text in whatever encoding the locale has."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        if ast.unparse(node.func) == "os.open":  # a number, of bytes
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        arguments = list(node.args)
        if name == "open" and isinstance(node.func, ast.Name):
            arguments = arguments[1:]  # the path
        modes = [*arguments[:1], *(word.value for word in node.keywords if word.arg == "mode")]
        mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else None
        if name in ("open", "fdopen") and isinstance(node.func, ast.Attribute) and modes:
            is_text = isinstance(mode, str) and "b" not in mode and ":" not in mode
        elif name == "open":
            is_text = not (isinstance(mode, str) and "b" in mode)
        else:
            of_path = {
                "read_text": 0,
                "write_text": 1,
            }  # a function takes the path too
            is_text = len(node.args) == of_path.get(name)
        if is_text:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("path.read_text()", True),
        ("path.open('a')", True),
        ("path.open(errors='replace')", True),
        ("open('x', 'w')", True),
        ("path.write_text(text)", True),
        ("path.open(encoding='utf-8')", False),
        ("path.open('rb')", False),
        ("open(path, mode='wb')", False),
        ("write_text(path, text)", False),
        ("read_text(path)", False),
        ("os.open('/dev/null', os.O_RDONLY)", False),
        ("Image.open(data)", False),
        ("tarfile.open(path, 'r:')", False),
    ],
)
def test_a_call_without_an_encoding_is_seen(line, is_found):
    assert bool(text_without_encoding(ast.parse(line))) == is_found


def test_text_is_read_and_written_as_utf_8():
    """In a GBK or Latin-1 locale a run wrote a config.toml that it could not read again."""
    found = {
        str(path.relative_to(ROOT)): calls
        for path in SOURCES
        if (calls := text_without_encoding(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert not found


def test_a_path_is_shown_as_it_is(packs, tmp_path, capsys, monkeypatch):
    """[red] in a name was read as a colour, and [/x] ended a training at its very end."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "[red]x[/y]"
    folder.mkdir(parents=True)
    for name in ("train.rec", "train.idx"):
        (folder / name).symlink_to(packs / name)
    show_table("Done", {"results": "[red]x[/y]"})
    assert main(["show", "[red]x[/y]/train.rec"]) == 0
    assert capsys.readouterr().out.count("[red]x[/y]") == 2


def test_a_run_in_a_folder_of_any_name_can_be_read_again(packs, tmp_path):
    """A line break, a quote, a percent sign, markup and letters beyond Latin-1."""
    folder = tmp_path / "[red]é人\n%j'x[/y]"
    plain = words(packs, "", "run.steps=3", *UNVERIFIED)
    command = [word for word in plain if not word.startswith("run.folder")]
    done = python(*command, f"run.folder={to_value(str(folder))}")
    assert done.returncode == 0, done.stderr
    assert load(folder / "config.toml").run.folder == folder
    assert "[red]é人" in done.stdout
    assert (folder / "summary.json").exists()


def test_a_letter_that_the_locale_lacks_ends_nothing():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "partialfc", "explain", "configs/demo.toml"]
    command += ["--identities", "100"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout.isascii()
