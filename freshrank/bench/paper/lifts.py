"""From list sums of every row and seed to lifts, gaps closed, their intervals and their significance.

Shapes: R rows of the table, S seeds, U lists, C columns (a measure of one action each), B draws.

Two things are random: which seed a model was trained with, and which users happened to come. Every draw therefore
resamples seeds and lists with replacement. The lists are the same for every row and every seed of a draw, because
they are the same in the data: drawing them anew within each seed would average the chance of who came over the seeds
and make the intervals too narrow. Rows are paired by seed as well (same initial weights, same batches).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from freshrank.errors import DataError

Array = NDArray[np.floating[Any]]
DRAWS = 2_000
CONFIDENCE = 0.95
_CHUNK = 250


class Estimate(BaseModel):
    """A value, its 95% interval, its p-value and the p-value corrected for the number of rows."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None

    @property
    def significant(self) -> bool:
        return self.adjusted is not None and self.adjusted < 1 - CONFIDENCE


@dataclass(frozen=True)
class Rates:
    """Every measure averaged over seeds: as observed [R, C], and in bootstrap draws [B, R, C]."""

    names: list[str]
    seeds: int
    observed: Array
    drawn: Array

    def row(self, name: str) -> int:
        return self.names.index(name)

    def lift(self, name: str, base: str, column: int) -> Estimate:
        """Relative difference in % with its interval; the p-value is that of the absolute difference."""
        value, other = self.observed[self.row(name), column], self.observed[self.row(base), column]
        drawn, others = self.drawn[:, self.row(name), column], self.drawn[:, self.row(base), column]
        with np.errstate(invalid="ignore", divide="ignore"):
            low, high = _interval(100 * (drawn / others - 1))
            p = p_value(float(value - other), drawn - others, self.seeds)
            return Estimate(value=float(100 * (value / other - 1)), low=low, high=high, p=p)

    def gap_closed(self, name: str, base: str, oracle: str, column: int, better: int = 1) -> Estimate | None:
        """(row - base) / (oracle - base); None where the oracle is not better than the base in 97.5% of the draws.

        ``better`` is -1 for a measure that is good when low. Draws without a gap are left out of the interval.
        """
        value, other, best = (self.observed[self.row(one), column] for one in (name, base, oracle))
        drawn, others, bests = (self.drawn[:, self.row(one), column] for one in (name, base, oracle))
        with_gap = better * (bests - others) > 0
        if better * (best - other) <= 0 or with_gap.mean() < (1 + CONFIDENCE) / 2:
            return None
        low, high = _interval((drawn - others)[with_gap] / (bests - others)[with_gap])
        return Estimate(value=float((value - other) / (best - other)), low=low, high=high)


def rates(names: Sequence[str], sums: Array, counts: Array, draws: int = DRAWS, seed: int = 0) -> Rates:
    """Averages over seeds of sums [R, S, U, C] over counts [U, C], bootstrapped over seeds and lists.

    All rows and seeds must have been judged on the same lists, so the counts are one array; the cost is one
    matrix product of [B, U] and [U, R * S * C].
    """
    rows, seeds, lists, columns = sums.shape
    flat = np.ascontiguousarray(sums.transpose(2, 0, 1, 3).reshape(lists, -1), np.float32)
    observed = _ratio(sums.sum(axis=2, dtype=np.float64), counts.sum(axis=0, dtype=np.float64)).mean(axis=1)
    generator = np.random.default_rng(seed)
    drawn = []
    for first in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - first)
        weights = generator.multinomial(lists, np.full(lists, 1 / lists), size).astype(np.float32)
        by_seed = _ratio((weights @ flat).reshape(size, rows, seeds, columns), (weights @ counts)[:, None, None])
        chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size) / seeds
        drawn.append(np.einsum("bs,brsc->brc", chosen, by_seed))
    return Rates(list(names), seeds, observed, np.concatenate(drawn))


def _ratio(sums: Array, counts: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Array = sums / np.where(counts > 0, counts, np.nan)
    return ratio


def _interval(draws: Array) -> tuple[float | None, float | None]:
    known = draws[np.isfinite(draws)]
    if not len(known):
        return None, None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, (tail, 1 - tail))
    return float(low), float(high)


def p_value(difference: float, draws: Array, seeds: int) -> float | None:
    """Two-sided p of ``difference`` = 0: Student's t, S - 1 degrees of freedom, standard error = spread of the draws.

    Not the share of draws beyond 0: Holm's first step over 17 rows asks for p < 0.003, which 2,000 draws cannot
    resolve. Not a t-test over the seeds' differences: it takes the users that came for all there are. The few degrees
    of freedom make it careful where seeds are few; one seed gives no p-value.
    """
    from scipy.stats import t

    known = draws[np.isfinite(draws)]
    if seeds < 2 or not len(known):
        return None
    spread = float(known.std(ddof=1))
    if spread == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * t.sf(abs(difference) / spread, seeds - 1))


def paired(values: Sequence[float | None], others: Sequence[float | None]) -> Estimate | None:
    """Mean over seeds of a metric that lists do not add up to (PR-AUC, ECE, score gap).

    The interval is Student's over the seeds; the p-value is a paired t-test against ``others``, both for
    these very rows: users are not resampled.
    """
    from scipy.stats import t

    pairs = [(v, o) for v, o in zip(values, others, strict=True) if v is not None and o is not None]
    if not pairs:
        return None
    array = np.array(pairs, np.float64)
    mean, count = float(array[:, 0].mean()), len(array)
    if count < 2:
        return Estimate(value=mean)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1) * array[:, 0].std(ddof=1) / np.sqrt(count))
    gained = array[:, 0] - array[:, 1]
    spread = float(gained.std(ddof=1) / np.sqrt(count))
    same = 1.0 if not gained.any() else 0.0
    p = float(2 * t.sf(abs(gained.mean()) / spread, count - 1)) if spread > 0 else same
    return Estimate(value=mean, low=mean - half, high=mean + half, p=p)


def corrected(estimates: Sequence[Estimate | None]) -> list[Estimate | None]:
    """The same with Holm's correction over those that have a p-value: one family is one column of the table."""
    from statsmodels.stats.multitest import multipletests

    places = [i for i, estimate in enumerate(estimates) if estimate is not None and estimate.p is not None]
    result = list(estimates)
    if places:
        adjusted = multipletests([estimates[i].p for i in places], method="holm")[1]  # type: ignore[union-attr]
        for place, p in zip(places, adjusted, strict=True):
            result[place] = result[place].model_copy(update={"adjusted": float(p)})  # type: ignore[union-attr]
    return result


def stacked(by_row: Sequence[Sequence[tuple[str, Array, Array]]]) -> tuple[Array, Array]:
    """Sums [R, S, U, C] and counts [U, C] of (rows' fingerprint, sums, counts) per row and seed.

    Raises:
        DataError: two of them were not judged on the same rows, so nothing is paired.
    """
    everything = [one for seeds in by_row for one in seeds]
    first = everything[0]
    for rows, _, counts in everything:
        if rows != first[0] or not np.array_equal(counts, first[2]):
            raise DataError(
                f"table: received models judged on rows {rows} and {first[0]}; expected the same rows in "
                "the same order for every row and seed"
            )
    return np.stack([np.stack([sums for _, sums, _ in seeds]) for seeds in by_row]), first[2]
