"""Ranking, calibration and resampling arithmetic on plain arrays; what the numbers are called is in results.py.

Shapes: N rows (candidates), A actions, L lists, I items, M measures, B bootstrap draws. ``lists`` holds the dense list
number 0 .. L-1 of each row, ``items`` its dense item number. ``weights`` [N] are positive; None weighs rows alike.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_MIN_ROWS_PER_BIN = 50
_LOGIT_CLIP = 1e-9
_MAX_SHIFT = 25.0
_BISECTIONS = 30


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


def ranks(score: Floats, lists: Ints, ties: NDArray[np.uint64] | None) -> Ints:
    """Place of each row in its list, 0 = highest score; [N]. None: equal scores keep the order of the rows."""
    order = np.arange(len(score)) if ties is None else np.argsort(ties, kind="stable")
    order = order[np.argsort(-score[order], kind="stable")]
    numbers = lists.astype(np.min_scalar_type(lists.max(initial=0)))  # 16 bits are sorted by radix
    order = order[np.argsort(numbers[order], kind="stable")]
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


def item_weights(items: Ints) -> Floats:
    """[N] 1 / (rows of the row's item): every item weighs 1 in all, so the head cannot hide the tail."""
    _, inverse, counts = np.unique(items, return_inverse=True, return_counts=True)
    weights: Floats = 1 / counts[inverse]
    return weights


def row_losses(probabilities: Floats, labels: Floats) -> Floats:
    """[N] negative log likelihood in nats; probabilities are clipped to [1e-7, 1 - 1e-7]."""
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    losses: Floats = -(labels * np.log(p) + (1 - labels) * np.log1p(-p))
    return losses


def log_loss(probabilities: Floats, labels: Floats, weights: Floats | None = None) -> float:
    """(Weighted) mean of :func:`row_losses`."""
    return float(np.average(row_losses(probabilities, labels), weights=weights))


def areas(probabilities: Floats, labels: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """([B], [B]): areas under the precision-recall and the ROC curve for each of the [B, N] row weights.

    The first is average precision: sum over thresholds of (gain in recall) * precision. The second is the chance that
    a row with the action is predicted above one without, equal predictions counting half. Weights may be 0; an area
    is NaN where only one class has weight. One sort serves all B, which is what makes resampling cheap.
    """
    order = np.argsort(-probabilities, kind="stable")
    ordered, labels = probabilities[order], labels[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    weights = weights[:, order]
    gained = weights * labels
    lost = weights - gained
    if len(starts) < len(ordered):
        gained, lost = (np.add.reduceat(part, starts, axis=1) for part in (gained, lost))
    positive = np.cumsum(gained, axis=1)
    negative = np.cumsum(lost, axis=1)
    seen = positive + negative
    precision = np.divide(positive, seen, out=np.zeros_like(seen), where=seen > 0)
    of_positive, of_negative = (np.where(part[:, -1] > 0, part[:, -1], np.nan) for part in (positive, negative))
    precision_recall = np.einsum("bn,bn->b", gained, precision) / of_positive
    above = np.einsum("bn,bn->b", lost, positive) - np.einsum("bn,bn->b", lost, gained) / 2
    return np.where(np.isnan(of_negative), np.nan, precision_recall), above / (of_positive * of_negative)


def reliability(
    probabilities: Floats, labels: Floats, bins: int, weights: Floats | None = None
) -> tuple[Floats, Floats, Floats]:
    """Mean prediction, observed rate and mass (rows, or their weights) of at most ``bins`` bins of equal mass.

    Every bin gets 50 rows or more (a slice of 120 rows has 2 bins), else the noise of small bins would read as
    miscalibration; of weighted rows the effective number counts, (sum of weights)^2 / (sum of squares). Equal
    predictions share a bin, so the order of the rows does not matter.
    """
    mass = np.ones(len(labels)) if weights is None else weights
    effective = int(mass.sum() ** 2 / (mass**2).sum())
    bins = max(1, min(bins, effective // _MIN_ROWS_PER_BIN))
    edges = np.unique(_quantiles(probabilities, np.arange(1, bins) / bins, weights))
    bin_of = np.searchsorted(edges, probabilities, side="right")
    masses = np.bincount(bin_of, mass, len(edges) + 1).astype(np.float64)
    filled = masses > 0
    predicted = np.bincount(bin_of, mass * probabilities, len(masses))[filled] / masses[filled]
    observed = np.bincount(bin_of, mass * labels, len(masses))[filled] / masses[filled]
    return predicted, observed, masses[filled]


def _quantiles(values: Floats, shares: Floats, weights: Floats | None) -> Floats:
    if weights is None:
        return np.asarray(np.quantile(values, shares))
    return np.asarray(np.quantile(values, shares, weights=weights, method="inverted_cdf"))


def expected_calibration_error(
    probabilities: Floats, labels: Floats, bins: int, weights: Floats | None = None
) -> float:
    """(Weighted) mean over rows of |mean prediction - observed rate| of the row's :func:`reliability` bin."""
    predicted, observed, mass = reliability(probabilities, labels, bins, weights)
    return float(np.average(np.abs(predicted - observed), weights=mass))


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
    by_tie = np.lexsort((ties, lists))  # once, so that each of the many sorts below has a key less
    lists, fresh = lists[by_tie], fresh[by_tie]
    clipped = np.clip(probabilities[by_tie].astype(np.float64), _LOGIT_CLIP, 1 - _LOGIT_CLIP)
    logits = logit(clipped)
    direction = np.sign(utilities)

    def ranked(shift: float) -> tuple[Ints, float]:
        moved = logits + shift * fresh[:, None] * direction
        rank = ranks(expit(moved) @ utilities, lists, None)
        return rank, float(fresh[rank < k].mean())

    low, high = -_MAX_SHIFT, _MAX_SHIFT
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if ranked(middle)[1] < share:
            low = middle
        else:
            high = middle
    shift = min((high, low), key=lambda candidate: abs(ranked(candidate)[1] - share))
    rank = np.empty(len(lists), np.int64)
    rank[by_tie] = ranked(shift)[0]
    return rank, shift
