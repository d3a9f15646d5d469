"""The shared library that makes torch believe in a CUDA device: built once, loaded before torch."""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_SOURCE = Path(__file__).with_name("device.cpp")
_CACHE = Path(__file__).parents[2] / ".pytest_cache" / "simulated_gpu"
_VERSIONS = ("2.11", "2.12", "2.13")
"""Of torch, whose C++ interface the source is written for."""

loaded = False
"""Whether ``cuda`` is the simulated device in this process."""


def unable() -> str | None:
    """Return why there can be no simulated device here; ``None`` if there can."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return "torch is not installed"
    if not torch.startswith(_VERSIONS):
        return f"it is written for torch {', '.join(_VERSIONS)}, and this is {torch}"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return f"torch {torch} has CUDA of its own, and the simulation is for a CPU build"
    if sys.platform != "linux":
        return f"it is written for Linux, and this is {sys.platform}"
    if not _built().exists() and shutil.which("g++") is None:
        return "its library is not built, and g++ is not installed"
    return None


def load() -> None:
    """Load the library, and build it first if it is not built for this torch and this source.

    torch asks once, when it is imported, whether there is a GPU; so this comes before.

    Raises:
        RuntimeError: If torch is imported already, or the source does not compile.
    """
    global loaded
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; the simulated GPU must be there before it")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(_build()), ctypes.RTLD_GLOBAL)
    loaded = True


def _build() -> Path:
    built = _built()
    built.parent.mkdir(parents=True, exist_ok=True)
    with (built.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the processes that start side by side
        if not built.exists():
            root, made = _torch(), built.with_suffix(".new")
            command = [
                "g++",
                "-O1",
                "-std=c++20",
                "-fPIC",
                "-shared",
                str(_SOURCE),
                "-o",
                str(made),
            ]
            command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
            command += [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{_SOURCE.name} does not compile:\n{done.stderr[-4000:]}")
            made.replace(built)
    return built


def _built() -> Path:
    key = hashlib.sha256(_SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    return _CACHE / f"{key}.so"


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(os.path.realpath(spec.origin)).parent
