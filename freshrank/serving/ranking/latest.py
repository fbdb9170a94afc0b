"""The newest value of something on a disk that may be slow, broken or gone, for callers that must not wait for it.

A file system that hangs does not give a caller back, so a thread of its own looks. Handing the question over takes some
ten microseconds, and what has changed is seen by the next call all the same.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Value = TypeVar("Value")

LOOK_SECONDS = 0.25
"""A look that takes longer is not waited for, nor are the next ones until one was in time again."""
FIRST_SECONDS = 30.0
"""The same while there is no value yet: without one nobody can be answered."""

log = logging.getLogger(__name__)


class LookedTooLong(TimeoutError):
    """What is looked at does not answer."""


@dataclass(frozen=True)
class _Answer(Generic[Value]):
    value: Value | None
    error: Exception | None
    seconds: float


class Latest(Generic[Value]):
    """What ``look`` returned last; not for use by several threads, but ``look`` runs in one of its own.

    Args:
        look: returns the value now, or raises what kept it from doing so.
        what: is looked at, in words for the log.
        seconds: how long a look is waited for; 0 never waits once there is a value.
        every: how old a value may be before it is looked again.
    """

    def __init__(self, look: Callable[[], Value], what: str, seconds: float = LOOK_SECONDS, every: float = 0.0) -> None:
        self._look = look
        self._what = what
        self._seconds = seconds
        self._every = every
        self._value: Value | None = None
        self._error: Exception | None = None
        self._next_look = float("-inf")
        self._in_time = True
        self._under_way = False
        self._failing = False
        self._asked: SimpleQueue[None] = SimpleQueue()
        self._answers: SimpleQueue[_Answer[Value]] = SimpleQueue()

    def value(self) -> tuple[Value, Exception | None]:
        """The value, and what is wrong where it could not be looked at and is the last one that could.

        Raises:
            Exception: whatever ``look`` raised, LookedTooLong where it did not end, while there is no value yet.
        """
        error = self._refresh()
        if self._value is None:
            raise error or LookedTooLong(f"{self._what} cannot be read")
        self._note(error)
        return self._value, error

    def _refresh(self) -> Exception | None:
        if not self._under_way:
            if self._value is not None and time.monotonic() < self._next_look:
                return self._error
            self._ask()
        patience = FIRST_SECONDS if self._value is None else self._seconds if self._in_time else 0.0
        try:
            answer = self._answers.get(timeout=patience) if patience else self._answers.get_nowait()
        except Empty:
            self._in_time = False
            return LookedTooLong(f"no answer within {self._seconds:g} seconds") if self._seconds else self._error
        self._under_way = False
        self._in_time = answer.seconds <= self._seconds
        self._next_look = time.monotonic() + self._every
        self._error = answer.error
        if answer.error is None:
            self._value = answer.value
        return answer.error

    def _ask(self) -> None:
        if not hasattr(self, "_thread"):
            self._thread = threading.Thread(target=self._look_on, name="latest", daemon=True)
            self._thread.start()
        self._under_way = True
        self._asked.put(None)

    def _look_on(self) -> None:
        while True:
            self._asked.get()
            started = time.monotonic()
            value, error = None, None
            try:
                value = self._look()
            except Exception as problem:
                error = problem
            self._answers.put(_Answer(value, error, time.monotonic() - started))

    def _note(self, error: Exception | None) -> None:
        """Log when it fails and when it recovers, not at every request in between."""
        if error and not self._failing:
            log.warning(
                "%s cannot be read, what it said last stands: %s: %s",
                self._what,
                type(error).__name__,
                str(error).partition("\n")[0],
            )
        elif error is None and self._failing:
            log.warning("%s can be read again", self._what)
        self._failing = error is not None
