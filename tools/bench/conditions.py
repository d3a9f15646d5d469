"""Under which conditions a figure was measured: for every benchmark's JSON."""

import hashlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from partialfc.cores import usable_cores

ROOT = Path(__file__).resolve().parents[2]


def conditions() -> dict[str, Any]:
    """Return command, date, commit, hardware and versions; no name of a host, user or folder."""
    return {
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": _hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            **_version("triton"),
        },
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _version(name: str) -> dict[str, str]:
    try:
        return {name: metadata.version(name)}
    except metadata.PackageNotFoundError:
        return {}


def _command() -> str:
    """The command line as from the repository's root; of paths elsewhere the last part."""
    words = [_relative(word) if Path(word).is_absolute() else word for word in sys.argv[1:]]
    world = os.environ.get("WORLD_SIZE")
    start = "python" if world is None else f"torchrun --nproc-per-node={world}"
    return " ".join([start, _relative(sys.argv[0]), *words])


def _relative(path: str) -> str:
    try:
        return str(Path(path).resolve().relative_to(ROOT))
    except ValueError:
        return Path(path).name


def _commit() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it; without git, a sum of the sources."""
    found: dict[str, Any] = {}
    for name, command in (
        ("hash", ["rev-parse", "HEAD"]),
        ("changes", ["status", "--porcelain", "--untracked-files=no"]),
    ):
        try:
            done = subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return {"sha256_of_sources": _sum_of_sources()}
        found[name] = done.stdout.strip()
    return {"hash": found["hash"], "dirty": bool(found["changes"])}


def _sum_of_sources() -> str:
    found = hashlib.sha256()
    for folder in ("partialfc", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory,
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        hardware["gpu"] = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            **_asked_of_the_driver(),
        }
    return hardware


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _asked_of_the_driver() -> dict[str, str | None]:
    """Its version, and the clock and power that the card is allowed; ``None`` if it is mute."""
    names = {
        "driver": "driver_version",
        "clock_max_mhz": "clocks.max.sm",
        "power_limit_w": "power.limit",
        "temperature_c": "temperature.gpu",
    }
    query = [f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(names)
    values = done.stdout.splitlines()[0].split(",")
    return {name: value.strip() for name, value in zip(names, values, strict=True)}
