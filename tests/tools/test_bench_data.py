"""tools/bench/data.py and fuzz.py in small."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.support.places import ROOT
from tests.support.processes import python
from tools.bench import fuzz


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("loaders", {"reader alone, image files", "DALI, 1", "DataLoader, Pillow, 1"}),
        ("cold", {"shuffled", "blocks of 256", "image files, shuffled"}),
    ],
)
def test_the_data_benchmark_measures_what_is_there(part, rows, tmp_path):
    """A moment of each loader and of the disk; figures are recorded by hand, not here."""
    words = ["--parts", part, "--rounds", 1, "--images", 512, "--seconds", 0.1]
    done = python("tools/bench/data.py", *words, "--threads", 1, "--json", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r").read_text())[part]
    found = found.get("measured", found)
    assert rows <= set(found)
    assert all(entry["images_per_second"] > 0 for (entry,) in found.values())


@pytest.mark.slow
def test_the_fuzzer_finds_nothing_in_a_moment_and_finds_what_is_there(tmp_path, monkeypatch):
    """The recorded million inputs are of the same program; a reader that fails is told."""
    small = ["--inputs", "3000", "--workers", "1", "--json", tmp_path / "r"]
    command = [sys.executable, "tools/bench/fuzz.py", *small]  # it limits its own memory
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r").read_text())
    assert {name: target["inputs"] for name, target in record["targets"].items()} == {
        "pack": 900, "jpeg": 900, "bin": 450, "image": 600, "journal": 150,
    }  # fmt: skip
    for target in record["targets"].values():
        assert min(target["outcomes"]["accepted"], target["outcomes"]["refused"]) > 20
    monkeypatch.setattr(fuzz, "_FOLDER", tmp_path)
    seeds = [(b"x" * 40,)]

    def broken(files, folder):
        if files[0][:1] != b"x":
            raise KeyError("wrong kind")
        if len(files[0]) > 200:
            bytearray(300 << 20)
        if len(files[0]) < 20:
            time.sleep(3)
        raise ValueError("right kind")

    monkeypatch.setitem(fuzz.TARGETS, "jpeg", fuzz.Target(seeds, broken, ValueError))
    before = signal.signal(signal.SIGALRM, fuzz._too_long)
    outcome = fuzz.fuzz(("jpeg", 1, 0, 300, 0.05, 200))
    signal.signal(signal.SIGALRM, before)
    kinds = " ".join(outcome.failures)
    assert all(kind in kinds for kind in ("KeyError", "MemoryError", "TimeoutError"))
    assert "--target jpeg --seed 1 --only " in outcome.failures[0]
