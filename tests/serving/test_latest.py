"""The newest value of something that may be slow or broken, for those who must not wait."""

import threading
from collections.abc import Iterator

import pytest

from freshrank.serving.ranking.latest import Latest


class Source:
    """Gives ``value``; a look waits while the source is held, or raises what it is broken by."""

    def __init__(self) -> None:
        self.value, self.broken, self.looks = 0, None, 0
        self.free, self.looked = threading.Event(), threading.Semaphore(0)
        self.free.set()

    def look(self) -> int:
        self.looks += 1
        self.looked.release()
        self.free.wait()
        if self.broken:
            raise self.broken
        return self.value


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    yield source
    source.free.set()


def test_a_change_is_seen_by_the_next_call(source: Source) -> None:
    """And a failure, which leaves the last value in force."""
    latest = Latest(source.look, "it", seconds=30)
    assert latest.value() == (0, None)
    source.value = 1
    assert latest.value() == (1, None)
    source.broken = OSError("gone")
    assert latest.value() == (1, source.broken)


def test_a_value_that_is_young_enough_is_not_looked_at_again(source: Source) -> None:
    """However often it is asked for."""
    latest = Latest(source.look, "it", seconds=0, every=3600)
    assert [latest.value() for _ in range(3)] == [(0, None)] * 3
    assert source.looks == 1


def test_without_patience_a_look_that_hangs_is_never_waited_for(source: Source) -> None:
    """The last value is no failure meanwhile: it is only as old as it may be."""
    latest = Latest(source.look, "it", seconds=0)
    assert latest.value() == (0, None)
    source.free.clear()
    assert latest.value() == (0, None)
    source.looked.acquire(timeout=30)
    assert latest.value() == (0, None)


def test_what_never_was_there_raises_and_is_looked_at_by_every_call(source: Source) -> None:
    """A failure is not kept for as long as a value is."""
    source.broken = OSError("not there")
    latest = Latest(source.look, "it", seconds=0, every=3600)
    for _ in range(2):
        with pytest.raises(OSError, match="not there"):
            latest.value()
    source.broken, source.value = None, 7
    assert latest.value() == (7, None)
