"""A log small enough to count by hand, written as a dataset, for the tests of history, store and frames."""

import tempfile
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.writer import write_dataset
from freshrank.features.daily_aggregates import KEYS
from freshrank.features.snapshots import build_history, snapshot_path
from freshrank.schema import Entity, HistoryConfig, Schema
from freshrank.storage.workspace import Workspace

FIRST = date(2024, 3, 1)
OFFSET_HOURS = 2
UTC_TIMESTAMP = pl.Datetime("us", "UTC")


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def at(number: int, hour: float = 12) -> datetime:
    """The instant ``hour`` hours into local day ``number``."""
    midnight = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC) - timedelta(hours=OFFSET_HOURS)
    return midnight + timedelta(days=number, hours=hour)


def log_schema() -> Schema:
    return Schema.model_validate(
        {
            "name": "tiny_log",
            "utc_offset_hours": OFFSET_HOURS,
            "impressions": {
                "request_id": {"role": "key"},
                "event_timestamp": {"role": "time"},
                "user_id": {"role": "key"},
                "item_id": {"role": "key"},
                "click": {"role": "action"},
                "save": {"role": "action"},
                "surface": {"role": "context", "kind": "categorical"},
            },
            "items": {
                "item_id": {"role": "key"},
                "created_at": {"role": "time"},
                "category": {"role": "content", "kind": "categorical"},
                "tags": {"role": "content", "kind": "multi_valued", "max_values": 2},
                "duration": {"role": "content", "kind": "numeric"},
                "vector": {"role": "content", "kind": "embedding", "dim": 2},
            },
            "users": {
                "user_id": {"role": "key"},
                "country": {"role": "profile", "kind": "categorical"},
                "age": {"role": "profile", "kind": "numeric"},
            },
            "history": HistoryConfig(windows=(1, 3), sequence_length=3, affinity=("category", "tags"), affinity_size=2),
        }
    )


def impression(
    number: int, user: int, item: int, click: int | None = 0, save: int | None = 0, hour: float = 12, usage: str = "all"
) -> dict[str, Any]:
    return {
        "event_timestamp": at(number, hour),
        "user_id": user,
        "item_id": item,
        "click": click,
        "save": save,
        "surface": 1,
        "usage": usage,
    }


ITEMS = pl.DataFrame(
    {
        "item_id": [1, 2, 3, 4, 5, 6],
        "created_at": [at(-30), at(-30), at(-10), at(-1), at(-1), at(3, 6)],
        "category": [10, 10, 20, None, 20, 30],
        "tags": [[7, 8], [8], [], None, [9], [7]],
        "duration": [0.0, 2.5, None, 4.0, 5.0, 6.0],
        "vector": [[0.0, 1.0], [0.5, 0.25], None, [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]],
    },
    schema={
        "item_id": pl.Int64,
        "created_at": UTC_TIMESTAMP,
        "category": pl.Int64,
        "tags": pl.List(pl.Int64),
        "duration": pl.Float64,
        "vector": pl.List(pl.Float64),
    },
)
USERS = pl.DataFrame({"user_id": [1, 2, 3, 4], "country": [5, None, 6, 5], "age": [0.0, 30.0, None, 41.5]})


def write_log(
    out: Path, impressions: Sequence[dict[str, Any]], schema: Schema | None = None, items: pl.DataFrame = ITEMS
) -> Dataset:
    actions = {"click": pl.Int8, "save": pl.Int8}
    log = pl.DataFrame(list(impressions), schema_overrides={"event_timestamp": UTC_TIMESTAMP, **actions})
    log = log.with_row_index("request_id").cast({"request_id": pl.Int64})
    return write_dataset(out, schema or log_schema(), log, items, USERS, {"adapter": "test"})


def snapshots_of(dataset: Dataset, days: Sequence[date]) -> dict[date, dict[Entity, pl.DataFrame]]:
    """The snapshots of ``days`` as a workspace of their own holds them."""
    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace.of(dataset.schema.name, Path(home))
        build_history(dataset, workspace, days)
        return {on: read_snapshots(workspace, on) for on in days}


def read_snapshots(workspace: Workspace, on: date) -> dict[Entity, pl.DataFrame]:
    return {e: pl.read_parquet(snapshot_path(workspace, e, on), hive_partitioning=False) for e in KEYS}
