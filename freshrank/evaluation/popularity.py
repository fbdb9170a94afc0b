"""The baseline before any model is served: each item's smoothed engagement rate, from historical counters alone."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from freshrank.schema import Schema

PRIOR_STRENGTH = 20.0
"""An item without history scores the average; this many observations weigh as much as that average."""


def popularity(
    items: pl.DataFrame, schema: Schema, prior_strength: float = PRIOR_STRENGTH
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probabilities [N, A] and score [N] of N item rows that hold the item counters of ``Schema.features()``.

    Probability = (positives + m * average) / (observed + m) over the longest window, average and counts from the
    counters alone, so no label of a judged row is used. Null counters (an item never seen) read as zero.
    """
    window = max(schema.history.windows)
    columns = [_shrunk_rate(items, action, window, prior_strength) for action in schema.actions]
    probabilities = np.stack(columns, axis=1)
    score = probabilities @ np.asarray(schema.utilities)
    return probabilities.astype(np.float32), score.astype(np.float32)


def _shrunk_rate(items: pl.DataFrame, action: str, window: int, strength: float) -> NDArray[np.float64]:
    positives = _counts(items, f"item_{action}_{window}d")
    observed = _observed(items, action, window, positives)
    average = (positives.sum() + 1) / (observed.sum() + 2)
    rate: NDArray[np.float64] = (positives + strength * average) / (observed + strength)
    return rate


def _observed(items: pl.DataFrame, action: str, window: int, positives: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] impressions whose label is known: positives / rate; with a rate of 0, the usual share of impressions."""
    impressions = _counts(items, f"item_impressions_{window}d")
    rate = items[f"item_{action}_rate_{window}d"].cast(pl.Float64).to_numpy()
    exact = np.divide(positives, rate, out=np.zeros_like(positives), where=rate > 0)
    share = exact.sum() / max(impressions[rate > 0].sum(), 1.0) if (rate > 0).any() else 1.0
    return np.where(rate > 0, exact, np.where(np.isnan(rate), 0.0, share * impressions))


def _counts(items: pl.DataFrame, column: str) -> NDArray[np.float64]:
    return items[column].cast(pl.Float64).fill_null(0.0).to_numpy()
