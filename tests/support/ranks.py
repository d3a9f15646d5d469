"""Real gloo processes for tests, started once per world size and used by many tests."""

import atexit
import datetime
import os
import queue
import traceback
from typing import Any

import torch
import torch.distributed as dist

from tests.support.processes import WARM

_gangs: dict[int, "_Gang"] = {}


def run_on_ranks(world_size: int, function, *arguments, timeout: float = 300) -> list[Any]:
    """Run ``function(rank, world_size, *arguments)`` in as many processes; results by rank.

    The function must be importable. An exception in a rank is raised here with its traceback.
    """
    gang = _gangs.pop(world_size, None) or _Gang(world_size)
    try:
        results = gang.run(function, arguments, timeout)
    except BaseException:
        gang.end()
        raise
    _gangs[world_size] = gang
    return results


class _Gang:
    def __init__(self, world_size: int) -> None:
        context = WARM
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.results: Any = context.Queue()
        self.tasks = [context.Queue() for _ in range(world_size)]
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, world_size, self.store.port, tasks, self.results),
                daemon=True,
            )
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, arguments, timeout: float) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((function, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(self.processes):
            try:
                rank, error, result = self.results.get(timeout=timeout)
            except queue.Empty:
                codes = [process.exitcode for process in self.processes]
                raise AssertionError(f"no answer in {timeout} s; exit codes {codes}") from None
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = result
        return [results[rank] for rank in range(len(self.processes))]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, port: int, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whichever test
    dist.init_process_group(
        "gloo",
        store=dist.TCPStore("127.0.0.1", port, is_master=False),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
    )
    while True:
        function, arguments = tasks.get()
        try:
            result, error = function(rank, world_size, *arguments), ""
        except BaseException:
            result, error = None, traceback.format_exc()
        results.put((rank, error, result))


@atexit.register
def _end_all() -> None:
    for gang in _gangs.values():
        gang.end()
