"""What a head's search of the neighbours of all centers takes, which only some steps begin with."""

import time
from typing import Any

import torch

from tools.bench._head.ceilings import over_ranks, timed


def search_seconds(head: Any, device: torch.device) -> dict[str, float]:
    """Search: seconds, and those of the process on its cores; of the slowest rank. Collective."""
    started = time.process_time()
    seconds, _ = timed(device, head.find_neighbours)
    return {
        "search_seconds": over_ranks(seconds, "MAX", device),
        "search_cpu_seconds": over_ranks(time.process_time() - started, "MAX", device),
    }
