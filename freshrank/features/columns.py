"""Features as arrays before they are encoded: raw values, and a mask of which are present. Tables and the online store
both
come to this, and training, export and serving encode it alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from freshrank.schema import Feature, Kind

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Arrays = dict[str, npt.NDArray[Any]]
_LISTS = (Kind.MULTI_VALUED, Kind.SEQUENCE)
_MARKED = (Kind.CATEGORICAL, *_LISTS)
PRESENT = "present_"
"""Before a kind: the name of the array that marks where its values are."""


@dataclass(frozen=True)
class Layout:
    """Where each of some features of one entity stands: a kind's features lie side by side in one array."""

    features: tuple[Feature, ...]

    @classmethod
    def of(cls, features: Iterable[Feature]) -> "Layout":
        return cls(tuple(features))

    @cached_property
    def kinds(self) -> dict[Kind, list[Feature]]:
        return {kind: features for kind in Kind if (features := [f for f in self.features if f.kind is kind])}

    @cached_property
    def places(self) -> dict[str, tuple[Kind, slice]]:
        """Kind and columns of each feature by name."""
        places: dict[str, tuple[Kind, slice]] = {}
        for kind, features in self.kinds.items():
            ends = np.cumsum([width(feature) for feature in features]).tolist()
            starts = [0, *ends]
            places |= {f.name: (kind, slice(a, b)) for f, a, b in zip(features, starts, ends, strict=False)}
        return places


def width(feature: Feature) -> int:
    """Columns of a feature in its kind's array."""
    return 1 if feature.kind in (Kind.CATEGORICAL, Kind.NUMERIC) else feature.dim


@dataclass(frozen=True)
class Columns:
    """N users, items or rows.

    ``arrays`` holds ``categorical`` [N, C], ``multi_valued`` and ``sequence`` [N, sum of widths] as int64 with a bool
    array ``present_<kind>`` beside each, ``numeric`` [N, K] and ``embedding`` [N, D] as float32. What is missing is
    not present (and 0), the declared default or NaN (numeric), or a vector of NaN (embedding). A kind without
    features is absent.
    """

    layout: Layout
    arrays: Arrays

    @classmethod
    def of(cls, table: pl.DataFrame, layout: Layout) -> "Columns":
        """From a table that holds every feature of ``layout``; null where a value is missing."""
        arrays: Arrays = {}
        for kind, features in layout.kinds.items():
            parts = [_READ[kind](table[feature.name], feature) for feature in features]
            arrays[kind] = _side_by_side([values for values, _ in parts])
            if kind in _MARKED:
                arrays[PRESENT + kind] = _side_by_side([present for _, present in parts])
        return cls(layout, arrays)

    @classmethod
    def missing(cls, layout: Layout, count: int) -> "Columns":
        """``count`` rows of which nothing is known."""
        return cls(layout, {name: np.repeat(row, count, axis=0) for name, row in _nothing(layout).items()})

    def values(self, name: str) -> npt.NDArray[Any]:
        """[N] of a categorical or numeric feature, [N, width] of another."""
        kind, place = self.layout.places[name]
        return _squeezed(self.arrays[kind][:, place], kind)

    def present(self, name: str) -> Bool:
        """Where :meth:`values` holds a value; categorical, multi-valued and sequences only."""
        kind, place = self.layout.places[name]
        return _squeezed(self.arrays[PRESENT + kind][:, place], kind)

    def put(self, name: str, rows: slice, value: Any) -> None:
        """Set ``rows`` of a feature of one column to a value, or to one per row."""
        kind, place = self.layout.places[name]
        self.arrays[kind][rows, place.start] = value
        if kind in _MARKED:
            self.arrays[PRESENT + kind][rows, place.start] = True

    def take(self, rows: npt.NDArray[Any]) -> "Columns":
        return Columns(self.layout, {name: array[rows] for name, array in self.arrays.items()})


def _squeezed(array: npt.NDArray[Any], kind: Kind) -> npt.NDArray[Any]:
    return array[:, 0] if kind in (Kind.CATEGORICAL, Kind.NUMERIC) else array


def _nothing(layout: Layout) -> Arrays:
    arrays: Arrays = {}
    for kind, features in layout.kinds.items():
        columns = sum(map(width, features))
        if kind in _MARKED:
            arrays |= {kind: np.zeros((1, columns), np.int64), PRESENT + kind: np.zeros((1, columns), np.bool_)}
        else:
            arrays[kind] = np.array([[f.missing for f in features for _ in range(width(f))]], np.float32)
    return arrays


def _side_by_side(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """[N, ..] each; single columns are kept one after the other, as they are read."""
    single = all(part.shape[1] == 1 for part in parts)
    return np.concatenate([part.T for part in parts]).T if single else np.concatenate(parts, axis=1)


def padded(series: pl.Series, size: int, keep: str = "last") -> tuple[Int, Bool]:
    """A list column as int64 [N, size], left-aligned, and where a value is present.

    Lists longer than ``size`` keep their ``first`` or ``last`` values; a null list or element is absent.
    """
    lists = series.list.head(size) if keep == "first" else series.list.tail(size)
    lengths = integers(lists.list.len())
    present = np.arange(size)[None, :] < lengths[:, None]
    flat = lists.filter(pl.Series(lengths > 0)).explode()
    values = np.zeros((len(series), size), np.int64)
    values[present] = integers(flat)
    if flat.null_count():
        present[present] = flat.is_not_null().to_numpy()
    return values, present


def integers(series: pl.Series) -> Int:
    values: Int = _filled(series.cast(pl.Int64), 0).to_numpy()
    return values


def _filled(series: pl.Series, value: float) -> pl.Series:
    """Filling nulls runs a query plan, which costs more than checking that there are none."""
    return series.fill_null(value) if series.null_count() else series


def _categories(series: pl.Series, feature: Feature) -> tuple[Int, Bool]:
    return integers(series)[:, None], series.is_not_null().to_numpy()[:, None]


def _numbers(series: pl.Series, feature: Feature) -> tuple[Float, None]:
    return _filled(series.cast(pl.Float32), feature.missing).to_numpy()[:, None], None


def _first_values(series: pl.Series, feature: Feature) -> tuple[Int, Bool]:
    return padded(series, feature.dim, keep="first")


def _last_values(series: pl.Series, feature: Feature) -> tuple[Int, Bool]:
    return padded(series, feature.dim)


def _vectors(series: pl.Series, feature: Feature) -> tuple[Float, None]:
    vectors = np.full((len(series), feature.dim), np.nan, np.float32)
    flat = series.drop_nulls().explode().cast(pl.Float32).to_numpy()
    vectors[series.is_not_null().to_numpy()] = flat.reshape(-1, feature.dim)
    return vectors, None


_READ: dict[Kind, Any] = {
    Kind.CATEGORICAL: _categories,
    Kind.NUMERIC: _numbers,
    Kind.MULTI_VALUED: _first_values,
    Kind.SEQUENCE: _last_values,
    Kind.EMBEDDING: _vectors,
}
