"""Values to embedding rows, and the statistics that numbers are normalised with."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from freshrank.features.columns import Float, Int

MISSING, NEW, FIRST_KNOWN = 0, 1, 2
"""Rows of every embedding table: nothing there, never or rarely seen in training, then the known values."""


class Vocabulary:
    """Maps raw int64 values to rows of an embedding table."""

    def __init__(self, values: Int) -> None:
        self.values = np.sort(values.astype(np.int64))

    @classmethod
    def fit(cls, values: pl.Series, counts: Int | None, min_count: int) -> "Vocabulary":
        """Keep values seen at least ``min_count`` times; ``counts`` weighs each entry of ``values``."""
        return cls.of(value_counts(values, counts), min_count)

    @classmethod
    def of(cls, counted: pl.DataFrame, min_count: int) -> "Vocabulary":
        """Keep each ``value`` whose ``count`` is at least ``min_count``; both Int64."""
        return cls(counted.filter(pl.col("count") >= min_count)["value"].to_numpy())

    def __len__(self) -> int:
        """Rows of the embedding table, the two reserved ones included."""
        return len(self.values) + FIRST_KNOWN

    def encode(self, values: Int, present: npt.NDArray[np.bool_]) -> Int:
        """Row of each value; any shape."""
        return table_rows(self.values, values, present)


@dataclass(frozen=True)
class NumericStatistics:
    """Of transformed training values; shape [columns] each."""

    mean: Float
    std: Float


def table_rows(known: Int, values: Int, present: npt.NDArray[np.bool_]) -> Int:
    """Row of each of ``values`` in a table of the ascending ``known`` ones behind the reserved rows."""
    rows = np.full(values.shape, MISSING, np.int64)
    rows[present] = _table_places(known, values[present])  # most of a padded sequence is not
    return rows


def _table_places(known: Int, values: Int) -> Int:
    span = int(known[-1]) - int(known[0]) + 1 if len(known) else 0
    if 0 < span <= len(values):  # one table look-up each instead of a search
        table = np.full(span + 1, NEW)
        table[known - known[0]] = np.arange(len(known)) + FIRST_KNOWN
        inside = (values >= known[0]) & (values <= known[-1])
        return table[np.where(inside, values - known[0], span)]
    place = np.searchsorted(known, values)
    same = (place < len(known)) & (np.append(known, 0)[place] == values)
    return np.where(same, place + FIRST_KNOWN, NEW)


def value_counts(values: pl.Series, counts: Int | None) -> pl.DataFrame:
    """Each value but null and how often it occurs, Int64 both; a list counts each of its values."""
    weights = pl.Series(counts) if counts is not None else pl.repeat(1, len(values), eager=True)
    table = pl.DataFrame({"value": values, "count": weights})
    if isinstance(values.dtype, pl.List):
        table = table.explode("value")
    return summed_counts(table.drop_nulls("value").cast(pl.Int64))


def summed_counts(counted: pl.DataFrame) -> pl.DataFrame:
    return counted.group_by("value").agg(pl.col("count").sum())
