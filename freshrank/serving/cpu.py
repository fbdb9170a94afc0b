"""How many cores this process may use: a container often gets fewer than the node has."""

import math
import os
import threading
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(limit: Path = CPU_MAX) -> int:
    """Cores it may run on, or the container's quota where that is less, rounded up; ``limit`` is cgroup v2's file."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = limit.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))


NICE = 10
"""A tenth of the share of a thread at 0, where both want to run."""


def lower_priority() -> None:
    """Lower the priority of the calling thread and of those it starts, for good."""
    own = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, own, max(NICE, os.getpriority(os.PRIO_PROCESS, own)))
