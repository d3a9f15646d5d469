"""What a process does with a Ctrl-C that comes at a bad moment."""

import subprocess
import sys

from tests.test_launch import ROOT

PROGRAM = """
import os, signal
from partialfc.config import Config
from partialfc.runtime import refuse_interrupted, running

class Callback:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))
        print("never")

with running(Config.model_validate({"data": {"train": "x.rec"}, "precision": {"compute": "fp32"}})):
    Callback()
    print("it was lost")
    refuse_interrupted()
    print("never")
"""


def test_an_interrupt_that_is_lost_in_a_destructor_is_found_at_the_next_step(tmp_path):
    """Python prints and drops what a destructor or a callback of DALI raises: the run went on."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "it was lost\n"
    assert "Exception ignored" in done.stderr
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
