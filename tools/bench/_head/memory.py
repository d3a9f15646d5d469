"""What a process holds and what a head needs beyond it: for tools/bench/_head/measure.py."""

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Memory:
    """Bytes in use by this rank: the allocator's on a GPU, the resident set of the process else."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_exact = device.type == "cuda"
        """Whether every byte is known at once, so that heads of one process can be told apart."""

    def now(self) -> int:
        """Return the bytes at this moment."""
        if self.is_exact:
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS")

    def reset(self) -> bool:
        """Forget the peak so far; false where the system does not allow it."""
        if self.is_exact:
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            return False
        return True

    def peak(self) -> int:
        """Return the most bytes since :meth:`reset`, or since the start of the process."""
        if self.is_exact:
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")


def stored_tensors(head: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a head keeps between steps: centers (and their row scales), optimizer states."""
    centers = [head.centers, *head.buffers()]
    known = {tensor.data_ptr() for tensor in centers}
    states = [
        value
        for state in head.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.data_ptr() not in known
    ]
    return [tensor.detach() for tensor in centers], states


def bytes_of(tensors: list[Tensor]) -> int:
    """Return the bytes of the elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status; the process's peak where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
