"""What a paper found, as inequalities, and whether they hold here: decided by intervals, never by hand.

A quantity is measured once per seed; its 95% t interval over seeds lies on the expected side of the bound (holds), on
the other side (does not hold), or on both (inconclusive). A claim of several inequalities holds when all do, and does
not when any fails.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95


class Outcome(StrEnum):
    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "inconclusive"


class SeedMean(BaseModel):
    """Mean over seeds and its interval; all None without a single value, no interval with one seed."""

    model_config = ConfigDict(frozen=True)

    mean: float | None
    low: float | None
    high: float | None
    seeds: int

    @classmethod
    def over(cls, values: Sequence[float | None]) -> "SeedMean":
        """From one value per seed. The mean is None as soon as one seed has no value."""
        if not values or any(value is None for value in values):
            return cls(mean=None, low=None, high=None, seeds=len(values))
        known = np.asarray(values, np.float64)
        mean = float(known.mean())
        if len(known) == 1:
            return cls(mean=mean, low=None, high=None, seeds=1)
        half = _t(len(known)) * float(known.std(ddof=1)) / len(known) ** 0.5
        return cls(mean=mean, low=mean - half, high=mean + half, seeds=len(known))


def _t(seeds: int) -> float:
    from scipy.stats import t  # 1 s to import

    return float(t.ppf((1 + CONFIDENCE) / 2, seeds - 1))


class Expectation(BaseModel):
    """The quantity called ``name`` lies on ``side`` of ``bound``."""

    model_config = ConfigDict(frozen=True)

    name: str
    estimate: SeedMean
    side: Literal["below", "above"]
    bound: float = 0.0
    form: Literal["number", "change", "percent", "points"] = "number"
    """How it is written: 0.62, +0.62, 62.0% (a share), +62.0 points (a difference of shares, in percentage points)."""

    @property
    def outcome(self) -> Outcome:
        low, high = self.estimate.low, self.estimate.high
        if low is None or high is None:
            return Outcome.OPEN
        if self.side == "above":
            return _above(low, high, self.bound)
        return _above(-high, -low, -self.bound)

    def __str__(self) -> str:
        mean, low, high = self.estimate.mean, self.estimate.low, self.estimate.high
        if mean is None:
            return f"{self.name} has no value"
        interval = (
            "one seed, no interval" if low is None or high is None else f"{self._said(low)} to {self._said(high)}"
        )
        return f"{self.name} {self._said(mean)}{' points' if self.form == 'points' else ''} ({interval})"

    def _said(self, value: float) -> str:
        forms = {
            "number": f"{value:.3g}",
            "change": f"{value:+.2g}",
            "percent": f"{value:.1%}",
            "points": f"{100 * value:+.1f}",
        }
        return forms[self.form]


def _above(low: float, high: float, bound: float) -> Outcome:
    if low > bound:
        return Outcome.HOLDS
    return Outcome.FAILS if high < bound else Outcome.OPEN


class Claim(BaseModel):
    """One sentence of the paper, and the inequalities it comes down to."""

    model_config = ConfigDict(frozen=True)

    paper: str
    expectations: tuple[Expectation, ...]

    @property
    def outcome(self) -> Outcome:
        outcomes = {expectation.outcome for expectation in self.expectations}
        if Outcome.FAILS in outcomes:
            return Outcome.FAILS
        return Outcome.HOLDS if outcomes == {Outcome.HOLDS} else Outcome.OPEN

    def __str__(self) -> str:
        measured = "; ".join(str(expectation) for expectation in self.expectations) or "nothing could be measured"
        return f"Paper: {self.paper} Here: {measured}: **{self.outcome}**."
