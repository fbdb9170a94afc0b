"""Training days split by user into row groups of bounded size, which a stream reads in any order.

shards/<day>-<key>/users.parquet, items.parquet, rows.parquet  row group n of each is shard n: a frame of its own
                  /shards.json                                what each shard holds, so that planning reads no data

A user's day is in one shard. An item is in every shard whose impressions point at it; ``first`` marks one of them.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from freshrank.datasets.dataset import Dataset
from freshrank.features.frames import TABLES, Builder, Frame, FramePart, filter_frame, frame_path
from freshrank.schema import IN_TRAINING, ITEM_AGE, ITEM_ID, USAGE, USER_ID, Schema
from freshrank.storage.derived import build_unless_current, fingerprint_of
from freshrank.storage.files import read_json, write_json
from freshrank.storage.workspace import Workspace

log = logging.getLogger(__name__)
DESCRIPTION = "shards.json"
FIRST = "first"
ROWS_AT_ONCE = 500_000
"""Impressions of a day that are made of one pass over its log, in whole shards: what bounds memory while it is cut."""


@dataclass(frozen=True)
class Shard:
    """One row group of a day, and what it holds."""

    directory: Path
    number: int
    rows: int
    user_days: int
    cold: int
    """Rows of items younger than the schema's ``fresh_days``."""
    positives: dict[str, int]
    """By action."""

    def read(self) -> FramePart:
        users, items, rows = (self._table(table) for table in TABLES)
        return FramePart(Frame(users, items.drop(FIRST), rows), items[FIRST].to_numpy())

    def frame(self, columns: Mapping[str, Sequence[str]]) -> Frame:
        """The named columns of each table."""
        users, items, rows = (self._table(table, columns[table]) for table in TABLES)
        return Frame(users, items, rows)

    def _table(self, name: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
        return _row_group(self.directory / f"{name}.parquet", self.number, columns)


def training_shards(dataset: Dataset, workspace: Workspace, days: Sequence[date], shard_rows: int) -> list[Shard]:
    """Shards of the training rows of ``days``, about ``shard_rows`` impressions each; cut where they are missing.

    Cutting holds :data:`ROWS_AT_ONCE` of them at a time, whatever the size of a day. A user with more than
    ``shard_rows`` impressions a day makes a larger shard.

    Raises:
        MissingArtifact: the snapshots of ``days`` have not been built.
    """
    directories = {day: shards_directory(dataset, workspace, day, shard_rows) for day in days}
    missing = sorted(day for day, directory in directories.items() if not directory.is_dir())
    if missing:
        builder = Builder(dataset, workspace, missing)
        for day in missing:
            _cut(builder, day, directories[day], shard_rows)
    return [shard for directory in directories.values() for shard in read_shards(directory)]


def training_rows(dataset: Dataset, days: Sequence[date]) -> int:
    """Impressions of ``days`` that are trained on."""
    return int(_trained_on(dataset, days).select(pl.len()).collect().item())


def _trained_on(dataset: Dataset, days: Sequence[date]) -> pl.LazyFrame:
    return dataset.impressions(list(days)).filter(pl.col(USAGE).is_in([usage.value for usage in IN_TRAINING]))


def shards_directory(dataset: Dataset, workspace: Workspace, day: date, shard_rows: int) -> Path:
    key = fingerprint_of({"frame": frame_path(dataset, workspace, day).name, "rows": shard_rows}, _cut)
    return workspace.shards / f"{day.isoformat()}-{key}"


def _cut(builder: Builder, day: date, directory: Path, shard_rows: int) -> None:
    parts = max(1, -(-training_rows(builder.dataset, [day]) // shard_rows))
    log.info("cutting %s into %d shards", day, parts)
    frames = _frames(builder, day, parts, shard_rows)
    build_unless_current(directory, partial(write_shards, frames, builder.dataset.schema))


def read_shards(directory: Path) -> list[Shard]:
    return [Shard(directory, **facts) for facts in read_json(directory / DESCRIPTION)]


def _frames(builder: Builder, day: date, parts: int, shard_rows: int) -> Iterator[Frame]:
    """Frames of the training rows of ``day`` by part of the users."""
    trained = pl.col(USAGE).is_in([usage.value for usage in IN_TRAINING])
    step = max(1, ROWS_AT_ONCE // shard_rows)
    for start in range(0, parts, step):
        together = range(start, min(start + step, parts))
        frame = builder.build(day, user_part(parts).is_between(together.start, together.stop - 1))
        yield from (filter_frame(frame, trained & (user_part(parts) == part)) for part in together)


def user_part(parts: int) -> pl.Expr:
    """Which of ``parts`` a row's ``user_id`` belongs to: Fibonacci hashing, the same on every machine and day."""
    mixed = pl.col(USER_ID).cast(pl.UInt64, wrap_numerical=True) * pl.lit(0x9E3779B97F4A7C15, pl.UInt64)  # wraps
    return mixed // 2**32 % parts


def write_shards(frames: Iterable[Frame], schema: Schema, directory: Path) -> None:
    """One shard per frame of the same day that has rows, into ``directory``."""
    facts: list[dict[str, object]] = []
    seen = np.zeros(0, np.int64)
    with ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}
        for frame in filter(lambda frame: len(frame.rows), frames):  # a hash may give some part no user
            ids = frame.items[ITEM_ID].to_numpy()
            tables = dict(
                zip(
                    TABLES,
                    (frame.users, frame.items.with_columns(pl.Series(FIRST, ~np.isin(ids, seen))), frame.rows),
                    strict=True,
                )
            )
            seen = np.union1d(seen, ids)
            for name, table in tables.items():
                arrow = table.to_arrow()
                if name not in writers:
                    path = directory / f"{name}.parquet"
                    # Half the time to read of zstd, for a quarter more disk.
                    writers[name] = stack.enter_context(pq.ParquetWriter(path, arrow.schema, compression="lz4"))
                writers[name].write_table(arrow, row_group_size=len(arrow))
            facts.append(_facts(frame, schema, len(facts)))
    write_json(directory / DESCRIPTION, facts)


def _facts(frame: Frame, schema: Schema, number: int) -> dict[str, object]:
    return {
        "number": number,
        "rows": len(frame.rows),
        "user_days": len(frame.users),
        "cold": int((frame.rows[ITEM_AGE] < schema.fresh_days).sum()),
        "positives": {action: int(frame.rows[action].sum()) for action in schema.actions},
    }


def _row_group(path: Path, number: int, columns: Sequence[str] | None) -> pl.DataFrame:
    with pq.ParquetFile(path, memory_map=False) as file:
        table: pa.Table = file.read_row_group(number, columns, use_threads=False)  # the cores are training's
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
