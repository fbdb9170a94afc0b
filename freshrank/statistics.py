"""Ranking, calibration and resampling arithmetic on plain arrays; what the numbers are called is in evaluation.py.

Shapes: N rows (candidates), A actions, L lists, M measures, B bootstrap draws. ``lists`` holds the dense list number
0 .. L-1 of each row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_MIN_ROWS_PER_BIN = 50
_LOGIT_CLIP = 1e-9
_MAX_SHIFT = 25.0
_BISECTIONS = 40


def tie_key(seed: int, *columns: NDArray[Any]) -> NDArray[np.uint64]:
    """Pseudo-random 64-bit key per row from the row's own 8-byte ``columns`` (splitmix64).

    It depends neither on the row's position nor on its label, so equal scores are ordered fairly, and alike for two
    models judged on the same rows.
    """
    state = np.full(len(columns[0]), seed, np.uint64)
    for column in columns:
        state = _mix(state ^ np.ascontiguousarray(column).view(np.uint64))
    return state


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def ranks(score: Floats, lists: Ints, ties: NDArray[np.uint64]) -> Ints:
    """Place of each row in its list, 0 = highest score; [N]."""
    order = np.lexsort((ties, -score, lists))
    starts = np.concatenate([[0], np.cumsum(np.bincount(lists))])
    places = np.empty(len(score), np.int64)
    places[order] = np.arange(len(score)) - starts[lists[order]]
    return places


def list_hits(positive: Bools, rank: Ints, lists: Ints, count: int, k: int) -> tuple[Bools, Bools]:
    """([L], [L]): whether a list holds a positive row, whether it has one among its first ``k``."""
    holds, hit = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    holds[lists[positive]] = True
    hit[lists[positive & (rank < k)]] = True
    return holds, hit


def ndcg(positive: Bools, rank: Ints, lists: Ints, count: int, k: int) -> float | None:
    """Mean over the lists that hold a positive row of DCG@k / ideal DCG@k with 0/1 gains; None without such a list."""
    positives = np.bincount(lists[positive], minlength=count)
    if not positives.any():
        return None
    gain = np.where(positive & (rank < k), 1 / np.log2(rank + 2.0), 0.0)
    ideal = np.cumsum(1 / np.log2(np.arange(k) + 2.0))
    holds = positives > 0
    achieved = np.bincount(lists, gain, count)[holds] / ideal[np.minimum(positives[holds], k) - 1]
    return float(achieved.mean())


def log_loss(probabilities: Floats, labels: Floats) -> float:
    """Mean negative log likelihood in nats; probabilities are clipped to [1e-7, 1 - 1e-7]."""
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p)))


def reliability(probabilities: Floats, labels: Floats, bins: int) -> tuple[Floats, Floats, Ints]:
    """Mean prediction, observed rate and rows of at most ``bins`` equal-mass bins.

    Every bin gets 50 rows or more (a slice of 120 rows has 2 bins), else the noise of small bins would read as
    miscalibration. Equal predictions share a bin, so the order of the rows does not matter.
    """
    bins = max(1, min(bins, len(labels) // _MIN_ROWS_PER_BIN))
    edges = np.unique(np.quantile(probabilities, np.arange(1, bins) / bins))
    bin_of = np.searchsorted(edges, probabilities, side="right")
    rows = np.bincount(bin_of, minlength=len(edges) + 1)
    kept = rows > 0
    predicted = np.bincount(bin_of, probabilities, len(rows))[kept] / rows[kept]
    observed = np.bincount(bin_of, labels, len(rows))[kept] / rows[kept]
    return predicted, observed, rows[kept]


def expected_calibration_error(probabilities: Floats, labels: Floats, bins: int) -> float:
    """Mean over rows of |mean prediction - observed rate| of the row's :func:`reliability` bin."""
    predicted, observed, rows = reliability(probabilities, labels, bins)
    return float(np.average(np.abs(predicted - observed), weights=rows))


def matched_ranks(
    probabilities: Floats,
    utilities: Floats,
    fresh: Bools,
    lists: Ints,
    ties: NDArray[np.uint64],
    k: int,
    share: float,
) -> tuple[Ints, float]:
    """Ranks [N] once fresh rows hold ``share`` of all top-k slots, and the shift of their logits that does it.

    Every action's logit of every fresh row is moved by one constant (towards a higher score: against the sign of the
    utility), scores are formed anew. The share is a step function of the constant: the step nearest ``share`` wins.
    """
    clipped = np.clip(probabilities.astype(np.float64), _LOGIT_CLIP, 1 - _LOGIT_CLIP)
    logits = np.log(clipped) - np.log1p(-clipped)
    direction = np.sign(utilities)

    def ranked(shift: float) -> tuple[Ints, float]:
        moved = logits + shift * fresh[:, None] * direction
        rank = ranks((1 / (1 + np.exp(-moved))) @ utilities, lists, ties)
        return rank, float(fresh[rank < k].mean())

    low, high = -_MAX_SHIFT, _MAX_SHIFT
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if ranked(middle)[1] < share:
            low = middle
        else:
            high = middle
    shift = min((high, low), key=lambda candidate: abs(ranked(candidate)[1] - share))
    return ranked(shift)[0], shift


@dataclass(frozen=True)
class Draws:
    """Bootstrap draws of M hit rates of two models, [B, M] each; NaN where a draw holds no list with support."""

    challenger: Floats
    baseline: Floats


def paired_bootstrap(holds: Bools, challenger: Bools, baseline: Bools, draws: int, seed: int) -> Draws:
    """Resample whole lists ([L, M] indicators) with replacement, the same lists for both models and all measures.

    Lists with equal indicators are interchangeable, so the draw is one multinomial over the distinct patterns: the
    cost does not grow with L, and the distribution is exactly that of drawing L lists one by one.
    """
    measures = holds.shape[1]
    patterns, counts = np.unique(np.hstack([holds, challenger, baseline]), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=draws)
    sums = drawn.astype(np.float64) @ patterns.astype(np.float64)
    support = np.where(sums[:, :measures] > 0, sums[:, :measures], np.nan)
    return Draws(sums[:, measures : 2 * measures] / support, sums[:, 2 * measures :] / support)
