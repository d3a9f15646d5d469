"""Programs that a row of tools/bench/growth.py runs, each in a process of its own."""

import importlib
import subprocess

# By name, for mypy not to follow it into the tests, which are not typed.
_python = importlib.import_module("tests.support.processes").python


def ran(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` to its end.

    Raises:
        RuntimeError: If its exit status is another; the message has what it said last.
    """
    done: subprocess.CompletedProcess[str] = _python(*words, timeout=900)
    if done.returncode != status:
        said = done.stderr.strip()[-500:]
        raise RuntimeError(f"{words[:2]} ended with {done.returncode}, must be {status}: {said}")
    return done
