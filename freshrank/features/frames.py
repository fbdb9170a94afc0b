"""Feature store -> frame: the three tables a model is trained, judged or served on.

Users and items are held once per day, impressions point at them. Offline and online frames have the same columns
and dtypes, and for the same day the same numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from freshrank.datasets.dataset import Dataset
from freshrank.dates import day_of
from freshrank.features.daily_aggregates import DAY, aggregate_path, build_daily_aggregates, stale_days
from freshrank.features.hourly import COUNTED, require_hourly, with_counted_hour
from freshrank.features.snapshots import history_fingerprint, require_history
from freshrank.features.store import CREATED_AT_US, FeatureStore, stored_schema
from freshrank.schema import (
    CREATED_AT,
    EVENT_TIMESTAMP,
    ITEM_AGE,
    ITEM_ID,
    JUDGED_CREATED_AT,
    QUERY_ITEM_ID,
    REQUEST_ID,
    USAGE,
    USER_ID,
    Entity,
    Kind,
    Role,
    Schema,
    Usage,
)
from freshrank.storage.derived import build_unless_current, fingerprint_of
from freshrank.storage.workspace import Workspace

USER_ROW, ITEM_ROW = "user_row", "item_row"
JUDGED_AGE = "judged_age_days"
EXPOSURES = "exposures"
_ORDER = [EVENT_TIMESTAMP, USER_ID, ITEM_ID, REQUEST_ID]
_UTC = pl.Datetime("us", "UTC")
TABLES = ("users", "items", "rows")


@dataclass(frozen=True)
class Frame:
    """Users and items per day, and the impressions that point at them."""

    users: pl.DataFrame
    """One row per (user, day): user_id, day, stored user features in Schema order."""
    items: pl.DataFrame
    """One row per (item, day), and where the schema has hourly counters per hour that they stand: item_id, day, stored
    item features in Schema order."""
    rows: pl.DataFrame
    """One row per impression, by event_timestamp, user_id, item_id: ``user_row`` and ``item_row`` (UInt32 positions
    in the other two), the log's columns, ``item_age_days`` and ``judged_age_days`` (Float32, days since creation,
    0 when unknown), ``exposures`` (Int64: impressions of the item on all earlier days), ``usage``."""


@dataclass(frozen=True)
class FramePart:
    """A frame that is one of several; ``first`` bool [I]: no earlier part holds this row of ``frame.items``."""

    frame: Frame
    first: npt.NDArray[np.bool_]

    @classmethod
    def whole(cls, frame: Frame) -> "FramePart":
        return cls(frame, np.ones(len(frame.items), np.bool_))


def load_frame(
    dataset: Dataset,
    workspace: Workspace,
    days: Sequence[date],
    usages: tuple[Usage, ...] = (Usage.ALL, Usage.TRAINING, Usage.EVALUATION),
) -> Frame:
    """The impressions of ``days`` whose usage is one of ``usages``, with their features.

    Rows of usage ``history`` are in no frame: they feed the snapshots only. The snapshots of ``days`` must have been
    built (:class:`MissingArtifact`). A user or item is read as of its first impression of the day, an item with
    hourly counters as of its first while they stand, so nothing that happened later can reach a row. Days are cached on
    their own.
    """
    wanted = {day: frame_path(dataset, workspace, day) for day in sorted(set(days)) if day in set(dataset.days)}
    missing = [day for day, path in wanted.items() if not path.exists()]
    if missing:
        _write_missing(dataset, workspace, {day: wanted[day] for day in missing})
    return with_usage(concatenated([_read(path) for path in wanted.values()], dataset.schema), usages)


def frame_path(dataset: Dataset, workspace: Workspace, day: date) -> Path:
    """Path of a day's cached frame; the name changes with everything the frame depends on."""
    past = [seen for seen in dataset.days if seen <= day]
    inputs = {
        "log": dataset.log_fingerprint(past),
        "items": dataset.items_fingerprint(day),
        "users": dataset.manifest["files"]["users.parquet"]["sha256"],
        "history": history_fingerprint(dataset, day),
    }
    return workspace.frames / f"{day.isoformat()}-{fingerprint_of(inputs, _write_missing)}"


def _read(path: Path) -> Frame:
    return Frame(*(pl.read_parquet(path / f"{table}.parquet") for table in TABLES))


def _write_missing(dataset: Dataset, workspace: Workspace, wanted: dict[date, Path]) -> None:
    builder = Builder(dataset, workspace, list(wanted))
    for day, path in wanted.items():
        build_unless_current(path, partial(_write, builder, day))


def _write(builder: "Builder", day: date, directory: Path) -> None:
    frame = builder.build(day)
    for table in TABLES:
        getattr(frame, table).write_parquet(directory / f"{table}.parquet")


class Builder:
    """Makes frames of ``days`` from the log and the feature store, of all users or of some.

    Raises:
        MissingArtifact: the snapshots of ``days`` have not been built.
    """

    def __init__(self, dataset: Dataset, workspace: Workspace, days: Sequence[date]) -> None:
        require_history(dataset, workspace, days)
        require_hourly(dataset, workspace, days)
        self.dataset = dataset
        self.store = FeatureStore(dataset, workspace)
        self.store.apply()
        self._births = dataset.births()
        self._exposures = Exposures(dataset, workspace)
        self._seen: tuple[date, pl.DataFrame] | None = None

    def build(self, day: date, users: pl.Expr | None = None) -> Frame:
        """The frame of ``day``, days in ascending order; ``users`` is a condition on the log's ``user_id``."""
        whole = self._log(day)
        log = self._with_hour((whole if users is None else whole.filter(users)).sort(_ORDER).collect())
        first = _first_shown(log, USER_ID, DAY).sort(DAY, USER_ID)
        keys = [DAY, ITEM_ID, *_hour(log)]
        seen = self._first_seen(day).join(log, on=keys, how="semi", nulls_equal=True).sort(keys)
        schema = self.store.schema
        user_rows = _with_day(self.store.offline_users(first), first[DAY], schema, Entity.USER)
        item_rows = _with_day(self.store.offline_items(seen), seen[DAY], schema, Entity.ITEM)
        rows = self._exposures.count(_with_ages(log, self._births), day)
        return _assemble(user_rows, item_rows.with_columns(seen.select(_hour(log))), rows, schema)

    def _log(self, day: date) -> pl.LazyFrame:
        return self.dataset.impressions([day]).filter(pl.col(USAGE) != Usage.HISTORY.value)

    def _with_hour(self, log: pl.DataFrame) -> pl.DataFrame:
        schema = self.dataset.schema
        return with_counted_hour(log, self._births, schema) if schema.history.hourly else log

    def _first_seen(self, day: date) -> pl.DataFrame:
        """When each item, with hourly counters in each hour, was first shown on ``day``; of the whole log: an item must
        be read as of the same instant whichever users are asked for."""
        if self._seen is None or self._seen[0] != day:
            log = self._with_hour(self._log(day).select(ITEM_ID, DAY, EVENT_TIMESTAMP).collect())
            self._seen = day, _first_shown(log, ITEM_ID, DAY, *_hour(log))
        return self._seen[1]


def _first_shown(log: pl.DataFrame, *keys: str) -> pl.DataFrame:
    """When each of ``keys`` came first: what is written later in the day must reach none of its impressions."""
    return log.group_by(keys).agg(pl.col(EVENT_TIMESTAMP).min())


def _hour(log: pl.DataFrame) -> list[str]:
    return [COUNTED] if COUNTED in log.columns else []


def _with_day(read: pl.DataFrame, day: pl.Series, schema: Schema, entity: Entity) -> pl.DataFrame:
    key, *features = stored_schema(schema, entity)
    return read.with_columns(day).select(key, DAY, *features)


def _with_ages(log: pl.DataFrame, births: pl.DataFrame) -> pl.DataFrame:
    # A log may have columns of these names.
    births = births.rename({CREATED_AT: "_created", JUDGED_CREATED_AT: "_judged"})
    ages = {ITEM_AGE: "_created", JUDGED_AGE: "_judged"}
    return (
        log.join(births, on=ITEM_ID, how="left", maintain_order="left")
        .with_columns(_age(pl.col(birth).cast(_UTC).dt.epoch("us")).alias(name) for name, birth in ages.items())
        .drop(ages.values())
    )


def _age(created_us: pl.Expr) -> pl.Expr:
    """Days since creation; 0 for an item that is not known: to the platform it is brand new."""
    age = (pl.col(EVENT_TIMESTAMP).dt.epoch("us") - created_us) / timedelta(days=1).total_seconds() / 1e6
    return age.clip(lower_bound=0).fill_null(0).cast(pl.Float32)


class Exposures:
    """Impressions of each item on all days before one, from the parts of these days; ask in ascending order."""

    def __init__(self, dataset: Dataset, workspace: Workspace) -> None:
        self._dataset = dataset
        self._workspace = workspace
        self._counted: list[date] = []
        self._totals = pl.DataFrame(schema={ITEM_ID: pl.Int64(), EXPOSURES: pl.Int64()})

    def count(self, rows: pl.DataFrame, day: date) -> pl.DataFrame:
        """``rows`` of ``day`` with EXPOSURES (Int64)."""
        new = [seen for seen in self._dataset.days if seen < day and seen not in self._counted]
        list(build_daily_aggregates(self._dataset, self._workspace, stale_days(self._dataset, self._workspace, new)))
        if new:
            parts = [pl.read_parquet(aggregate_path(self._workspace, seen, Entity.ITEM)) for seen in new]
            shown = [part.select(ITEM_ID, pl.col("impressions").alias(EXPOSURES)) for part in parts]
            self._totals = pl.concat([self._totals, *shown]).group_by(ITEM_ID).agg(pl.col(EXPOSURES).sum())
            self._counted += new
        return rows.join(self._totals, on=ITEM_ID, how="left", maintain_order="left").with_columns(
            pl.col(EXPOSURES).fill_null(0)
        )


def _assemble(users: pl.DataFrame, items: pl.DataFrame, rows: pl.DataFrame, schema: Schema) -> Frame:
    for position, key, table in ((USER_ROW, USER_ID, users), (ITEM_ROW, ITEM_ID, items)):
        keys = [name for name in (key, COUNTED) if name in table.columns]
        places = table.select(keys).with_row_index(position)
        rows = rows.join(places, on=keys, how="left", nulls_equal=True, maintain_order="left")
    return Frame(users, items.drop(COUNTED, strict=False), _cast(rows.sort(_ORDER), _row_schema(schema)))


def _cast(frame: pl.DataFrame, columns: dict[str, pl.DataType]) -> pl.DataFrame:
    return frame.select(pl.col(name).cast(dtype) for name, dtype in columns.items())


def _row_schema(schema: Schema) -> dict[str, pl.DataType]:
    columns: dict[str, pl.DataType] = {
        USER_ROW: pl.UInt32(),
        ITEM_ROW: pl.UInt32(),
        REQUEST_ID: pl.Int64(),
        EVENT_TIMESTAMP: _UTC,
        DAY: pl.Date(),
        USER_ID: pl.Int64(),
        ITEM_ID: pl.Int64(),
    }
    if schema.has_query:
        columns[QUERY_ITEM_ID] = pl.Int64()
    columns |= {action: pl.Int8() for action in schema.actions}
    columns |= _context_schema(schema)
    return columns | {ITEM_AGE: pl.Float32(), JUDGED_AGE: pl.Float32(), EXPOSURES: pl.Int64(), USAGE: pl.String()}


def _context_schema(schema: Schema) -> dict[str, pl.DataType]:
    dtypes: dict[Kind | None, pl.DataType] = {
        Kind.CATEGORICAL: pl.Int64(),
        Kind.NUMERIC: pl.Float32(),
        Kind.EMBEDDING: pl.List(pl.Float32()),
    }
    context = {name: column.kind for name, column in schema.impressions.items() if column.role is Role.CONTEXT}
    return {name: dtypes.get(kind, pl.List(pl.Int64())) for name, kind in context.items()}


def concatenated(frames: Sequence[Frame], schema: Schema) -> Frame:
    """One frame of several; those of other days, or of other users of the same day."""
    if not frames:
        return empty_frame(schema)
    users, items = (_starts([len(getattr(frame, table)) for frame in frames]) for table in ("users", "items"))
    rows = [
        frame.rows.with_columns(pl.col(USER_ROW) + first_user, pl.col(ITEM_ROW) + first_item)
        for frame, first_user, first_item in zip(frames, users, items, strict=True)
    ]
    return Frame(pl.concat([f.users for f in frames]), pl.concat([f.items for f in frames]), pl.concat(rows))


def _starts(lengths: list[int]) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()][:-1]


def empty_frame(schema: Schema) -> Frame:
    """A frame of no impressions, with every column."""
    users, items = (
        _with_day(pl.DataFrame(schema=stored_schema(schema, entity)), pl.Series(DAY, [], pl.Date()), schema, entity)
        for entity in (Entity.USER, Entity.ITEM)
    )
    return Frame(users, items, pl.DataFrame(schema=_row_schema(schema)))


def with_usage(frame: Frame, usages: tuple[Usage, ...]) -> Frame:
    """The impressions whose usage is one of ``usages``, with the users and items they point at."""
    return filter_frame(frame, pl.col(USAGE).is_in([usage.value for usage in usages]))


def filter_frame(frame: Frame, condition: pl.Expr) -> Frame:
    """The impressions that meet ``condition``, with the users and items they point at."""
    rows = frame.rows.filter(condition)
    if len(rows) == len(frame.rows):
        return frame
    users, user_row = _compacted(frame.users, rows[USER_ROW])
    items, item_row = _compacted(frame.items, rows[ITEM_ROW])
    return Frame(users, items, rows.with_columns(user_row, item_row))


def _compacted(table: pl.DataFrame, position: pl.Series) -> tuple[pl.DataFrame, pl.Series]:
    present = position.unique().sort()
    return table[present], position.rank("dense").cast(pl.UInt32) - 1


def newest_items(parts: Iterable[FramePart]) -> pl.DataFrame:
    """One row per item of ``parts``, its newest, by item id."""
    newest = pl.DataFrame()
    for part in parts:
        together = pl.concat([newest, part.frame.items.filter(part.first)]) if len(newest) else part.frame.items
        newest = together.sort(DAY, maintain_order=True).unique(ITEM_ID, keep="last").sort(ITEM_ID)
    return newest


def serving_frame(
    store: FeatureStore,
    user_id: int,
    item_ids: Sequence[int],
    event_timestamp: datetime,
    context: Mapping[str, np.ndarray] | None = None,
) -> Frame:
    """One request as a frame: one user row, N item rows and N rows, features from the online store.

    ``context`` gives the context columns (and ``query_item_id``) as arrays of length N; one that is not given is
    null. Unknown ids read as nulls and an unknown item as brand new (age 0).
    """
    schema, user = store.schema, store.online_users([user_id])
    items = store.online_items(item_ids, event_timestamp)
    at = pl.lit(event_timestamp, dtype=_UTC)
    request = items.select(
        at.alias(EVENT_TIMESTAMP),
        day_of(at, schema.utc_offset_hours).alias(DAY),
        pl.lit(0, dtype=pl.UInt32).alias(USER_ROW),
        pl.lit(user[USER_ID][0], dtype=pl.Int64).alias(USER_ID),
        pl.col(ITEM_ID, CREATED_AT_US),
        **{name: pl.Series(name, values) for name, values in (context or {}).items()},
    ).with_row_index(ITEM_ROW)
    rows = request.with_columns(_age(pl.col(CREATED_AT_US)).alias(name) for name in (ITEM_AGE, JUDGED_AGE))
    columns = _row_schema(schema)
    rows = _cast(rows.with_columns(pl.lit(None).alias(name) for name in columns if name not in rows.columns), columns)
    days = rows[DAY]
    return Frame(_with_day(user, days.head(1), schema, Entity.USER), _with_day(items, days, schema, Entity.ITEM), rows)
