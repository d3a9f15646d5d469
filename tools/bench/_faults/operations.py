"""What happens to a run that nobody kills: full disks, closed pipes, damaged records, signals."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from partialfc.data.dataset import open_dataset
from partialfc.data.names import names_path
from partialfc.writing import write_json
from tools.bench._faults.runs import Run, losses, steps_in, torchrun

Words = Callable[..., list[str]]
"""A command line of one rank, from the folder of its run and overrides."""

_SIGNALS = ((signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75))
_LONG = ("run.steps=1000000", "checkpoint.every_steps=0")


def operations(scratch: Path, words: Words, chance: random.Random) -> dict[str, list[bool]]:
    """Return what was tried and whether it held, by name; a full disk needs root."""
    return {
        "full disk": full_disk(scratch, words),
        "closed pipe": closed_pipe(scratch, words),
        "damaged lines": damaged_lines(scratch, words, chance),
        "two starts": two_starts(scratch, words),
        "signals": [signalled(scratch, words, *one) for one in _SIGNALS],
        "centers in others' hands": [*modules(scratch), renumbered(scratch, words)],
    }


def full_disk(scratch: Path, words: Words) -> list[bool]:
    """R16: every record is lost, the checkpoints on another disk are not."""
    disk, saved = scratch / "disk", scratch / "saved"
    disk.mkdir()
    saved.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return []
    try:
        (disk / "checkpoints").symlink_to(saved)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'full'}"], capture_output=True)
        run = Run(words(disk, "run.steps=6"), scratch / "disk.log")
        return [run.wait() == 0 and (saved / "step_00000006").exists()]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def closed_pipe(scratch: Path, words: Words) -> list[bool]:
    """R16: the reader leaves after a line."""
    folder = scratch / "pipe"
    piped = ["bash", "-o", "pipefail", "-c", '"$@" 2>&1 | head -1', "bash"]
    run = Run([*piped, *words(folder, "run.steps=30")], scratch / "pipe.log")
    return [run.wait() == 0 and steps_in(folder) == 30]


def damaged_lines(scratch: Path, words: Words, chance: random.Random) -> list[bool]:
    """R19: a bit of each record is flipped before each of ten starts."""
    folder, held = scratch / "damaged", []
    for step in range(3, 14):
        code = Run(words(folder, f"run.steps={step}"), scratch / "damaged.log").wait()
        held.append(code == 0 and step in losses(folder))
        for name in ("metrics.jsonl", "ledger.jsonl"):
            content = bytearray((folder / name).read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            (folder / name).write_bytes(content)
    return held[1:]


def two_starts(scratch: Path, words: Words) -> list[bool]:
    """R17: the second is refused by name, and the first goes on."""
    folder = scratch / "twice"
    first = Run(words(folder, *_LONG), scratch / "first.log")
    first.until(lambda: steps_in(folder) >= 2)
    second = Run(words(folder, *_LONG), scratch / "second.log")
    refused = second.wait() == 2 and f"process {first.process.pid} on " in second.text()
    at = steps_in(folder)
    first.until(lambda: steps_in(folder) > at + 1)
    first.kill()
    return [refused]


def signalled(scratch: Path, words: Words, number: int, code: int) -> bool:
    """R18: the checkpoint of the last step is there, and is named."""
    folder = scratch / f"signal{number}"
    run = Run(words(folder, *_LONG), scratch / f"signal{number}.log")
    run.until(lambda: steps_in(folder) >= 2)
    os.kill(run.process.pid, number)
    ended = run.wait(60)
    saved = folder / "checkpoints" / f"step_{steps_in(folder):08d}"
    return ended == code and saved.exists() and str(saved) in run.text()


def modules(scratch: Path) -> list[bool]:
    """R22: DDP around the head changes no bit, unscale_ is exact, a copy is refused; on 2 ranks."""
    out = scratch / "hands"
    out.mkdir()
    run = Run(torchrun(2, "tools/bench/_faults/hands.py", str(out)), scratch / "hands.log")
    if run.wait():
        return [False] * 3
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("rank_*.json")]
    return [all(held) for held in zip(*ranks, strict=True)]


def renumbered(scratch: Path, words: Words) -> bool:
    """R22: a start whose people have other numbers than the data's is refused by name."""
    before, start, pack = scratch / "people", scratch / "start", scratch / "train.rec"
    names = [f"person {number}" for number in range(open_dataset([pack]).num_identities)]
    write_json(names_path(pack), names)
    try:
        first = Run(words(before, "run.steps=3"), scratch / "people.log").wait()
        identities = [sys.executable, "-m", "partialfc", "identities", str(before), str(start)]
        made = Run(identities, scratch / "people.log").wait()
        write_json(names_path(pack), names[::-1])
        begin = f"run.start_from={start}"
        other = Run(words(scratch / "others", "run.steps=3", begin), scratch / "others.log")
        named = f"identity 0 is 'person 0' there, and {names[-1]!r} in data.train"
        return first == made == 0 and other.wait() == 2 and named in other.text()
    finally:
        names_path(pack).unlink()


def one_rank(config: str, where: Sequence[str], common: Sequence[str]) -> Words:
    """Return :data:`Words` of a configuration."""

    def words(folder: Path, *overrides: str) -> list[str]:
        every = [*where, f"run.folder={folder}", *common, *overrides]
        return [sys.executable, "launch/train.py", config, *every]

    return words
