"""A log of four impressions over two days that uses every kind of column, and ways to break it."""

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.writer import write_dataset
from freshrank.schema import Schema

SCHEMA = Schema.model_validate(
    {
        "name": "shop",
        "impressions": {
            "request_id": {"role": "key"},
            "event_timestamp": {"role": "time"},
            "user_id": {"role": "key"},
            "item_id": {"role": "key"},
            "query_item_id": {"role": "key"},
            "click": {"role": "action"},
            "device": {"role": "context", "kind": "categorical"},
        },
        "items": {
            "item_id": {"role": "key"},
            "created_at": {"role": "time"},
            "brand": {"role": "content", "kind": "categorical"},
            "tags": {"role": "content", "kind": "multi_valued", "max_values": 2},
            "title": {"role": "content", "kind": "text"},
            "price": {"role": "content", "kind": "numeric"},
            "vector": {"role": "content", "kind": "embedding", "dim": 2},
        },
        "users": {"user_id": {"role": "key"}, "age": {"role": "profile", "kind": "numeric"}},
    }
)


def at(day: int, hour: int = 12) -> datetime:
    return datetime(2024, 3, day, hour, tzinfo=UTC)


@dataclass(frozen=True)
class Tables:
    impressions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame

    def breaking(self, table: str, *expressions: pl.Expr, **columns: Any) -> "Tables":
        """A copy in which ``columns`` of ``table`` are replaced (a list is a whole column)."""
        series = [pl.Series(name, v) for name, v in columns.items()]
        return replace(self, **{table: getattr(self, table).with_columns(*expressions, *series)})

    def write(
        self,
        out: Path,
        schema: Schema = SCHEMA,
        allow_unknown_items: bool = False,
        add: bool = False,
        replace_days: bool = False,
    ) -> Dataset:
        tables, source = (self.impressions, self.items, self.users), {"adapter": "test"}
        return write_dataset(out, schema, *tables, source, allow_unknown_items, add, replace_days)


def shop() -> Tables:
    """Users ann and bob; items cup, pan, pot; day 1 holds three impressions, day 2 one."""
    impressions = pl.DataFrame(
        {
            "request_id": ["r1", "r1", "r2", "r3"],
            "event_timestamp": [at(1, 9), at(1, 9), at(1, 8), at(2, 7)],
            "user_id": ["bob", "bob", "ann", "ann"],
            "item_id": ["pot", "cup", "pan", "cup"],
            "query_item_id": ["cup", None, None, "pan"],
            "click": [1, 0, None, 1],
            "device": ["web", "web", "app", None],
        }
    )
    items = pl.DataFrame(
        {
            "item_id": ["cup", "pan", "pot"],
            "created_at": [at(1, 0), at(1, 0), at(1, 1)],
            "brand": ["b", "a", None],
            "tags": ["red|hot", "red, cold,old", None],
            "title": ["A Cup, a cup!", "pan", None],
            "price": [1.5, float("nan"), None],
            "vector": [[0.5, 1.0], [float("nan"), 0.0], None],
        }
    )
    return Tables(impressions, items, pl.DataFrame({"user_id": ["bob", "ann"], "age": [30, 40]}))


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file, by its path under ``directory``."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
