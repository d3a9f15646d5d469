"""The records of a run of a month, and what a page, a report and a resume read of them.

python -m tests.support.month FOLDER page|report|resume|start    # what was read, as JSON
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from partialfc.records import ledger, metrics
from partialfc.records.lines import Lines
from partialfc.records.parts import PART_BYTES, parts_of, write_some
from partialfc.status.run import RunFolder
from tools.bench._head.memory import Memory

PARTS, STARTS, BYTES = 450, 10_000, 1450
"""A record is of so many bytes, so there are 2.6 million of them: one a second."""
EACH = PART_BYTES // BYTES
"""Records of a part."""
LOOKS = ("page", "report", "resume", "start")


def record(step):
    names = [one.name for one in metrics.TABLE if "ification_" not in one.name]
    line = {"step": step, "time": step * 1.0, **dict.fromkeys(names, 1 / (step + 3))}
    return json.dumps(line).ljust(BYTES - 1) + "\n"


def write_month(folder, parts=PARTS, starts=STARTS):
    """Write a run's folder: its parts are holes of their size, and what is beside each is real."""
    path = folder / "metrics.jsonl"
    (folder / "metrics.parts").mkdir()
    for number in range(parts):
        part = folder / "metrics.parts" / f"{number + 1:06d}.jsonl"
        first = number * EACH
        path.write_text("".join(record(step) for step in range(first, first + EACH, 43)))
        write_some(part, path, metrics.MEASURES)
        beside = part.with_name(f"{part.stem}.some.jsonl")
        _, _, some = beside.read_text().partition("\n")
        beside.write_text(json.dumps({"bytes": PART_BYTES}) + "\n" + some)
        with part.open("wb") as file:
            os.truncate(file.fileno(), PART_BYTES)
    last = parts * EACH
    path.write_text("".join(record(step) for step in range(last, last + EACH // 2)))
    write_starts(folder / "ledger.jsonl", starts)


def write_starts(path, starts):
    """Write the ledger of so many starts, each of 100 s and killed."""
    lines = Lines(path, ledger.EVENTS)
    for start in range(starts):
        one = {"step": start, "began": start * 100.0, "ranks": 64}
        for number in range(5):
            event = {"event": "spent" if number else "start", "seconds": {"train": number * 10.0}}
            lines.append(json.dumps({**one, "time": start * 100.0 + number * 10, **event}))
    lines.close()


def look(folder, what):
    """Return what a look found, opened and read, its CPU seconds and memory."""
    opened, memory = set(), Memory(torch.device("cpu"))
    sys.addaudithook(lambda event, words: opened.add(str(words[0])) if event == "open" else None)
    newest = len(parts_of(folder / "metrics.jsonl")) * EACH + EACH // 4
    looks = {
        "page": lambda: RunFolder(folder).look().metrics,
        "report": lambda: metrics.read_metrics(folder / "metrics.jsonl"),
        "resume": lambda: metrics.JsonLines(folder / "metrics.jsonl", newest).close() or [],
        "start": lambda: [ledger.goodput(ledger.read_ledger(folder / "ledger.jsonl"))],
    }
    assert memory.reset()  # or the peak would be that of the imports
    before, began = memory.now(), time.process_time()
    found = looks[what]()
    seconds = time.process_time() - began
    ours = [path for path in opened if path.startswith(str(folder)) and Path(path).is_file()]
    return {
        "found": len(found),
        "last": found[-1] if found else None,
        "seconds": seconds,
        "read": sum(Path(path).stat().st_size for path in ours),
        "opened": ours,
        "memory": memory.peak() - before,
    }


if __name__ == "__main__":
    print(json.dumps(look(Path(sys.argv[1]), sys.argv[2])))
