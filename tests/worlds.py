"""Small worlds the tests share: a schema with every kind of column, and random frames that obey it."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl

from freshrank.features.frames import Frame
from freshrank.schema import (
    ITEM_AGE,
    QUERY_ITEM_ID,
    SEQUENCE_ACTIONS,
    SEQUENCE_ITEMS,
    Entity,
    Feature,
    HistoryConfig,
    Kind,
    Schema,
)

DAY = date(2024, 3, 10)


def tiny_schema(query: bool = False) -> Schema:
    """Two actions, and content, profile and context columns of every kind."""
    impressions = {
        "request_id": {"role": "key"},
        "event_timestamp": {"role": "time"},
        "user_id": {"role": "key"},
        "item_id": {"role": "key"},
        "click": {"role": "action", "utility": 1.0},
        "save": {"role": "action", "utility": 2.0},
        "surface": {"role": "context", "kind": "categorical"},
        "hour": {"role": "context", "kind": "numeric"},
    }
    if query:
        impressions[QUERY_ITEM_ID] = {"role": "key"}
    items = {
        "item_id": {"role": "key"},
        "created_at": {"role": "time"},
        "category": {"role": "content", "kind": "categorical"},
        "tags": {"role": "content", "kind": "multi_valued", "max_values": 3},
        "duration": {"role": "content", "kind": "numeric", "transform": "log1p"},
        "vector": {"role": "content", "kind": "embedding", "dim": 4},
    }
    users = {
        "user_id": {"role": "key"},
        "country": {"role": "profile", "kind": "categorical"},
        "band": {"role": "profile", "kind": "categorical"},
        "age": {"role": "profile", "kind": "numeric", "default": 0.0},
    }
    return Schema.model_validate(
        {
            "name": "tiny",
            "fresh_days": 7,
            "impressions": impressions,
            "items": items,
            "users": users,
            "history": HistoryConfig(windows=(1, 7), sequence_length=5, affinity=("category",), affinity_size=4),
        }
    )


def random_frame(schema: Schema, seed: int = 0, users: int = 30, items: int = 40, rows: int = 400) -> Frame:
    """A frame with nulls in every nullable place; a click is likelier for items whose id is even."""
    rng = np.random.default_rng(seed)
    user_table = {"user_id": np.arange(users), "day": [DAY] * users}
    item_table = {"item_id": np.arange(items), "day": [DAY] * items}
    for entity, table, size in ((Entity.USER, user_table, users), (Entity.ITEM, item_table, items)):
        for feature in schema.select(entity, stored=True):
            table[feature.name] = _column(feature, size, items, rng)
    return Frame(pl.DataFrame(user_table), pl.DataFrame(item_table), _rows(schema, rng, users, items, rows))


def _rows(schema: Schema, rng: np.random.Generator, users: int, items: int, rows: int) -> pl.DataFrame:
    user_row, item_row = np.sort(rng.integers(0, users, rows)), rng.integers(0, items, rows)
    start = datetime(DAY.year, DAY.month, DAY.day, tzinfo=UTC)
    click = (rng.random(rows) < np.where(item_row % 2 == 0, 0.7, 0.2)).astype(np.int8)
    table = {
        "user_row": user_row,
        "item_row": item_row,
        "request_id": user_row,
        "event_timestamp": [start + timedelta(seconds=int(s)) for s in np.sort(rng.integers(0, 86400, rows))],
        "day": [DAY] * rows,
        "user_id": user_row,
        "item_id": item_row,
        "click": pl.Series(click, dtype=pl.Int8),
        "save": pl.Series(
            [None if rng.random() < 0.2 else int(rng.random() < 0.3) for _ in range(rows)], dtype=pl.Int8
        ),
        "surface": rng.integers(0, 3, rows),
        "hour": pl.Series(rng.random(rows) * 24, dtype=pl.Float32),
        ITEM_AGE: pl.Series(rng.random(rows) * 20, dtype=pl.Float32),
        "exposures": rng.integers(0, 100, rows),
        "usage": ["all"] * rows,
    }
    if schema.has_query:
        table[QUERY_ITEM_ID] = rng.integers(0, items + 5, rows)
    return pl.DataFrame(table).with_columns(judged_age_days=pl.col(ITEM_AGE))


def _column(feature: Feature, size: int, items: int, rng: np.random.Generator) -> pl.Series:
    if feature.name in (SEQUENCE_ITEMS, SEQUENCE_ACTIONS):
        # The two lists of a user are parallel: lengths depend on the row alone.
        high = items + 3 if feature.name == SEQUENCE_ITEMS else 4
        return pl.Series([rng.integers(1, high, i % (feature.dim + 1)) for i in range(size)], dtype=pl.List(pl.Int64))
    if feature.kind is Kind.SEQUENCE:
        return pl.Series([np.arange(i % feature.dim) for i in range(size)], dtype=pl.List(pl.Int64))
    if feature.kind is Kind.MULTI_VALUED:
        lists = [None if i % 7 == 0 else rng.integers(0, 6, i % 4).tolist() for i in range(size)]
        return pl.Series(lists, dtype=pl.List(pl.Int64))
    if feature.kind is Kind.EMBEDDING:
        vectors = [None if i % 5 == 0 else rng.normal(size=feature.dim).tolist() for i in range(size)]
        return pl.Series(vectors, dtype=pl.List(pl.Float32))
    if feature.kind is Kind.CATEGORICAL:
        # Vocabularies of different sizes: a mixed-up column order then cannot go unnoticed.
        values = 4 + sum(map(ord, feature.name)) % 5
        return pl.Series([None if i % 6 == 0 else int(rng.integers(0, values)) for i in range(size)], dtype=pl.Int64)
    return pl.Series([None if i % 4 == 0 else float(rng.random() * 10) for i in range(size)], dtype=pl.Float32)
