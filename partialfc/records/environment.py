"""On what a run was made: for its summary and its report; no name of a host, a user or a folder."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from partialfc.cores import usable_cores
from partialfc.definitions import plugins


def environment(device: torch.device) -> dict[str, str]:
    """Return versions, hardware, plug-ins and the commit of this package, by name."""
    facts = {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(usable_cores()),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts["gpu"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        facts["cuda"] = str(torch.version.cuda)
    return facts | {f"plug-in {name}": found for name, found in plugins.versions().items()}


def _commit() -> str:
    """The commit of the checkout that this file is in, and whether files differ from it."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return "not a git checkout"
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"commit unknown: {error}", file=sys.stderr)
        return "unknown"
    return done.stdout.strip()


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this rank: the allocator's on a GPU, the resident set of the process else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def package_version() -> str:
    """Version of this package, where it is installed."""
    try:
        return importlib.metadata.version("partialfc")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
