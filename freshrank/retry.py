"""Trying again what may pass by itself: the one place where freshrank counts attempts.

The libraries below make one attempt each where they let themselves be told so: attempts of two layers multiply.
"""

from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_before_delay
from tenacity.wait import wait_random_exponential

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 20.0


def retrying(
    may_pass: Callable[[BaseException], bool],
    *,
    attempts: int | None = None,
    seconds: float | None = None,
    before_pause: Callable[[BaseException, float], None] | None = None,
) -> Retrying:
    """A callable ``(function, *arguments)`` that calls ``function`` until it succeeds, and raises what it raised last.

    Args:
        may_pass: whether a failure may pass by itself; any other one is raised at once.
        attempts: how many there are at most; without it ``seconds`` says how long they go on.
        before_pause: hears of every failure that is not the last, and of how many seconds the next attempt is away.
    """

    def tell(state: RetryCallState) -> None:
        if before_pause and state.next_action:
            before_pause(_failure(state), state.next_action.sleep)

    return Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_attempt(attempts) if attempts else stop_before_delay(seconds or 0.0),
        wait=_pause,
        before_sleep=tell,
        reraise=True,
    )


def _failure(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    assert error is not None
    return error


def _pause(state: RetryCallState) -> float:
    """Seconds before the next attempt: longer from one to the next and never all callers at once, nor sooner than an
    HTTP answer asks for."""
    headers = getattr(_failure(state), "headers", None) or {}
    asked = headers.get("Retry-After", "")
    backoff = wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)(state)
    return min(max(backoff, float(asked) if asked.isdigit() else 0.0), LONGEST_PAUSE)
