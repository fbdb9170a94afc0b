"""Frames -> arrays: the one definition of model inputs that training, export and serving share.

Every feature has a place in a block; a missing value is index 0 (categorical), NaN (numeric, embedding) or
padding (sequences), so any frame, however incomplete, encodes to finite-scoring inputs (cold-complete).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from freshrank.frames import Frame
from freshrank.schema import (
    ITEM_ID,
    QUERY_ITEM_ID,
    SEQUENCE_ACTIONS,
    SEQUENCE_ITEMS,
    Entity,
    Feature,
    Group,
    Kind,
    Schema,
    affinity_lists,
)
from freshrank.storage import atomic_write, read_json, write_json

MISSING, NEW, FIRST_KNOWN = 0, 1, 2
"""Rows of every embedding table: nothing there, never or rarely seen in training, then the known values."""

Blocks = dict[str, npt.NDArray[Any]]
Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float32]
_ENTITIES = (Entity.USER, Entity.ITEM, Entity.ROW)


class Vocabulary:
    """Maps raw int64 values to rows of an embedding table."""

    def __init__(self, values: Int) -> None:
        self.values = np.sort(values.astype(np.int64))

    @classmethod
    def fit(cls, values: pl.Series, counts: Int | None, min_count: int) -> "Vocabulary":
        """Keep values seen at least ``min_count`` times; ``counts`` weighs each entry of ``values``."""
        weights = pl.Series(counts) if counts is not None else pl.repeat(1, len(values), eager=True)
        seen = pl.DataFrame({"value": values, "count": weights}).drop_nulls("value")
        kept = seen.group_by("value").agg(pl.col("count").sum()).filter(pl.col("count") >= min_count)
        return cls(kept["value"].cast(pl.Int64).to_numpy())

    def __len__(self) -> int:
        """Rows of the embedding table, the two reserved ones included."""
        return len(self.values) + FIRST_KNOWN

    def encode(self, values: Int, present: npt.NDArray[np.bool_]) -> Int:
        """Row of each value; any shape."""
        return _table_rows(self.values, values, present)

    def encode_series(self, series: pl.Series) -> Int:
        return self.encode(_integers(series), series.is_not_null().to_numpy())


@dataclass(frozen=True)
class NumericStatistics:
    """Of transformed training values; shape [columns] each."""

    mean: Float
    std: Float


@dataclass(frozen=True)
class Encoder:
    """Fitted on a training frame; :meth:`users`, :meth:`items` and :meth:`rows` encode any frame alike."""

    schema: Schema
    vocabularies: dict[str, Vocabulary]
    statistics: dict[Entity, NumericStatistics]

    @classmethod
    def fit(cls, frame: Frame, schema: Schema, min_count: int) -> "Encoder":
        """Fit vocabularies and numeric statistics on the training rows only."""
        encoder = cls(schema, _vocabularies(frame, schema, min_count), {})
        return cls(schema, encoder.vocabularies, encoder._statistics(frame))

    def _statistics(self, frame: Frame) -> dict[Entity, NumericStatistics]:
        rows = self._row_numeric(frame)
        numeric = {
            Entity.USER: numeric_block(frame.users, self.numeric(Entity.USER)),
            Entity.ITEM: numeric_block(frame.items, self.numeric(Entity.ITEM)),
            Entity.ROW: rows,
        }
        return {e: _moments(block, self.numeric(e)) for e, block in numeric.items()}

    def numeric(self, entity: Entity) -> list[Feature]:
        return self.schema.select(entity, Kind.NUMERIC)

    def categorical(self, entity: Entity) -> list[Feature]:
        return self.schema.select(entity, Kind.CATEGORICAL)

    def multi_valued(self, entity: Entity) -> list[Feature]:
        return self.schema.select(entity, Kind.MULTI_VALUED)

    def embedding(self, entity: Entity) -> list[Feature]:
        return self.schema.select(entity, Kind.EMBEDDING)

    def users(self, frame: Frame, catalog: "Catalog") -> Blocks:
        """Blocks with leading dimension U (rows of ``frame.users``), sequences looked up in ``catalog``."""
        return self.users_without_sequences(frame) | self.sequences(frame.users, catalog)

    def users_without_sequences(self, frame: Frame) -> Blocks:
        return self._entity(Entity.USER, frame.users)

    def sequences(self, users: pl.DataFrame, catalog: "Catalog") -> Blocks:
        """``sequence_items`` [U, L], ``sequence_actions`` [U, L] (bitmask + 1, 0 = padding), ``sequence_categorical``
        [U, L, C]."""
        places, actions = self.sequence_places(users, catalog)
        blocks = {"sequence_items": catalog.item_id[places], "sequence_actions": actions}
        if self.categorical(Entity.ITEM):
            blocks["sequence_categorical"] = catalog.categorical[places]
        return blocks

    def sequence_places(self, users: pl.DataFrame, catalog: "Catalog") -> tuple[Int, Int]:
        """Rows of ``catalog`` and action codes of each user's sequence, [U, L] each, newest last."""
        length = self.schema.history.sequence_length
        items, present = padded(users[SEQUENCE_ITEMS], length)
        masks, _ = padded(users[SEQUENCE_ACTIONS], length)
        limit = 2 ** len(self.schema.actions) - 1
        codes = np.where(present, np.clip(masks, 0, limit) + 1, 0)
        return catalog.places(items, present), codes

    def items(self, frame: Frame) -> Blocks:
        """Blocks with leading dimension I (rows of ``frame.items``)."""
        ids = self.vocabularies[ITEM_ID].encode_series(frame.items[ITEM_ID])
        return {"item_id": ids} | self._entity(Entity.ITEM, frame.items)

    def rows(self, frame: Frame, catalog: "Catalog") -> Blocks:
        """Blocks with leading dimension N (rows of ``frame.rows``)."""
        blocks = self._entity(Entity.ROW, frame.rows, numeric=self._row_numeric(frame))
        if self.schema.has_query:
            series = frame.rows[QUERY_ITEM_ID]
            places = catalog.places(_integers(series), series.is_not_null().to_numpy())
            blocks |= {"query_item_id": catalog.item_id[places]}
            if self.categorical(Entity.ITEM):
                blocks["query_categorical"] = catalog.categorical[places]
        return blocks

    def inputs(self, frame: Frame, catalog: "Catalog") -> Blocks:
        """What the ranker takes: user blocks [U, ..], candidate blocks [N, ..] and ``user_index`` [N]."""
        item_row = frame.rows["item_row"].to_numpy()
        items = {name: block[item_row] for name, block in self.items(frame).items()}
        index = {"user_index": frame.rows["user_row"].to_numpy().astype(np.int64)}
        return self.users(frame, catalog) | items | self.rows(frame, catalog) | index

    def _entity(self, entity: Entity, table: pl.DataFrame, numeric: Float | None = None) -> Blocks:
        blocks: Blocks = {}
        if features := self.categorical(entity):
            columns = [self.vocabularies[f.name].encode_series(table[f.name]) for f in features]
            blocks[f"{entity}_categorical"] = np.stack(columns, axis=1)
        if features := self.multi_valued(entity):
            blocks[f"{entity}_multi"] = np.concatenate([self._multi(f, table) for f in features], axis=1)
        if features := self.numeric(entity):
            blocks[f"{entity}_numeric"] = numeric_block(table, features) if numeric is None else numeric
        if features := self.embedding(entity):
            vectors = [_vectors(table[f.name], f.dim) for f in features]
            blocks[f"{entity}_embedding"] = np.concatenate(vectors, axis=1)
        return blocks

    def _multi(self, feature: Feature, table: pl.DataFrame) -> Int:
        values, present = padded(table[feature.name], feature.dim, keep="first")
        return self.vocabularies[feature.name].encode(values, present)

    def _row_numeric(self, frame: Frame) -> Float:
        crosses = self._crosses(frame)
        columns = [crosses[f.name] if f.name in crosses else _floats(frame.rows, f) for f in self.numeric(Entity.ROW)]
        return np.stack(columns, axis=1)

    def _crosses(self, frame: Frame) -> dict[str, Float]:
        crosses: dict[str, Float] = {}
        for column in self.schema.history.affinity:
            crosses |= self._affinity(column, frame)
        return crosses

    def _affinity(self, column: str, frame: Frame) -> dict[str, Float]:
        """What the user did with the candidate's category: impressions [N] and a rate [N] per action."""
        size, actions = self.schema.history.affinity_size, self.schema.actions
        values, present = padded(frame.users[affinity_lists(column, actions)[0]], size)
        user_row, item_row = (frame.rows[name].to_numpy() for name in ("user_row", "item_row"))
        category, known = _first_value(frame.items[column])
        match = (values[user_row] == category[item_row, None]) & present[user_row] & known[item_row, None]
        seen, *positives = (
            (padded(frame.users[name], size)[0][user_row] * match).sum(axis=1).astype(np.float32)
            for name in affinity_lists(column, actions)[1:]
        )
        rates = [np.divide(p, seen, out=np.full_like(seen, np.nan), where=seen > 0) for p in positives]
        names = [f"cross_affinity_{column}_{action}_rate" for action in actions]
        return {f"cross_affinity_{column}_impressions": seen} | dict(zip(names, rates, strict=True))

    def without_siblings(self) -> "Encoder":
        """The encoder of the same frame for a ranker that does not read sibling rates."""
        schema = self.schema.without_siblings()
        kept = {feature.name for feature in schema.select(Entity.ITEM, Kind.NUMERIC)}
        columns = [place for place, feature in enumerate(self.numeric(Entity.ITEM)) if feature.name in kept]
        moments = self.statistics[Entity.ITEM]
        item = {Entity.ITEM: NumericStatistics(moments.mean[columns], moments.std[columns])}
        return Encoder(schema, self.vocabularies, self.statistics | item)

    def save(self, directory: Path) -> None:
        """Write ``encoder.safetensors`` and ``encoder.json``."""
        arrays: Blocks = {f"vocabulary.{name}": v.values for name, v in self.vocabularies.items()}
        for entity, moments in self.statistics.items():
            arrays |= {f"mean.{entity}": moments.mean, f"std.{entity}": moments.std}
        with atomic_write(directory / "encoder.safetensors") as path:
            save_file(arrays, path)
        write_json(directory / "encoder.json", {"schema": self.schema.model_dump(mode="json")})

    @classmethod
    def load(cls, directory: Path) -> "Encoder":
        arrays = load_file(directory / "encoder.safetensors")
        schema = Schema.model_validate(read_json(directory / "encoder.json")["schema"])
        prefix = "vocabulary."
        vocabularies = {k.removeprefix(prefix): Vocabulary(v) for k, v in arrays.items() if k.startswith(prefix)}
        moments = {e: NumericStatistics(arrays[f"mean.{e}"], arrays[f"std.{e}"]) for e in _ENTITIES}
        return cls(schema, vocabularies, moments)


@dataclass(frozen=True)
class Catalog:
    """What a sequence or a query looks up of an item: its embedding row and its content categories.

    Row 0 is padding, row 1 an item the catalog does not hold; ids [I] ascending.
    """

    ids: Int
    item_id: Int
    categorical: Int

    @classmethod
    def build(cls, items: pl.DataFrame, encoder: Encoder) -> "Catalog":
        """From a table with item_id and the schema's categorical content columns, one row per item."""
        items = items.unique(ITEM_ID, keep="first").sort(ITEM_ID)
        item_id = encoder.vocabularies[ITEM_ID].encode_series(items[ITEM_ID])
        features = encoder.categorical(Entity.ITEM)
        columns = [encoder.vocabularies[f.name].encode_series(items[f.name]) for f in features]
        categorical = np.stack(columns, axis=1) if columns else np.zeros((len(items), 0), np.int64)
        unknown = np.full((1, categorical.shape[1]), NEW)
        return cls(
            ids=items[ITEM_ID].cast(pl.Int64).to_numpy(),
            item_id=np.concatenate([[MISSING, NEW], item_id]),
            categorical=np.concatenate([np.zeros_like(unknown), unknown, categorical]),
        )

    def places(self, values: Int, present: npt.NDArray[np.bool_]) -> Int:
        """Catalog row of each raw item id; any shape."""
        return _table_rows(self.ids, values, present)


def _table_rows(known: Int, values: Int, present: npt.NDArray[np.bool_]) -> Int:
    """Row of each of ``values`` in a table of the ascending ``known`` ones behind the reserved rows."""
    if not len(known):
        return np.where(present, NEW, MISSING).astype(np.int64)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    found = known[place] == values
    return np.where(present, np.where(found, place + FIRST_KNOWN, NEW), MISSING).astype(np.int64)


def numeric_block(table: pl.DataFrame, features: list[Feature]) -> Float:
    """[N, columns] float32, NaN where missing and no default is declared."""
    if not features:
        return np.zeros((len(table), 0), np.float32)
    return np.stack([_floats(table, f) for f in features], axis=1)


def transformed(block: Float, features: list[Feature]) -> Float:
    """Apply each feature's declared transform; NaN stays NaN."""
    logs = np.array([f.transform == "log1p" for f in features], dtype=bool)
    signed = np.sign(block) * np.log1p(np.abs(block))
    return np.where(logs, signed, block).astype(np.float32)


def padded(series: pl.Series, width: int, keep: str = "last") -> tuple[Int, npt.NDArray[np.bool_]]:
    """A list column as int64 [N, width], left-aligned, and where a value is present.

    Lists longer than ``width`` keep their ``first`` or ``last`` values; a null list or element is absent.
    """
    lists = series.list.head(width) if keep == "first" else series.list.tail(width)
    lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
    present = np.arange(width)[None, :] < lengths[:, None]
    flat = lists.filter(lists.list.len() > 0).explode()
    values = np.zeros((len(series), width), np.int64)
    values[present] = _integers(flat)
    present[present] = flat.is_not_null().to_numpy()
    return values, present


def _vocabularies(frame: Frame, schema: Schema, min_count: int) -> dict[str, Vocabulary]:
    item_counts = np.bincount(frame.rows["item_row"].to_numpy(), minlength=len(frame.items))
    tables = {Entity.USER: (frame.users, None), Entity.ITEM: (frame.items, item_counts), Entity.ROW: (frame.rows, None)}
    result = {ITEM_ID: Vocabulary.fit(frame.items[ITEM_ID], item_counts, min_count)}
    for feature in schema.features():
        table, counts = tables[feature.entity]
        if feature.kind is Kind.CATEGORICAL:
            result[feature.name] = Vocabulary.fit(table[feature.name], counts, min_count)
        elif feature.kind is Kind.MULTI_VALUED:
            result[feature.name] = _fit_multi(table[feature.name], counts, min_count)
    return result


def _fit_multi(series: pl.Series, counts: Int | None, min_count: int) -> Vocabulary:
    weights = counts if counts is not None else np.ones(len(series), np.int64)
    exploded = pl.DataFrame({"value": series, "count": weights}).explode("value")
    return Vocabulary.fit(exploded["value"], exploded["count"].to_numpy(), min_count)


def _moments(block: Float, features: list[Feature]) -> NumericStatistics:
    values = transformed(block, features).astype(np.float64)
    seen = np.isfinite(values)
    count = np.maximum(seen.sum(axis=0), 1)
    mean = np.where(seen, values, 0).sum(axis=0) / count
    variance = np.where(seen, (values - mean) ** 2, 0).sum(axis=0) / count
    std = np.where(variance > 1e-12, np.sqrt(variance), 1.0)
    return NumericStatistics(mean.astype(np.float32), std.astype(np.float32))


def _integers(series: pl.Series) -> Int:
    values: Int = series.cast(pl.Int64).fill_null(0).to_numpy()
    return values


def _floats(table: pl.DataFrame, feature: Feature) -> Float:
    series = table[feature.name].cast(pl.Float32)
    values: Float = series.fill_null(feature.missing).to_numpy()
    return values


def _vectors(series: pl.Series, dim: int) -> Float:
    """[N, dim] float32 of a list column, NaN where the vector is null."""
    out = np.full((len(series), dim), np.nan, np.float32)
    present = series.is_not_null().to_numpy()
    flat = series.drop_nulls().explode().cast(pl.Float32).to_numpy()
    out[present] = flat.reshape(-1, dim)
    return out


def _first_value(series: pl.Series) -> tuple[Int, npt.NDArray[np.bool_]]:
    first = series.list.first() if isinstance(series.dtype, pl.List) else series
    return _integers(first), first.is_not_null().to_numpy()


def historical_columns(features: list[Feature]) -> list[int]:
    """Positions of the historical features in their block."""
    return [i for i, feature in enumerate(features) if feature.group is Group.HISTORICAL]


def absent_history(features: list[Feature]) -> tuple[list[int], Float]:
    """Positions of the historical features in their block, and what they hold for an entity without history."""
    columns = historical_columns(features)
    return columns, np.array([features[i].missing for i in columns], np.float32)
