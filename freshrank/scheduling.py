"""Work that should not take the processor from whoever answers requests meanwhile (Linux).

Nice, not SCHED_IDLE: an unprivileged thread cannot come back from either, but a busy machine would starve the idle one.
"""

import os
import threading

NICE = 10
"""A tenth of the share of a thread at 0, where both want to run."""


def give_way() -> None:
    """Lower the priority of the calling thread and of those it starts, for good."""
    own = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, own, max(NICE, os.getpriority(os.PRIO_PROCESS, own)))
