"""Impression log -> historical features: daily snapshots of every user and item, as ibis expressions.

The snapshot of day D stands for the instant at which D begins and sees only impressions of days before D
(window w covers D-w .. D-1), so an impression on D and a request served on D read the same numbers. It holds
every entity seen on days D-lookback-1 .. D-1: one that has just left all windows gets an explicit row of zeros,
which ends the life of its previous row in the feature store.

Where the schema declares siblings the item snapshot of day D also holds every item created before the end of D: an
item born on D has no history yet, but siblings whose rates at the end of D-1 it is shown with.

The log is aggregated once per entity and day; a window is a sum over those, found by an equality join with the
small table of (day, snapshot, age). The expressions keep to what ibis offers on DuckDB and on Spark alike.
"""

from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import polars as pl
from rich.console import Console
from rich.progress import Progress

from freshrank.clock import midnight
from freshrank.datasets.contract import Dataset
from freshrank.errors import MissingArtifact
from freshrank.schema import (
    CREATED_AT,
    EVENT_TIMESTAMP,
    IN_HISTORY,
    ITEM_ID,
    SEQUENCE_ACTIONS,
    SEQUENCE_ITEMS,
    SNAPSHOT,
    USAGE,
    USER_ID,
    Entity,
    Group,
    Kind,
    Schema,
    affinity_lists,
    impressions_of,
    sibling_columns,
    sibling_names,
)
from freshrank.storage import atomic_write, fingerprint, read_json, write_json
from freshrank.workspace import Workspace

if TYPE_CHECKING:
    from ibis.expr.types import Table
else:
    Table: TypeAlias = Any

CODE_VERSION = 1
"""Raise it when the same log gives other numbers, so that stored snapshots are rebuilt."""
CREATED = "created_timestamp"
KEYS = {Entity.USER: USER_ID, Entity.ITEM: ITEM_ID}
DAY = "day"
_SNAPSHOT_DAY, _AGE = "snapshot_day", "age"
_DAYS_PER_QUERY = 7  # bounds the memory of one query to a week of snapshots


def history_schema(schema: Schema, entity: Entity) -> dict[str, pl.DataType]:
    """Columns and dtypes of one entity's snapshots, in their order: key, timestamps, features."""
    utc = pl.Datetime("us", "UTC")
    return {KEYS[entity]: pl.Int64(), SNAPSHOT: utc, CREATED: utc} | {
        name: pl.List(pl.Int64()) if kind is Kind.SEQUENCE else pl.Float32()
        for name, kind in historical_kinds(schema, entity).items()
    }


def historical_kinds(schema: Schema, entity: Entity) -> dict[str, Kind]:
    """Name and kind of each stored feature of ``entity`` that is built from the log, in Schema order."""
    return {f.name: f.kind for f in schema.select(entity, stored=True) if f.snapshot}


def snapshot_path(workspace: Workspace, entity: Entity, day: date) -> Path:
    return workspace.features / entity / f"date={day.isoformat()}" / "part-0.parquet"


def history_fingerprint(dataset: Dataset, day: date) -> str:
    """Changes when anything the snapshot of ``day`` depends on does."""
    reach = dataset.schema.lookback_days + 1
    seen = [day - timedelta(days=age) for age in range(1, reach + 1)]
    return fingerprint({"version": CODE_VERSION, "inputs": dataset.fingerprint(seen)})


def build_history(dataset: Dataset, workspace: Workspace, days: Sequence[date]) -> None:
    """Write the snapshots of ``days`` that are missing or whose inputs have changed.

    ``features/<entity>/date=YYYY-MM-DD/part-0.parquet``: ``<entity>_id``, ``snapshot_timestamp`` and
    ``created_timestamp`` (both the UTC instant at which the day begins), then the features in Schema order.
    A day's fingerprint is written last, so a day that was interrupted is built again.
    """
    wanted = {day: history_fingerprint(dataset, day) for day in sorted(set(days))}
    stale = [day for day, expected in wanted.items() if not _is_built(workspace, day, expected)]
    if stale:
        _remove_outgrown(workspace, dataset.schema)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("history", total=len(stale))
        for start in range(0, len(stale), _DAYS_PER_QUERY):
            for day, frames in compute_history(dataset, stale[start : start + _DAYS_PER_QUERY]):
                _write(workspace, day, frames, wanted[day])
                progress.advance(task)


def _remove_outgrown(workspace: Workspace, schema: Schema) -> None:
    """Remove the snapshots of a schema with other columns: no fingerprint fits them any more, and Feast, which reads
    the files of all days as one table, takes its columns from the first."""
    for entity in KEYS:
        columns = list(history_schema(schema, entity))
        for path in (workspace.features / entity).glob("date=*/part-0.parquet"):
            if list(pl.read_parquet_schema(path)) != columns:
                path.unlink()


def require_history(dataset: Dataset, workspace: Workspace, days: Sequence[date]) -> None:
    """Raise :class:`MissingArtifact` unless the snapshots of ``days`` are there and of today's inputs."""
    absent = [day for day in days if not _is_built(workspace, day, history_fingerprint(dataset, day))]
    if absent:
        raise MissingArtifact(
            f"history: the snapshots of {min(absent)} .. {max(absent)} ({len(absent)} days) are missing or older than "
            f"the log; run `freshrank features build` first"
        )


def compute_history(dataset: Dataset, days: Sequence[date]) -> Iterator[tuple[date, dict[Entity, pl.DataFrame]]]:
    """The snapshots of ``days`` (ascending), computed together in one query per entity."""
    import ibis

    connection = ibis.duckdb.connect()
    try:
        log = read_log(connection, dataset, days)
        items = connection.read_parquet(dataset.path / "items.parquet")
        tables = {
            Entity.USER: user_snapshots(log, items, dataset.schema, days),
            Entity.ITEM: item_snapshots(log, items, dataset.schema, days),
        }
        frames = {entity: pl.DataFrame(table.to_pyarrow()) for entity, table in tables.items()}
    finally:
        connection.disconnect()
    for day in days:
        yield day, {entity: _snapshot(frame, dataset.schema, entity, day) for entity, frame in frames.items()}


def _snapshot(frame: pl.DataFrame, schema: Schema, entity: Entity, day: date) -> pl.DataFrame:
    instant = pl.lit(midnight(day, schema.utc_offset_hours), dtype=pl.Datetime("us", "UTC"))
    return (
        frame.filter(pl.col(_SNAPSHOT_DAY) == day)
        .with_columns(instant.alias(SNAPSHOT), instant.alias(CREATED))
        .select(pl.col(name).cast(dtype) for name, dtype in history_schema(schema, entity).items())
        .sort(KEYS[entity])
    )


def _marker(workspace: Workspace, day: date) -> Path:
    return workspace.features / "built" / f"{day.isoformat()}.json"


def _is_built(workspace: Workspace, day: date, expected: str) -> bool:
    files = [_marker(workspace, day), *(snapshot_path(workspace, entity, day) for entity in KEYS)]
    return all(file.exists() for file in files) and read_json(files[0]) == expected


def _write(workspace: Workspace, day: date, frames: dict[Entity, pl.DataFrame], built: str) -> None:
    _marker(workspace, day).unlink(missing_ok=True)
    for entity, frame in frames.items():
        with atomic_write(snapshot_path(workspace, entity, day)) as temporary:
            frame.write_parquet(temporary)
    write_json(_marker(workspace, day), built)


def read_log(connection: Any, dataset: Dataset, days: Sequence[date]) -> Table:
    """Impressions that may feed the snapshots of ``days``: keys, event_timestamp, ``day``, actions."""
    import ibis

    schema = dataset.schema
    first = min(days) - timedelta(days=schema.lookback_days + 1)
    present = [day for day in dataset.days if first <= day < max(days)]
    # With nothing to read the oldest partition gives the columns; its rows are of no window.
    paths = [str(dataset.partition(day)) for day in present or dataset.days[:1]]
    log = connection.read_parquet(paths, hive_partitioning=True)
    log = log.filter(log[USAGE].isin([usage.value for usage in IN_HISTORY]))
    kept = (USER_ID, ITEM_ID, EVENT_TIMESTAMP, *schema.actions)
    return log.select(*kept, **{DAY: log["date"].cast(ibis.expr.datatypes.date)})


def _windows(days: Sequence[date], reach: int) -> Table:
    """(day, snapshot_day, age): which days, 1 .. ``reach`` days before it, may enter each snapshot."""
    import ibis

    rows = [(day - timedelta(days=age), day, age) for day in days for age in range(1, reach + 1)]
    return ibis.memtable(rows, schema={DAY: "date", _SNAPSHOT_DAY: "date", _AGE: "int64"})


def _daily(log: Table, keys: list[str], actions: list[str]) -> Table:
    """Impressions, and per action the positive and the observed ones, per ``keys`` and day."""
    sums = {"impressions": log.count()}
    sums |= {f"positive_{action}": _positive(log, action).sum() for action in actions}
    sums |= {f"observed_{action}": log[action].count() for action in actions}
    return log.group_by(*keys, DAY).aggregate(**{name: value.cast("int64") for name, value in sums.items()})


def _positive(log: Table, action: str) -> Any:
    return (log[action] == 1).fill_null(False).cast("int64")


def item_snapshots(log: Table, items: Table, schema: Schema, days: Sequence[date]) -> Table:
    """Counters, rates and siblings' rates, one row per (item, snapshot day)."""
    counters = _counters(log, Entity.ITEM, schema, days)
    return _with_siblings(counters, items, schema, days) if schema.history.siblings else counters


def user_snapshots(log: Table, items: Table, schema: Schema, days: Sequence[date]) -> Table:
    """Counters, rates, sequences and affinities, one row per (user, snapshot day)."""
    parts = [_counters(log, Entity.USER, schema, days), _sequences(log, schema, days)]
    parts += [_affinities(log, items, schema, column, days) for column in schema.history.affinity]
    table = reduce(lambda left, right: left.left_join(right, [USER_ID, _SNAPSHOT_DAY], rname="{name}_right"), parts)
    features = {
        name: _or_empty(table[name]) if kind is Kind.SEQUENCE else table[name]
        for name, kind in historical_kinds(schema, Entity.USER).items()
    }
    return table.select(USER_ID, _SNAPSHOT_DAY, **features)


def _or_empty(column: Any) -> Any:
    import ibis

    return column.fill_null(ibis.literal([], type="array<int64>"))


def _counters(log: Table, entity: Entity, schema: Schema, days: Sequence[date]) -> Table:
    key, actions, windows = KEYS[entity], schema.actions, schema.history.windows
    daily = _daily(log, [key], actions)
    rows = daily.inner_join(_windows(days, schema.lookback_days + 1), DAY)
    values = {}
    for window in windows:
        seen = rows[_AGE] <= window
        values[f"{entity}_impressions_{window}d"] = _sum(rows.impressions, seen)
        for action in actions:
            positives = _sum(rows[f"positive_{action}"], seen)
            observed = _sum(rows[f"observed_{action}"], seen)
            values[f"{entity}_{action}_{window}d"] = positives
            values[f"{entity}_{action}_rate_{window}d"] = positives.cast("float64") / observed.nullif(0)
            if window == schema.lookback_days:
                values[f"observed_{action}"] = observed
    return rows.group_by(key, _SNAPSHOT_DAY).aggregate(**values)


def _sum(column: Any, where: Any) -> Any:
    return column.sum(where=where).fill_null(0).cast("int64")


def _with_siblings(counters: Table, items: Table, schema: Schema, days: Sequence[date]) -> Table:
    """Every item seen or born by then, with its counters and, per entry, the rates of its siblings in the lookback.

    Rate = (positives of the siblings + m g) / (observed of the siblings + m), the item itself left out of both sums
    and of g, the rate of all items: its own past never comes back to it through its siblings.
    """
    keys = [ITEM_ID, _SNAPSHOT_DAY]
    rows = counters.select(*keys).union(_born(items, schema, days), distinct=True)
    for table, on in ((counters, keys), (_sibling_keys(items, schema), [ITEM_ID])):
        rows = rows.left_join(table, on, rname="{name}_right").drop(*[f"{name}_right" for name in on])
    observed = [f"observed_{action}" for action in schema.actions]
    rows = rows.mutate(**{name: rows[name].fill_null(0) for name in (*_counts(schema), *observed)})
    features = {name: value for entry in schema.history.siblings for name, value in _siblings(rows, entry, schema)}
    return rows.select(*counters.columns, **features)


def _counts(schema: Schema) -> list[str]:
    """The item's own counters: 0 without history, where its rates are null."""
    features = schema.select(Entity.ITEM, Kind.NUMERIC, stored=True)
    return [f.name for f in features if f.group is Group.HISTORICAL and f.default is not None]


def _born(items: Table, schema: Schema, days: Sequence[date]) -> Table:
    """(item, snapshot day) of every item created before that day ends."""
    import ibis

    ends = [(day, midnight(day + timedelta(days=1), schema.utc_offset_hours)) for day in days]
    table = ibis.memtable(ends, schema={_SNAPSHOT_DAY: "date", "day_end": "timestamp('UTC')"})
    return items.inner_join(table, items[CREATED_AT] < table["day_end"]).select(ITEM_ID, _SNAPSHOT_DAY)


def _sibling_keys(items: Table, schema: Schema) -> Table:
    """item_id, and per column of an entry the int64 value ``key_<column>`` siblings share, null where there is none."""
    columns = dict.fromkeys(column for entry in schema.history.siblings for column in sibling_columns(entry))
    return items.select(ITEM_ID, **{f"key_{column}": _sibling_key(items[column], schema, column) for column in columns})


def _sibling_key(values: Table, schema: Schema, column: str) -> Any:
    import ibis

    kind = schema.items[column].kind
    if kind is Kind.NUMERIC:
        number = values.cast("float64")
        # Not greatest(), which would take a missing value for 1.
        return (2 * ibis.ifelse(number < 1, 1.0, number).log2()).floor().cast("int64")
    return values[0] if kind is Kind.MULTI_VALUED else values


def _siblings(rows: Table, entry: str, schema: Schema) -> Iterator[tuple[str, Any]]:
    """Name and value of each feature of one entry; null where the item has no value to have siblings by."""
    import ibis

    keys = [rows[f"key_{column}"] for column in sibling_columns(entry)]
    alike, all_items = (ibis.window(group_by=group) for group in ([_SNAPSHOT_DAY, *keys], [_SNAPSHOT_DAY]))
    known = reduce(lambda one, other: one & other, [key.notnull() for key in keys])
    weight, span = schema.history.sibling_smoothing, schema.lookback_days

    def others(name: str, group: Any) -> Any:
        return rows[name].sum().over(group) - rows[name]

    impressions, *rates = sibling_names(entry, schema.actions)
    yield impressions, ibis.ifelse(known, others(impressions_of(Entity.ITEM, span), alike), None)
    for action, rate in zip(schema.actions, rates, strict=True):
        positive, observed = f"item_{action}_{span}d", f"observed_{action}"
        average = others(positive, all_items).cast("float64") / others(observed, all_items).nullif(0)
        trials = (others(observed, alike) + weight).nullif(0)
        yield rate, ibis.ifelse(known, (others(positive, alike) + weight * average) / trials, None)


def _sequences(log: Table, schema: Schema, days: Sequence[date]) -> Table:
    """A user's engaged impressions are listed once; each snapshot takes a slice of that list."""
    import ibis

    mask = reduce(lambda left, right: left + right, [
        _positive(log, action) * (1 << bit) for bit, action in enumerate(schema.actions)
    ])  # fmt: skip
    engaged = log.mutate(mask=mask).filter(lambda t: t.mask > 0)
    event = ibis.struct({"at": engaged[EVENT_TIMESTAMP], "item": engaged[ITEM_ID], "mask": engaged.mask})
    lists = engaged.group_by(USER_ID).aggregate(events=event.collect().sort())
    lists = lists.select(USER_ID, items=lists.events.map(lambda e: e.item), masks=lists.events.map(lambda e: e.mask))
    everything = schema.lookback_days + 1 + (max(days) - min(days)).days
    daily = engaged.group_by(USER_ID, DAY).aggregate(engaged=engaged.count())
    rows = daily.inner_join(_windows(days, everything), DAY)
    bounds = rows.group_by(USER_ID, _SNAPSHOT_DAY).aggregate(
        end=_sum(rows.engaged, rows[_AGE] > 0),
        expired=_sum(rows.engaged, rows[_AGE] > schema.lookback_days),
    )
    table = bounds.inner_join(lists, USER_ID)
    begin = ibis.greatest(table.expired, table.end - schema.history.sequence_length)
    return table.select(
        USER_ID,
        _SNAPSHOT_DAY,
        **{SEQUENCE_ITEMS: table["items"][begin : table.end], SEQUENCE_ACTIONS: table.masks[begin : table.end]},
    )


def _affinities(log: Table, items: Table, schema: Schema, column: str, days: Sequence[date]) -> Table:
    """The categories of ``column`` a user saw most within the lookback, as parallel lists."""
    import ibis

    several = schema.items[column].kind is Kind.MULTI_VALUED
    categories = items.select(ITEM_ID, category=items[column][0] if several else items[column]).drop_null("category")
    counts = ["impressions", *(f"positive_{action}" for action in schema.actions)]
    daily = _daily(log.inner_join(categories, ITEM_ID), [USER_ID, "category"], schema.actions)
    rows = daily.inner_join(_windows(days, schema.lookback_days), DAY)
    # Narrow integers: the ranking below sorts one row per (user, snapshot, category), its widest step.
    totals = rows.group_by(USER_ID, _SNAPSHOT_DAY, "category").aggregate(
        **{name: rows[name].sum().cast("int32") for name in counts}
    )
    per_user = ibis.window(
        group_by=[USER_ID, _SNAPSHOT_DAY], order_by=[ibis.desc(totals.impressions), totals["category"]]
    )
    top = totals.mutate(rank=ibis.row_number().over(per_user))
    top = top.filter(top["rank"] < schema.history.affinity_size)
    entry = ibis.struct({name: top[name] for name in ("rank", "category", *counts)})
    lists = top.group_by(USER_ID, _SNAPSHOT_DAY).aggregate(entries=entry.collect().sort())
    names = affinity_lists(column, schema.actions)
    parts = {name: _part(lists.entries, field) for name, field in zip(names, ["category", *counts], strict=True)}
    return lists.select(USER_ID, _SNAPSHOT_DAY, **parts)


def _part(entries: Any, field: str) -> Any:
    return entries.map(lambda entry: entry[field].cast("int64"))
