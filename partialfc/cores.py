"""How many CPUs this process may use: often fewer than the machine has.

A scheduler, ``taskset`` and a container each allow a part of a machine, as a set of CPUs (affinity)
or as seconds of CPU time in a second (a quota of a control group).
"""

import os
import re
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """Return the CPUs that this process may use, >= 1."""
    return max(1, min(len(affinity()), quota() or len(affinity())))


def affinity() -> frozenset[int]:
    """Return the CPUs that this process may run on; all of the machine's where nobody can say."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def quota(proc: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the whole CPUs of the smallest quota of this process, >= 1; 0 if it has none.

    Rounded down: threads wait for each other, and one that its quota stops holds up the others.

    Args:
        proc: The process's control groups, a line each: number, controllers and path.
        mounted: Where their folders are: of version 2, and of version 1 one for each controller.
    """
    found: list[float] = []
    with suppress(OSError, ValueError):
        for line in proc.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            names = {"": [""], "cpu": ["cpu"]}.get(controllers, [controllers, "cpu"])
            for name in names:
                # A container sees its own group at the root, under the path of its host.
                group = mounted / name / path.lstrip("/")
                for folder in (group, *group.parents):
                    found += _quota_of(folder)
                    if folder == mounted / name:
                        break
    return max(1, int(min(found))) if found else 0


def _quota_of(folder: Path) -> list[float]:
    """The CPUs that one control group allows, if it limits them."""
    for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # versions 2 and 1
        with suppress(OSError, ValueError):
            text = " ".join((folder / file).read_text(encoding="utf-8") for file in files)
            if limit := re.fullmatch(r"\s*(\d+)\s+([1-9]\d*)\s*", text):  # not "max", not -1
                return [int(limit[1]) / int(limit[2])]
    return []
