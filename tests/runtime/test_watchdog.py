"""R16: whatever cannot be written on the way out, a hang finds its end."""

import pytest

from tests.support.processes import python

HANGS = """
import os, sys, time
from pathlib import Path
from partialfc.distributed.ranks import Ranks
from partialfc.records.ledger import Ledger
from partialfc.runtime import watchdog

folder, case = Path(sys.argv[1]), sys.argv[2]
watchdog._SECONDS_TO_LEAVE = 5.0
ledger = Ledger(folder / "ledger.jsonl")
reader, writer = os.pipe()
if case == "closed":
    os.close(reader)
if case == "full":
    os.set_blocking(writer, False)
    try:
        while os.write(writer, bytes(65536)):
            pass
    except BlockingIOError:
        os.set_blocking(writer, True)
if case == "gone":
    os.close(2)
else:
    os.dup2(writer, 2)
ledger.at(3)
ledger.at(4)
ledger.switch("train")
if case == "full":
    ledger._lines._writing.acquire()  # the main thread waits for a disk that is gone
dog = watchdog.Watchdog(Ranks(), folder, 0.2, None)
dog.follow(ledger)
if case == "broken":
    dog._look = None  # whatever goes wrong in its thread
time.sleep(600)
"""


@pytest.mark.parametrize(("case", "code"), [("closed", 6), ("full", 6), ("gone", 6), ("broken", 7)])
def test_the_watchdog_ends_a_hang_whatever_it_cannot_write(tmp_path, case, code):
    (tmp_path / "ledger.jsonl").symlink_to("/dev/full")
    (tmp_path / "stacks").write_text("no folder")
    assert python("-c", HANGS, tmp_path, case).returncode == code
