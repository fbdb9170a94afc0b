"""A fork waits for what it must not cut in two: a call inside gRPC, the reading of a file under a lock.

A child gets a copy of the memory and none of the other threads. What one of them held, or was in the middle of, stays
so for ever: a lock that nobody releases, a library that crashes at its next call. Web servers fork with threads at work
(gunicorn with ``--preload``, Celery, ``multiprocessing``), so such work goes through a gate, and a fork finds nobody
in it.
"""

import os
from contextlib import AbstractContextManager
from threading import Condition
from types import TracebackType

_PATIENCE_SECONDS = 30.0
"""Nobody waits longer than this to fork: a signal handler may do so in a thread that is itself inside."""


class ForkGate(AbstractContextManager[None]):
    """What runs between ``enter`` and ``leave``, or in a ``with``, ends before a fork or begins after it.

    Not to be entered twice by one thread: a fork that waits in between would wait for both.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._inside = 0
        self._forks = 0

    def enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self.forking)
            self._inside += 1

    def leave(self) -> None:
        """From any thread, not only the one that entered."""
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def __enter__(self) -> None:
        self.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    @property
    def forking(self) -> bool:
        """Whether a fork waits or is under way."""
        return bool(self._forks)

    def before_fork(self) -> None:
        with self._changed:
            self._forks += 1
            self._changed.wait_for(lambda: not self._inside, timeout=_PATIENCE_SECONDS)

    def after_fork_in_parent(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()

    # The child is alone: nobody is inside, and another thread may have held the inherited condition.
    after_fork_in_child = __init__


FORK_GATE = ForkGate()
os.register_at_fork(
    before=FORK_GATE.before_fork,
    after_in_parent=FORK_GATE.after_fork_in_parent,
    after_in_child=FORK_GATE.after_fork_in_child,
)
