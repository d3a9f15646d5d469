"""Settings that nobody wrote by hand end in words, soon and in little memory."""

import os

import pytest

from partialfc.commands._convert_checkpoint.settings import parse
from partialfc.config import ConfigError, load
from tests.support.places import ROOT

DEMO = ROOT / "configs" / "demo.toml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 20_000 + "]" * 20_000, "in more than 16 others"),
        (".".join(["a"] * 5_000) + " = 1", "in more than 16 others"),
        ("run.seed = " + "9" * 5_000, "4300 digits"),
        ("run.folder = '" + "x" * (1 << 24) + "'", "more than 16,777,216 bytes"),
    ],
    ids=["lists", "keys", "digits", "long"],
)
def test_a_file_that_no_person_wrote_is_refused(text, message, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "a.toml")


def test_an_override_is_bounded_too():
    with pytest.raises(ConfigError, match="in more than 16 others"):
        load(DEMO, ["data.train=" + "[" * 20_000])
    with pytest.raises(ConfigError, match=r"run\.seed = .* must be an integer"):
        load(DEMO, ["run.seed=" + "9" * 5_000])


@pytest.mark.parametrize("read", [load, parse])
def test_what_is_no_file_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(ConfigError, match="it is no file"):
            read(tmp_path / path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("-" * 100_000 + "1", "nested too deeply"),
        ("-" * 3_000 + "1", "nested too deeply"),
        ("(" * 100_000 + "1" + ")" * 100_000, "too many nested parentheses"),
        ("9" * 7_999, "4300 digits"),
        ("9**9**9**9", "not a plain value"),
        ("'x' * 9999999999", "not a plain value"),
    ],
    ids=["minus", "fewer", "parentheses", "digits", "power", "text"],
)
def test_a_python_file_of_arcface_torch_is_bounded(value, message, tmp_path):
    (tmp_path / "a.py").write_text(f"config = edict()\nconfig.lr = {value}\n")
    with pytest.raises(ConfigError, match=message):
        parse(tmp_path / "a.py")
