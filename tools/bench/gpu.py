"""All that only a GPU can show, in less than eight minutes: tools/bench/gpu.sh is this command.

    bash tools/bench/gpu.sh OUT                         # all stages, in the order of their worth
    bash tools/bench/gpu.sh OUT --part tests,head       # some of them
    bash tools/bench/gpu.sh OUT --small --device cpu    # every command at a hundredth, on a CPU
    bash tools/bench/gpu.sh OUT --estimate              # what it should take; measures nothing

Needs torch, numpy and pytest; no settings, no git. Each stage has a limit (_gpu/stages.py): near
its end the stage begins nothing more, and at it the stage is stopped, so a late one starves no
other. Records are written row by row. OUT/gpu.json and the last lines say what was and was not
measured, also where SIGINT, SIGTERM or SIGHUP cut it off.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partialfc.cores import usable_cores
from tools.bench._gpu.stages import PATIENCE, TOTAL, Stage, stages

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "numpy", "pytest")
WANTED = {
    "triton": "kernels",
    "xdist": "tests side by side",
    "pytest_timeout": "a limit of each test",
    "pydantic": "tests with settings",
    "safetensors": "tests of checkpoints",
    "liger_kernel": "Liger's fused linear cross-entropy",
    "cut_cross_entropy": "Apple's cut cross-entropy",
    "nvidia.dali": "its loader",
}
"""What is measured or tested with a package that may be missing."""

_SOONER, _STOPPING = 12.0, 6.0
"""Seconds before its limit in which a stage begins no row, and in which it is asked to stop."""

_CUT_OFF = "cut off"

Found = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 0 if all ended well, 1 if one did not, 2 if nothing could be measured."""
    begun = time.monotonic()
    options = _parser().parse_args(arguments)
    out = options.out.resolve()
    chosen = stages(options.device, str(out), small=options.small, kernels=_has("triton"))
    if options.part:
        names = options.part.split(",")
        if unknown := set(names) - {stage.name for stage in chosen}:
            every = ", ".join(stage.name for stage in chosen)
            sys.stderr.write(f"gpu.sh: --part {', '.join(unknown)}: must be of {every}\n")
            return 2
        chosen = [stage for stage in chosen if stage.name in names]
    if options.estimate:
        return _estimate(chosen)
    if missing := [name for name in NEEDED if not _has(name)]:
        sys.stderr.write(f"gpu.sh: nothing can be measured without {', '.join(missing)}\n")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    _say_packages()
    limits = [
        f"{one.name} {f'{one.seconds:.0f} s' if one.seconds else 'the rest'}" for one in chosen
    ]
    print(f"in the order of their worth, at most: {', '.join(limits)}", flush=True)
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.default_int_handler)
    report: list[Found] = []
    for stage in chosen:
        report.append(run(stage, out, begun + TOTAL * (PATIENCE if options.small else 1)))
        _write(out / "gpu.json", {"stages": report})  # after each
        if report[-1]["state"] == _CUT_OFF:
            break
        if stage.name == "imports" and report[-1]["state"] != "ended well":
            sys.stderr.write("gpu.sh: what every stage imports cannot be imported; see above\n")
            return 2
    _summary(report, time.monotonic() - begun)
    return int(any(one["state"] != "ended well" for one in report))


def run(stage: Stage, out: Path, deadline: float) -> Found:
    """Run a stage's commands within its limit; return how it ended and what it did not measure."""
    began = time.monotonic()
    until = min(began + stage.seconds, deadline) if stage.seconds else deadline
    print(f"\n== {stage.name}: {stage.shows}; {until - began:.0f} s", flush=True)
    state, codes, missing = "ended well", [], []
    files = _records(stage, out)
    for path in files:
        path.unlink(missing_ok=True)  # or a figure of another day would stand for this one
    for words in stage.commands:
        left = until - time.monotonic()
        if left < _SOONER:
            missing.append(f"{_tool(words)}: no time was left")
            state = "out of time"
            continue
        try:
            code = _run(_filled(words, stage, out, left), left)
        except KeyboardInterrupt:
            state = _CUT_OFF
            break
        codes.append(code)
        if code is None:
            state = "out of time"
        elif code and state == "ended well":
            state = "not whole"
    for path in files:
        missing += _not_measured(path)
    seconds = round(time.monotonic() - began, 1)
    return {"stage": stage.name, "shows": stage.shows, "limit_seconds": stage.seconds or None,
            "seconds": seconds, "state": state, "exit_codes": codes,
            "records": [path.name for path in files if path.exists()],
            "not_measured": missing, **_tests(out / f"{stage.name}.xml")}  # fmt: skip


def _filled(words: Sequence[str], stage: Stage, out: Path, left: float) -> list[str]:
    filled = [word.replace("{left}", f"{left - _SOONER:.0f}") for word in words]
    if "pytest" in filled:
        beside = ["-n", "8"] if _has("xdist") and usable_cores() >= 8 else []
        filled += [*beside, "-p", "no:cacheprovider", f"--junitxml={out}/{stage.name}.xml"]
    return filled


def _run(words: list[str], seconds: float) -> int | None:
    """Return the exit code; ``None`` if it had to be stopped. Its processes end with it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, start_new_session=True)
    limit = time.monotonic() + seconds
    stopped = False
    try:
        for sign, until in ((signal.SIGINT, limit - _STOPPING), (signal.SIGKILL, limit)):
            try:
                process.wait(max(0.0, until - time.monotonic()))
                break
            except subprocess.TimeoutExpired:
                stopped = True
                os.killpg(process.pid, sign)
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what it left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None if stopped else process.returncode


def _records(stage: Stage, out: Path) -> list[Path]:
    named = [words[words.index("--json") + 1] for words in stage.commands if "--json" in words]
    return [*map(Path, named), *([out / f"{stage.name}.xml"] if stage.name == "tests" else [])]


def _not_measured(path: Path) -> list[str]:
    if path.suffix != ".json":
        return []
    if not path.exists():
        return [f"{path.name}: nothing of it"]
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("not_measured", [])
    except ValueError:
        return [f"{path.name}: damaged, as it was being written"]
    return [f"{path.name}: {one}" for one in found]


def _tests(path: Path) -> Found:
    """Return how many tests passed, and which failed or were skipped, from pytest's report."""
    if not path.exists():
        return {}
    counts: dict[str, int] = {"passed": 0}
    said: dict[str, list[str]] = {"failed": [], "skipped": []}
    try:
        cases = [*ET.parse(path).getroot().iter("testcase")]
    except ET.ParseError:
        return {"tests": {}, "failed": [f"{path.name}: damaged, as it was being written"]}
    for case in cases:
        kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        kind = next((kinds[child.tag] for child in case if child.tag in kinds), "passed")
        counts[kind] = counts.get(kind, 0) + 1
        if kind != "passed":
            why = next((child.get("message") or "" for child in case), "").splitlines()[:1]
            said[kind].append(f"{case.get('classname')}.{case.get('name')}: {''.join(why)[:200]}")
    return {"tests": counts, **said}


def _say_packages() -> None:
    """What is there, known without an import."""
    for name in ("torch", "triton", "numpy", "pytest"):
        print(f"{name} {_version(name)}")
    for name, use in WANTED.items():
        if not _has(name):
            print(f"{name} is missing: without {use}")
    sys.stdout.flush()


def _has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even what it is in
        return False


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is missing"


def _tool(words: Sequence[str]) -> str:
    return Path(words[words.index("--json") + 1]).name if "--json" in words else words[-1]


def _estimate(chosen: Sequence[Stage]) -> int:
    """Say the limit of every stage, and what its benchmarks should take on an H200."""
    for stage in chosen:
        limit = f"{stage.seconds:.0f} s at most" if stage.seconds else "what is left"
        print(f"{stage.name}: {stage.shows}; {limit}", flush=True)
        for words in stage.commands:
            if "--json" in words:
                _run([*(word.replace("{left}", "1000") for word in words), "--dry-run"], 300)
    whole = sum(stage.seconds for stage in chosen)
    print(f"{whole:.0f} s at most, then what is left of {TOTAL:.0f} s")
    return 0


def _summary(report: Sequence[Found], seconds: float) -> None:
    print(f"\n== {seconds:.0f} s in all")
    for one in report:
        tests = ", ".join(f"{count} {name}" for name, count in one.get("tests", {}).items())
        print(f"{one['stage']}: {one['state']}, {one['seconds']:.0f} s{tests and ': ' + tests}")
        for record in one["records"]:
            print(f"  measured: {record}")
        for line in (*one["not_measured"], *(f"failed: {test}" for test in one.get("failed", []))):
            print(f"  not measured: {line}" if not line.startswith("failed: ") else f"  {line}")


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for records and the report")
    parser.add_argument("--part", metavar="NAMES", help="of the stages, with commas (all)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a hundredth of every size")
    parser.add_argument("--estimate", action="store_true", help="say how long it should take")
    return parser


if __name__ == "__main__":
    sys.exit(main())
