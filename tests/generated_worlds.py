"""Worlds of any schema: hypothesis draws the columns of every table, a tiny log, and which values are missing."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import strategies as st

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.writer import write_dataset
from freshrank.schema import QUERY_ITEM_ID, Kind, Role, Schema

DAYS = 3
START = datetime(2024, 3, 1, tzinfo=UTC)
ITEMS, USERS = [1, 2, 3, 4, 5], [1, 2, 3]
UNKNOWN = 900
"""Ids from here on are in the log and in no table."""
_UTC = pl.Datetime("us", "UTC")
_DTYPES = {
    Kind.CATEGORICAL: pl.Int64(),
    Kind.NUMERIC: pl.Float64(),
    Kind.MULTI_VALUED: pl.List(pl.Int64),
    Kind.TEXT: pl.String(),
    Kind.EMBEDDING: pl.List(pl.Float64),
}
_ALL, _SCALAR = list(_DTYPES), [Kind.CATEGORICAL, Kind.NUMERIC]
_FILLED = st.sampled_from(["full", "some", "none"])


@dataclass(frozen=True)
class GeneratedWorld:
    """What :func:`write_dataset` takes."""

    schema: Schema
    impressions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame

    def write(self, out: Path) -> Dataset:
        source = {"adapter": "test"}
        return write_dataset(
            out, self.schema, self.impressions, self.items, self.users, source, allow_unknown_items=True
        )


@st.composite
def _columns(draw: st.DrawFn, prefix: str, role: Role, kinds: list[Kind]) -> dict[str, dict[str, Any]]:
    drawn = draw(st.lists(st.sampled_from(kinds), max_size=4))
    return {f"{prefix}{place}": draw(_column(role, kind)) for place, kind in enumerate(drawn)}


@st.composite
def _column(draw: st.DrawFn, role: Role, kind: Kind) -> dict[str, Any]:
    column: dict[str, Any] = {"role": role, "kind": kind}
    if kind is Kind.NUMERIC:
        column |= {"transform": draw(st.sampled_from(["none", "log1p"])), "default": draw(st.sampled_from([None, 0.5]))}
    if kind is Kind.EMBEDDING:
        column |= {"dim": draw(st.integers(1, 3))}
    if kind in (Kind.MULTI_VALUED, Kind.TEXT):
        column |= {"max_values": draw(st.integers(1, 3))}
    return column


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Any mix of kinds, none included; with or without affinities, siblings and a query item."""
    items = draw(_columns("content", Role.CONTENT, _ALL))
    categories = [name for name, c in items.items() if c["kind"] in (Kind.CATEGORICAL, Kind.MULTI_VALUED)]
    alike = [*categories, *(name for name, c in items.items() if c["kind"] is Kind.NUMERIC)]
    pairs = [f"{one}+{other}" for one in alike for other in alike if one < other]
    key, time = {"role": "key"}, {"role": "time"}
    query = {QUERY_ITEM_ID: key} if draw(st.booleans()) else {}
    actions = {f"action{number}": {"role": "action"} for number in range(draw(st.integers(1, 3)))}
    context = draw(_columns("context", Role.CONTEXT, _SCALAR))
    history = {
        "windows": draw(st.sampled_from([(1,), (1, 2), (2, 7)])),
        "sequence_length": draw(st.integers(1, 3)),
        "affinity": draw(_some(categories)),
        "affinity_size": draw(st.integers(1, 3)),
        "siblings": draw(_some([*alike, *pairs])),
    }
    return Schema.model_validate(
        {
            "name": "generated",
            "utc_offset_hours": draw(st.sampled_from([0, 8, -3.5])),
            "impressions": {
                "request_id": key,
                "event_timestamp": time,
                "user_id": key,
                "item_id": key,
                **query,
                **actions,
                **context,
            },
            "items": {"item_id": key, "created_at": time, **items},
            "users": {"user_id": key, **draw(_columns("profile", Role.PROFILE, _ALL))},
            "history": history,
        }
    )


def _some(names: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), unique=True, max_size=2) if names else st.just([])


@st.composite
def worlds(draw: st.DrawFn) -> GeneratedWorld:
    """A schema and tables of it, with columns that are full, partly missing or wholly missing, and unknown ids."""
    schema = draw(schemas())
    births = {item: draw(st.integers(-20 * 24, 24 * DAYS - 2)) for item in ITEMS}
    births[ITEMS[0]] = -24
    items = pl.DataFrame(
        {"item_id": ITEMS, "created_at": [_at(births[item], schema) for item in ITEMS]},
        schema={"item_id": pl.Int64, "created_at": _UTC},
    )
    users = pl.DataFrame({"user_id": USERS}, schema={"user_id": pl.Int64})
    log = _log(schema, draw(st.lists(_impressions(births), min_size=6, max_size=14)), draw(_impressions(births)))
    tables = [
        ("items", Role.CONTENT, items),
        ("users", Role.PROFILE, users),
        ("impressions", Role.CONTEXT, log),
        ("impressions", Role.ACTION, log),
    ]
    filled = {(table, role): draw(_values(schema, table, role, len(frame))) for table, role, frame in tables}
    return GeneratedWorld(
        schema,
        log.with_columns(filled["impressions", Role.CONTEXT] + filled["impressions", Role.ACTION]),
        items.with_columns(filled["items", Role.CONTENT]),
        users.with_columns(filled["users", Role.PROFILE]),
    )


def rich_world() -> GeneratedWorld:
    """All that a schema may declare at once, every column with some values and some missing."""
    key, time = {"role": "key"}, {"role": "time"}
    content = {
        "category": {"kind": "categorical"},
        "tags": {"kind": "multi_valued", "max_values": 2},
        "title": {"kind": "text", "max_values": 2},
        "length": {"kind": "numeric", "transform": "log1p"},
        "price": {"kind": "numeric", "default": 0.5},
        "image": {"kind": "embedding", "dim": 2},
    }
    schema = Schema.model_validate(
        {
            "name": "generated",
            "utc_offset_hours": 8,
            "impressions": {
                "request_id": key,
                "event_timestamp": time,
                "user_id": key,
                "item_id": key,
                "query_item_id": key,
                "click": {"role": "action"},
                "save": {"role": "action"},
                "surface": {"role": "context", "kind": "categorical"},
                "battery": {"role": "context", "kind": "numeric"},
            },
            "items": {"item_id": key, "created_at": time, **{n: {"role": "content", **c} for n, c in content.items()}},
            "users": {"user_id": key, **{n: {"role": "profile", **c} for n, c in content.items()}},
            "history": {
                "windows": [1, 2],
                "sequence_length": 2,
                "affinity": ["category", "tags"],
                "affinity_size": 2,
                "siblings": ["category", "category+length"],
            },
        }
    )
    births = [-24, -24, -1, 30, 50]
    items = pl.DataFrame({"item_id": ITEMS, "created_at": [_at(hour, schema) for hour in births]})
    shown = [
        (1, 1, 1, None),
        (2, 1, 2, 1),
        (3, 2, UNKNOWN, None),
        (20, 3, 3, 2),
        (26, 1, 3, 1),
        (40, 1, 4, UNKNOWN),
        (41, UNKNOWN, 1, 4),
        (49, 1, 1, 3),
        (50, 1, 5, None),
        (51, 2, UNKNOWN, 5),
        (60, 3, 3, UNKNOWN),
        (70, UNKNOWN, 2, 1),
        (71, 1, 4, 4),
    ]
    count = len(shown)
    log = pl.DataFrame(
        {
            "request_id": range(count),
            "event_timestamp": [_at(hour, schema) for hour, *_ in shown],
            **{
                name: [row[place] for row in shown]
                for place, name in enumerate(("user_id", "item_id", QUERY_ITEM_ID), 1)
            },
            "click": pl.Series([None if row % 5 == 4 else row % 2 for row in range(count)], dtype=pl.Int8),
            "save": pl.Series([None if row % 3 == 2 else int(row % 4 == 0) for row in range(count)], dtype=pl.Int8),
            "surface": [None if row % 3 == 1 else row % 4 for row in range(count)],
            "battery": [None if row % 4 == 3 else row / 7 for row in range(count)],
        }
    )
    values: dict[str, list[Any]] = {
        "category": [3, None, 3, 0, 3],
        "tags": [[1, 2, 3], [], None, [2], [1]],
        "title": ["a b c", None, "", "b", "a"],
        "length": [0.0, 7.5, None, 1e6, 6.0],
        "price": [None, 1.0, -2.5, None, 0.0],
        "image": [[0.5, -1.0], None, [1.0, 1.0], [0.25, 3.0], None],
    }
    filled = {name: pl.Series(name, column) for name, column in values.items()}
    users = pl.DataFrame({"user_id": USERS, **{name: column.head(len(USERS)) for name, column in filled.items()}})
    return GeneratedWorld(schema, log, items.with_columns(**filled), users)


def _at(hour: float, schema: Schema) -> datetime:
    """``hour`` hours into the first local day."""
    return START + timedelta(hours=hour - schema.utc_offset_hours)


@st.composite
def _impressions(draw: st.DrawFn, births: dict[int, int]) -> dict[str, int | None]:
    hour = draw(st.integers(0, 24 * DAYS - 1))
    shown = [*(item for item, born in births.items() if born <= hour), UNKNOWN, UNKNOWN + 1]
    query = draw(st.sampled_from([None, *shown]))
    return {
        "hour": hour,
        "item_id": draw(st.sampled_from(shown)),
        "query_item_id": query,
        "user_id": draw(st.sampled_from([*USERS, UNKNOWN])),
    }


def _log(schema: Schema, rows: list[dict[str, Any]], first: dict[str, Any]) -> pl.DataFrame:
    """With at least one impression on the first and on the last day: there is something to fit and to ask for."""
    old = first | {"item_id": ITEMS[0], "query_item_id": None}
    rows = [*rows, old | {"hour": 1}, old | {"hour": 24 * DAYS - 1}]
    keys = ["user_id", "item_id", *([QUERY_ITEM_ID] if schema.has_query else [])]
    table = {"event_timestamp": pl.Series([_at(row["hour"], schema) for row in rows], dtype=_UTC)}
    table |= {key: pl.Series([row[key] for row in rows], dtype=pl.Int64) for key in keys}
    return pl.DataFrame({"request_id": range(len(rows)), **table})


@st.composite
def _values(draw: st.DrawFn, schema: Schema, table: str, role: Role, count: int) -> list[pl.Series]:
    columns = []
    for name, column in schema.table(table).items():
        if column.role is role:
            strategy = st.integers(0, 1) if role is Role.ACTION else _value(column.kind, column.dim)
            filled = draw(_FILLED)
            values = {"full": strategy, "some": st.none() | strategy, "none": st.none()}[filled]
            dtype = pl.Int8() if role is Role.ACTION else _DTYPES[column.kind or Kind.NUMERIC]
            columns.append(pl.Series(name, draw(st.lists(values, min_size=count, max_size=count)), dtype=dtype))
    return columns


def _value(kind: Kind | None, dim: int | None) -> st.SearchStrategy[Any]:
    number = st.floats(-1e6, 1e6, width=32)
    return {
        Kind.CATEGORICAL: st.integers(0, 3),
        Kind.NUMERIC: number,
        Kind.MULTI_VALUED: st.lists(st.integers(0, 4), max_size=4),
        Kind.TEXT: st.sampled_from(["", "a", "a b", "b c d e"]),
        Kind.EMBEDDING: st.lists(number, min_size=dim or 1, max_size=dim or 1),
    }[kind or Kind.NUMERIC]
