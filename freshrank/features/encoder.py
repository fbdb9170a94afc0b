"""Frames -> arrays: the one definition of model inputs that training, export and serving share.

Every feature has a place in a block; a missing value is index 0 (categorical), NaN (numeric, embedding) or
padding (sequences), so any frame, however incomplete, encodes to finite-scoring inputs (cold-complete).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from freshrank.features.columns import Bool, Columns, Float, Int, Layout, integers
from freshrank.features.frames import ITEM_ROW, USER_ROW, Frame, FramePart
from freshrank.features.vocabulary import (
    MISSING,
    NEW,
    NumericStatistics,
    Vocabulary,
    summed_counts,
    table_rows,
    value_counts,
)
from freshrank.schema import (
    ITEM_AGE,
    ITEM_ID,
    QUERY_ITEM_ID,
    SEQUENCE_ACTIONS,
    SEQUENCE_ITEMS,
    Entity,
    Feature,
    FeatureGroup,
    Kind,
    Schema,
    affinity_crosses,
    affinity_lists,
)
from freshrank.storage.files import atomic_write, read_json, write_json

Blocks = dict[str, npt.NDArray[Any]]
_ENTITIES = (Entity.USER, Entity.ITEM, Entity.ROW)


@dataclass(frozen=True)
class Encoder:
    """Fitted on a training frame; :meth:`users`, :meth:`items` and :meth:`rows` encode any frame alike."""

    schema: Schema
    vocabularies: dict[str, Vocabulary]
    statistics: dict[Entity, NumericStatistics]

    @classmethod
    def fit(cls, frame: Frame, schema: Schema, min_count: int) -> "Encoder":
        """Fit vocabularies and numeric statistics on the training rows only."""
        return cls.fit_parts([FramePart.whole(frame)], schema, min_count)

    @classmethod
    def fit_parts(cls, parts: Iterable[FramePart], schema: Schema, min_count: int) -> "Encoder":
        """:meth:`fit` on a frame that comes in parts, in one pass that holds one part and a count per value.

        Vocabularies are those of the whole frame; statistics differ from its by rounding (float64, kept as float32).
        """
        reader, counts = cls(schema, {}, {}), _Counts(schema)
        moments = {e: _Moments.of(np.zeros((0, len(reader.numeric(e))), np.float32)) for e in _ENTITIES}
        for part in parts:
            counts.add(part)
            for entity, block in reader._numeric_blocks(part).items():
                moments[entity] = moments[entity].joined(_Moments.of(transformed(block, reader.numeric(entity))))
        return cls(schema, counts.vocabularies(min_count), {e: m.statistics() for e, m in moments.items()})

    def _numeric_blocks(self, part: FramePart) -> dict[Entity, Float]:
        frame, items = part.frame, part.frame.items.filter(part.first)
        numeric = {
            Entity.USER: Columns.of(frame.users, Layout.of(self.numeric(Entity.USER))).arrays.get(Kind.NUMERIC),
            Entity.ITEM: Columns.of(items, Layout.of(self.numeric(Entity.ITEM))).arrays.get(Kind.NUMERIC),
            Entity.ROW: self._row_numeric(self._rows(frame)),
        }
        return {entity: block for entity, block in numeric.items() if block is not None}

    @cached_property
    def _selected(self) -> dict[Entity, dict[Kind, list[Feature]]]:
        return {entity: Layout.of(self.schema.select(entity)).kinds for entity in _ENTITIES}

    def numeric(self, entity: Entity) -> list[Feature]:
        return self._selected[entity].get(Kind.NUMERIC, [])

    def categorical(self, entity: Entity) -> list[Feature]:
        return self._selected[entity].get(Kind.CATEGORICAL, [])

    def multi_valued(self, entity: Entity) -> list[Feature]:
        return self._selected[entity].get(Kind.MULTI_VALUED, [])

    def embedding(self, entity: Entity) -> list[Feature]:
        return self._selected[entity].get(Kind.EMBEDDING, [])

    @cached_property
    def layouts(self) -> dict[Entity, Layout]:
        """What of each entity is read; crosses are computed from users and items."""
        return layouts(self.schema)

    @cached_property
    def columns(self) -> dict[str, list[str]]:
        """Columns of each table of a frame that training reads."""
        named = {entity: [feature.name for feature in layout.features] for entity, layout in self.layouts.items()}
        query = [QUERY_ITEM_ID] if self.schema.has_query else []
        others = [USER_ROW, ITEM_ROW, *query, *self.schema.actions, ITEM_AGE]
        return {
            "users": named[Entity.USER],
            "items": [ITEM_ID, *named[Entity.ITEM]],
            "rows": list(dict.fromkeys(others + named[Entity.ROW])),
        }

    def users_without_sequences(self, frame: Frame) -> Blocks:
        """Blocks with leading dimension U (rows of ``frame.users``)."""
        features = [f for f in self.layouts[Entity.USER].features if f.kind is not Kind.SEQUENCE]
        return self._entity(Entity.USER, Columns.of(frame.users, Layout.of(features)))

    def sequences(self, users: Columns, catalog: "Catalog") -> Blocks:
        """``sequence_items`` [U, L], ``sequence_actions`` [U, L] (bitmask + 1, 0 = padding), ``sequence_categorical``
        [U, L, C]."""
        places, actions = self._sequence_places(users, catalog)
        blocks = {"sequence_items": catalog.item_id[places], "sequence_actions": actions}
        if self.categorical(Entity.ITEM):
            blocks["sequence_categorical"] = catalog.categorical[places]
        return blocks

    def sequence_places(self, users: pl.DataFrame, catalog: "Catalog") -> tuple[Int, Int]:
        """Rows of ``catalog`` and action codes of each user's sequence, [U, L] each, newest last."""
        sequence_features = [
            f for f in self.layouts[Entity.USER].features if f.name in (SEQUENCE_ITEMS, SEQUENCE_ACTIONS)
        ]
        return self._sequence_places(Columns.of(users, Layout.of(sequence_features)), catalog)

    def _sequence_places(self, users: Columns, catalog: "Catalog") -> tuple[Int, Int]:
        present = users.present(SEQUENCE_ITEMS)
        limit = 2 ** len(self.schema.actions) - 1
        codes = np.where(present, np.clip(users.values(SEQUENCE_ACTIONS), 0, limit) + 1, 0)
        return catalog.places(users.values(SEQUENCE_ITEMS), present), codes

    def items(self, frame: Frame) -> Blocks:
        """Blocks with leading dimension I (rows of ``frame.items``)."""
        return self.item_blocks(frame.items)

    def item_blocks(self, items: pl.DataFrame) -> Blocks:
        """:meth:`items` of a frame's table of items."""
        return self._items(integers(items[ITEM_ID]), Columns.of(items, self.layouts[Entity.ITEM]))

    def _items(self, ids: Int, items: Columns) -> Blocks:
        known = np.ones(len(ids), np.bool_)
        return {"item_id": self.vocabularies[ITEM_ID].encode(ids, known)} | self._entity(Entity.ITEM, items)

    def rows(self, frame: Frame, catalog: "Catalog") -> Blocks:
        """Blocks with leading dimension N (rows of ``frame.rows``)."""
        return self._row_blocks(self._rows(frame), catalog)

    def _rows(self, frame: Frame) -> "CandidatePairs":
        crossed = [name for column in self.schema.history.affinity for name in self._affinity_lists(column)]
        users = [f for f in self.layouts[Entity.USER].features if f.name in crossed]
        items = [f for f in self.layouts[Entity.ITEM].features if f.name in self.schema.history.affinity]
        query = frame.rows[QUERY_ITEM_ID] if self.schema.has_query else None
        return CandidatePairs(
            users=Columns.of(frame.users, Layout.of(users)),
            items=Columns.of(frame.items, Layout.of(items)),
            rows=Columns.of(frame.rows, self.layouts[Entity.ROW]),
            user_row=frame.rows["user_row"].to_numpy(),
            item_row=frame.rows["item_row"].to_numpy(),
            query=None if query is None else (integers(query), query.is_not_null().to_numpy()),
        )

    def _row_blocks(self, rows: "CandidatePairs", catalog: "Catalog") -> Blocks:
        blocks = self._entity(Entity.ROW, rows.rows, numeric=self._row_numeric(rows))
        if rows.query is not None:
            places = catalog.places(*rows.query)
            blocks |= {"query_item_id": catalog.item_id[places]}
            if self.categorical(Entity.ITEM):
                blocks["query_categorical"] = catalog.categorical[places]
        return blocks

    def inputs(self, frame: Frame, catalog: "Catalog") -> Blocks:
        """What the ranker takes: user blocks [U, ..], candidate blocks [N, ..] and ``user_index`` [N]."""
        rows = self._rows(frame)
        users, items = (
            Columns.of(table, self.layouts[entity])
            for table, entity in ((frame.users, Entity.USER), (frame.items, Entity.ITEM))
        )
        return self.encode(replace(rows, users=users, items=items), integers(frame.items[ITEM_ID]), catalog)

    def encode(self, rows: "CandidatePairs", item_ids: Int, catalog: "Catalog") -> Blocks:
        """:meth:`inputs` of features that were read already; ``item_ids`` [I] of ``rows.items``."""
        items = {name: block[rows.item_row] for name, block in self._items(item_ids, rows.items).items()}
        users = self._entity(Entity.USER, rows.users) | self.sequences(rows.users, catalog)
        index = {"user_index": rows.user_row.astype(np.int64)}
        return users | items | self._row_blocks(rows, catalog) | index

    def _entity(self, entity: Entity, columns: Columns, numeric: Float | None = None) -> Blocks:
        blocks: Blocks = {}
        if features := self.categorical(entity):
            blocks[f"{entity}_categorical"] = np.stack([self.encoded(columns, f) for f in features], axis=1)
        if features := self.multi_valued(entity):
            blocks[f"{entity}_multi"] = np.concatenate([self.encoded(columns, f) for f in features], axis=1)
        if self.numeric(entity):
            blocks[f"{entity}_numeric"] = columns.arrays[Kind.NUMERIC] if numeric is None else numeric
        if self.embedding(entity):
            blocks[f"{entity}_embedding"] = columns.arrays[Kind.EMBEDDING]
        return blocks

    def encoded(self, columns: Columns, feature: Feature) -> Int:
        values, present = columns.values(feature.name), columns.present(feature.name)
        return self.vocabularies[feature.name].encode(values, present)

    def _row_numeric(self, rows: "CandidatePairs") -> Float:
        crosses = [self._affinity(column, rows) for column in self.schema.history.affinity]
        return np.concatenate([rows.rows.arrays[Kind.NUMERIC], *crosses], axis=1)

    def _affinity(self, column: str, rows: "CandidatePairs") -> Float:
        """What the user did with the candidate's category: impressions, then a rate per action, [N, 1 + A]."""
        values, *counts = self._affinity_lists(column)
        category, known = _first_value(rows.items, column)
        seen = rows.users.values(values)[rows.user_row] == category[rows.item_row, None]
        match = seen & rows.users.present(values)[rows.user_row] & known[rows.item_row, None]
        place = match.argmax(axis=1)  # a user's list names a category once
        matched = match[np.arange(len(place)), place]
        sums = [
            np.where(matched, rows.users.values(name)[rows.user_row, place], 0).astype(np.float32) for name in counts
        ]
        impressions, *positives = sums
        some = impressions > 0
        rates = [np.divide(p, impressions, out=np.full_like(p, np.nan), where=some) for p in positives]
        return np.stack([impressions, *rates], axis=1)

    def _affinity_lists(self, column: str) -> list[str]:
        return affinity_lists(column, self.schema.actions)

    def without_siblings(self) -> "Encoder":
        """The encoder of the same frame for a ranker that does not read sibling rates."""
        schema = self.schema.without_siblings()
        names = {feature.name for feature in schema.select(Entity.ITEM, Kind.NUMERIC)}
        columns = [place for place, feature in enumerate(self.numeric(Entity.ITEM)) if feature.name in names]
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
class CandidatePairs:
    """N (user, candidate) pairs as they are encoded: ``user_row`` and ``item_row`` [N] point at rows of ``users`` and
    ``items``; ``query`` is the raw item id of each pair's query [N] and whether there is one."""

    users: Columns
    items: Columns
    rows: Columns
    user_row: npt.NDArray[Any]
    item_row: npt.NDArray[Any]
    query: tuple[Int, Bool] | None


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
        content = Columns.of(items, Layout.of(encoder.categorical(Entity.ITEM)))
        return cls.of(integers(items[ITEM_ID]), content, encoder)

    @classmethod
    def of(cls, ids: Int, items: Columns, encoder: Encoder) -> "Catalog":
        """From the features of items with ascending ``ids`` [I], the categorical ones at least."""
        item_id = encoder.vocabularies[ITEM_ID].encode(ids, np.ones(len(ids), np.bool_))
        columns = [encoder.encoded(items, feature) for feature in encoder.categorical(Entity.ITEM)]
        categorical = np.stack(columns, axis=1) if columns else np.zeros((len(ids), 0), np.int64)
        unknown = np.full((1, categorical.shape[1]), NEW)
        return cls(
            ids=ids,
            item_id=np.concatenate([[MISSING, NEW], item_id]),
            categorical=np.concatenate([np.zeros_like(unknown), unknown, categorical]),
        )

    def places(self, values: Int, present: npt.NDArray[np.bool_]) -> Int:
        """Catalog row of each raw item id; any shape."""
        return table_rows(self.ids, values, present)


def transformed(block: Float, features: list[Feature]) -> Float:
    """Apply each feature's declared transform; NaN stays NaN."""
    logs = np.array([f.transform == "log1p" for f in features], dtype=bool)
    signed = np.sign(block) * np.log1p(np.abs(block))
    return np.where(logs, signed, block).astype(np.float32)


class _Counts:
    """How often each value of each vocabulary was seen."""

    def __init__(self, schema: Schema) -> None:
        kinds = (Kind.CATEGORICAL, Kind.MULTI_VALUED)
        self.entities = {ITEM_ID: Entity.ITEM} | {f.name: f.entity for f in schema.features() if f.kind in kinds}
        self.seen: dict[str, pl.DataFrame] = {}

    def add(self, part: FramePart) -> None:
        frame = part.frame
        item_counts = np.bincount(frame.rows["item_row"].to_numpy(), minlength=len(frame.items))
        tables = {
            Entity.USER: (frame.users, None),
            Entity.ITEM: (frame.items, item_counts),
            Entity.ROW: (frame.rows, None),
        }
        for name, entity in self.entities.items():
            table, counts = tables[entity]
            counted = value_counts(table[name], counts)
            self.seen[name] = summed_counts(pl.concat([self.seen[name], counted])) if name in self.seen else counted

    def vocabularies(self, min_count: int) -> dict[str, Vocabulary]:
        return {name: Vocabulary.of(self.seen[name], min_count) for name in self.entities}


@dataclass(frozen=True)
class _Moments:
    """Count, mean and summed squared deviation of each column's finite values, float64 [columns] each.

    Ours, because scikit-learn's running variance is NaN ever after a part in which a column has no value.
    """

    count: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]

    @classmethod
    def of(cls, block: Float) -> "_Moments":
        values = block.astype(np.float64)
        seen = np.isfinite(values)
        count = seen.sum(axis=0).astype(np.float64)
        mean = np.where(seen, values, 0).sum(axis=0) / np.maximum(count, 1)
        return cls(count, mean, np.where(seen, (values - mean) ** 2, 0).sum(axis=0))

    def joined(self, other: "_Moments") -> "_Moments":
        """Of both sets of values (Chan et al. 1983)."""
        count = self.count + other.count
        share, difference = other.count / np.maximum(count, 1), other.mean - self.mean
        mean = self.mean + difference * share
        return _Moments(count, mean, self.deviation + other.deviation + difference**2 * self.count * share)

    def statistics(self) -> NumericStatistics:
        """0 and 1 for a column without a value, 1 for the deviation of a constant one."""
        variance = self.deviation / np.maximum(self.count, 1)
        std = np.where(variance > 1e-12, np.sqrt(variance), 1.0)
        return NumericStatistics(self.mean.astype(np.float32), std.astype(np.float32))


def _first_value(items: Columns, name: str) -> tuple[Int, Bool]:
    values, present = items.values(name), items.present(name)
    return (values, present) if values.ndim == 1 else (values[:, 0], present[:, 0])


def layouts(schema: Schema) -> dict[Entity, Layout]:
    """Stored features by entity: all but the user-item crosses."""
    crosses = {name for column in schema.history.affinity for name in affinity_crosses(column, schema.actions)}
    return {e: Layout.of(f for f in schema.select(e) if f.name not in crosses) for e in _ENTITIES}


def historical_columns(features: list[Feature]) -> list[int]:
    """Positions of the historical features in their block."""
    return [i for i, feature in enumerate(features) if feature.group is FeatureGroup.HISTORICAL]


def absent_history(features: list[Feature]) -> tuple[list[int], Float]:
    """Positions of the historical features in their block, and what they hold for an entity without history."""
    columns = historical_columns(features)
    return columns, np.array([features[i].missing for i in columns], np.float32)
