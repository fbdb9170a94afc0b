"""What may pass is tried again, what may not is an error at once."""

from collections.abc import Callable

import pytest

from freshrank.retry import LONGEST_PAUSE, retrying


class Busy(Exception):
    """As an HTTP client raises it."""

    def __init__(self, **headers: str) -> None:
        super().__init__("busy")
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def is_busy(error: BaseException) -> bool:
    return isinstance(error, Busy)


def failing(*errors: Exception) -> Callable[[str], str]:
    """A function that raises each of ``errors`` and then returns its argument."""
    left = list(errors)

    def call(value: str) -> str:
        if left:
            raise left.pop(0)
        return value

    return call


def test_attempts_are_made_until_one_succeeds() -> None:
    """What is heard of the failures on the way is each of them and the pause after it."""
    told: list[tuple[BaseException, float]] = []
    first, second = Busy(), Busy()
    calling = retrying(is_busy, attempts=3, before_pause=lambda error, pause: told.append((error, pause)))
    assert calling(failing(first, second), "answer") == "answer"
    assert [error for error, _ in told] == [first, second]
    assert all(0 <= pause <= LONGEST_PAUSE for _, pause in told)


def test_the_last_failure_is_raised_when_no_attempt_is_left() -> None:
    """As it was, not wrapped."""
    last = Busy()
    with pytest.raises(Busy) as raised:
        retrying(is_busy, attempts=2)(failing(Busy(), last), "")
    assert raised.value is last


def test_no_pause_goes_beyond_the_time_that_is_given() -> None:
    """A server that asks for more of it is not waited for."""
    asking = Busy(Retry_After="10")
    with pytest.raises(Busy) as raised:
        retrying(is_busy, seconds=1)(failing(asking, Busy()), "")
    assert raised.value is asking


def test_what_cannot_pass_is_raised_at_once() -> None:
    """However many attempts there are."""
    with pytest.raises(KeyError):
        retrying(is_busy, attempts=5)(failing(KeyError("no such thing"), Busy()), "")


@pytest.mark.parametrize(("asked", "least"), [("1", 1.0), ("soon", 0.0)])
def test_a_server_is_given_the_time_that_it_asks_for(asked: str, least: float) -> None:
    """In whole seconds; what cannot be read as such asks for nothing."""
    pauses: list[float] = []
    calling = retrying(is_busy, attempts=2, before_pause=lambda _, pause: pauses.append(pause))
    calling(failing(Busy(Retry_After=asked)), "")
    assert pauses[0] >= least
