"""Resampling: paired draws of lists and draws of items."""

from dataclasses import dataclass

import numpy as np

from freshrank.evaluation.metrics import Bools, Floats, Ints, areas

_CELLS_AT_ONCE = 200_000
"""Draws x rows handled together: what fits into a processor's cache."""


@dataclass(frozen=True)
class BootstrapDraws:
    """Bootstrap draws of M hit rates of two models, [B, M] each; NaN where a draw holds no list with support."""

    challenger: Floats
    baseline: Floats


def paired_bootstrap(holds: Bools, challenger: Bools, baseline: Bools, draws: int, seed: int) -> BootstrapDraws:
    """Resample whole lists ([L, M] indicators) with replacement, the same lists for both models and all measures.

    Lists with equal indicators are interchangeable, so the draw is one multinomial over the distinct patterns: the
    cost does not grow with L, and the distribution is exactly that of drawing L lists one by one.
    """
    measures = holds.shape[1]
    patterns, counts = np.unique(np.hstack([holds, challenger, baseline]), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=draws)
    sums = drawn.astype(np.float64) @ patterns.astype(np.float64)
    support = np.where(sums[:, :measures] > 0, sums[:, :measures], np.nan)
    return BootstrapDraws(sums[:, measures : 2 * measures] / support, sums[:, 2 * measures :] / support)


def item_draws(items: int, draws: int, seed: int) -> Ints:
    """[B, I] how often each item is drawn when ``items`` items are drawn with replacement."""
    drawn: Ints = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=draws)
    return drawn


def drawn_means(drawn: Ints, items: Ints, values: Floats, weights: Floats) -> Floats:
    """[B] weighted means of ``values`` [N] when an item is drawn with all its rows; NaN where no row is drawn."""
    total = np.bincount(items, weights * values, drawn.shape[1])
    mass = np.bincount(items, weights, drawn.shape[1])
    support = drawn @ mass
    means: Floats = drawn @ total / np.where(support > 0, support, np.nan)
    return means


def drawn_areas(
    drawn: Ints, items: Ints, probabilities: Floats, labels: Floats, weights: Floats
) -> tuple[Floats, Floats]:
    """:func:`areas` for each of the B draws of items, an item drawn with all its rows."""
    at_once = max(1, _CELLS_AT_ONCE // max(1, len(items)))
    parts = [
        areas(probabilities, labels, drawn[start : start + at_once, items] * weights)
        for start in range(0, len(drawn), at_once)
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
