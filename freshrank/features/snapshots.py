"""Impression log -> historical features: daily snapshots of every user and item, as ibis expressions.

The snapshot of day D stands for the instant at which D begins and sees only impressions of days before D
(window w covers D-w .. D-1), so an impression on D and a request served on D read the same numbers. It holds
every entity seen on days D-lookback-1 .. D-1: one that has just left all windows gets an explicit row of zeros,
which ends the life of its previous row in the feature store.

Where the schema declares siblings the item snapshot of day D also holds every item created before the end of D: an
item born on D has no history yet, but siblings whose rates at the end of D-1 it is shown with.

A snapshot is summed from the parts of its days (:mod:`freshrank.features.daily_aggregates`); the log
itself is read once, day by day. The expressions keep to what ibis offers on DuckDB and on Spark alike.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime, timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.progress import Progress

from freshrank.datasets.dataset import Dataset
from freshrank.dates import midnight
from freshrank.errors import MissingArtifact
from freshrank.features.daily_aggregates import (
    CATEGORY,
    DAY,
    ENGAGED,
    KEYS,
    MASK,
    SEQUENCE_ORDER,
    affinity_aggregate,
    aggregate_names,
    aggregate_path,
    aggregates_fingerprint,
    build_daily_aggregates,
    latest,
    reach_days,
    stale_days,
)
from freshrank.features.engines import Engine, Table, open_engine
from freshrank.schema import (
    CREATED_AT,
    ITEM_ID,
    SEQUENCE_ACTIONS,
    SEQUENCE_ITEMS,
    SNAPSHOT,
    USER_ID,
    Entity,
    FeatureGroup,
    Kind,
    Schema,
    affinity_lists,
    impressions_of,
    sibling_columns,
    sibling_names,
)
from freshrank.storage.derived import fingerprint_of, is_current, marking
from freshrank.storage.files import atomic_write
from freshrank.storage.workspace import Workspace

log = logging.getLogger(__name__)

CREATED = "created_timestamp"
AGE, ITEMS, TODAY = "age", "items", "today"


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
    """Changes when anything that the snapshot of ``day`` depends on does, its code included."""
    history = dataset.schema.history
    parts = {seen.isoformat(): aggregates_fingerprint(dataset, seen) for seen in reach_days(dataset, day)}
    columns = dict.fromkeys(column for entry in history.siblings for column in sibling_columns(entry))
    born = dataset.items_fingerprint(day, tuple(columns)) if history.siblings else None
    # Not build_history: how progress is shown is no reason to build anew.
    return fingerprint_of({"schema": dataset.schema.model_dump(mode="json"), "parts": parts, "born": born}, _build)


def build_history(dataset: Dataset, workspace: Workspace, days: Sequence[date]) -> None:
    """Write the snapshots of ``days`` that are missing or whose inputs have changed, and the parts they lack.

    ``features/<entity>/date=YYYY-MM-DD/part-0.parquet``: ``<entity>_id``, ``snapshot_timestamp`` and
    ``created_timestamp`` (both the UTC instant at which the day begins), then the features in Schema order.
    A day's fingerprint is written last, so a day that was interrupted is built again.
    """
    wanted = {day: history_fingerprint(dataset, day) for day in sorted(set(days))}
    stale = [day for day, expected in wanted.items() if not _is_built(workspace, day, expected)]
    for entity in KEYS if stale else ():
        remove_outgrown(workspace.features / entity, history_schema(dataset.schema, entity))
    parts = stale_days(dataset, workspace, [seen for day in stale for seen in _read_days(dataset, day)])
    log.info(
        "history: %d days of the log to aggregate, %d of %d snapshots to build", len(parts), len(stale), len(wanted)
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("history: days of the log", total=len(parts))
        for _ in build_daily_aggregates(dataset, workspace, parts):
            progress.advance(task)
        task = progress.add_task("history: snapshots", total=len(stale))
        for _ in _build(dataset, workspace, {day: wanted[day] for day in stale}):
            progress.advance(task)


def _read_days(dataset: Dataset, day: date) -> list[date]:
    # With nothing to read the oldest day gives the columns; its rows are of no window.
    return reach_days(dataset, day) or dataset.days[:1]


def remove_outgrown(folder: Path, columns: Iterable[str]) -> None:
    """Remove the days under ``folder`` that have other columns: no fingerprint fits them any more, and Feast, which
    reads the files of all days as one table, takes its columns from the first."""
    wanted = list(columns)
    for path in folder.glob("date=*/part-0.parquet"):
        if list(pl.read_parquet_schema(path)) != wanted:
            path.unlink()


def require_history(dataset: Dataset, workspace: Workspace, days: Sequence[date]) -> None:
    """Raise :class:`MissingArtifact` unless the snapshots of ``days`` are there and of today's inputs."""
    absent = [day for day in days if not _is_built(workspace, day, history_fingerprint(dataset, day))]
    if absent:
        raise MissingArtifact(
            f"history: the snapshots of {min(absent)} .. {max(absent)} ({len(absent)} days) are missing or older than "
            f"the log; run `freshrank features build` first"
        )


def _build(dataset: Dataset, workspace: Workspace, wanted: dict[date, str]) -> Iterator[date]:
    queries: dict[Entity, str] = {}
    with open_engine() as engine:
        for day, built in wanted.items():
            views = day_views(engine, dataset, workspace, day)
            queries = queries or {e: engine.compile(table) for e, table in snapshots(views, dataset.schema).items()}
            with marking(_marker(workspace, day), built):
                for entity, query in queries.items():
                    with atomic_write(snapshot_path(workspace, entity, day)) as temporary:
                        engine.write(query, temporary)
            yield day


def _marker(workspace: Workspace, day: date) -> Path:
    return workspace.features / "built" / f"{day.isoformat()}.json"


def _is_built(workspace: Workspace, day: date, expected: str) -> bool:
    return is_current(_marker(workspace, day), expected, *(snapshot_path(workspace, entity, day) for entity in KEYS))


def day_views(engine: Engine, dataset: Dataset, workspace: Workspace, day: date) -> dict[str, Table]:
    """All that the snapshots of ``day`` are made of and that differs by day: by name, the parts with the ``age`` of
    their rows, 1 for the day before; ``items``, those created before ``day`` ends; ``today``, one row."""
    schema = dataset.schema
    tables = read_aggregates(engine, dataset, workspace, day) | {
        ITEMS: _born(engine.read([dataset.path / "items.parquet"]), schema, day),
        TODAY: _today(midnight(day, schema.utc_offset_hours)),
    }
    return {name: engine.view(f"day_{name}", table) for name, table in tables.items()}


def read_aggregates(engine: Engine, dataset: Dataset, workspace: Workspace, day: date) -> dict[str, Table]:
    """What may enter the snapshot of ``day``, by part."""
    days, reach = _read_days(dataset, day), dataset.schema.lookback_days + 1
    tables = {
        name: engine.read([aggregate_path(workspace, seen, name) for seen in days])
        for name in aggregate_names(dataset.schema)
    }
    return {name: _aged(table, day, reach) for name, table in tables.items()}


def _aged(table: Table, day: date, reach: int) -> Table:
    import ibis

    aged = table.mutate(**{AGE: ibis.literal(day).delta(table[DAY], unit="day").cast("int64")})
    return aged.filter(aged[AGE].between(1, reach))


def _born(items: Table, schema: Schema, day: date) -> Table:
    import ibis

    end = ibis.literal(midnight(day + timedelta(days=1), schema.utc_offset_hours), type="timestamp('UTC')")
    return items.filter(items[CREATED_AT] < end)


def _today(instant: datetime) -> Table:
    import ibis

    row = ibis.memtable([(0,)], schema={"one": "int64"})
    return row.select(**{SNAPSHOT: ibis.literal(instant, type="timestamp('UTC')")})


def snapshots(views: dict[str, Table], schema: Schema) -> dict[Entity, Table]:
    """Both entities' snapshots, as they are written, from :func:`day_views`."""
    tables = {Entity.USER: user_snapshot(views, schema), Entity.ITEM: item_snapshot(views, schema)}
    return {entity: _written(table.cross_join(views[TODAY]), schema, entity) for entity, table in tables.items()}


def _written(table: Table, schema: Schema, entity: Entity) -> Table:
    stamped = table.mutate(**{CREATED: table[SNAPSHOT]})
    columns = {name: stamped[name].cast(_ibis_type(dtype)) for name, dtype in history_schema(schema, entity).items()}
    return stamped.select(**columns).order_by(KEYS[entity])


def _ibis_type(dtype: pl.DataType) -> str:
    names = {pl.Int64(): "int64", pl.Float32(): "float32", pl.List(pl.Int64()): "array<int64>"}
    return names.get(dtype, "timestamp('UTC', 6)")


def item_snapshot(views: dict[str, Table], schema: Schema) -> Table:
    """Counters, rates and siblings' rates, one row per item."""
    counters = _counters(views, Entity.ITEM, schema)
    return _with_siblings(counters, views[ITEMS], schema) if schema.history.siblings else counters


def user_snapshot(views: dict[str, Table], schema: Schema) -> Table:
    """Counters, rates, sequences and affinities, one row per user."""
    tables = [_counters(views, Entity.USER, schema), _sequences(views[ENGAGED], schema)]
    tables += [_affinities(views[affinity_aggregate(column)], schema, column) for column in schema.history.affinity]
    table = reduce(lambda left, right: left.left_join(right, USER_ID, rname="{name}_right"), tables)
    features = {
        name: _or_empty(table[name]) if kind is Kind.SEQUENCE else table[name]
        for name, kind in historical_kinds(schema, Entity.USER).items()
    }
    return table.select(USER_ID, **features)


def _or_empty(column: Any) -> Any:
    import ibis

    return column.fill_null(ibis.literal([], type="array<int64>"))


def _counters(views: dict[str, Table], entity: Entity, schema: Schema) -> Table:
    rows, values = views[entity], {}
    for window in schema.history.windows:
        seen = rows[AGE] <= window
        values[f"{entity}_impressions_{window}d"] = _sum(rows.impressions, seen)
        for action in schema.actions:
            positives = _sum(rows[f"positive_{action}"], seen)
            observed = _sum(rows[f"observed_{action}"], seen)
            values[f"{entity}_{action}_{window}d"] = positives
            values[f"{entity}_{action}_rate_{window}d"] = positives.cast("float64") / observed.nullif(0)
            if window == schema.lookback_days:
                values[f"observed_{action}"] = observed
    return rows.group_by(KEYS[entity]).aggregate(**values)


def _sum(column: Any, where: Any) -> Any:
    return column.sum(where=where).fill_null(0).cast("int64")


def _with_siblings(counters: Table, items: Table, schema: Schema) -> Table:
    """Every item seen or born by then, with its counters and, per entry, the rates of its siblings in the lookback.

    Rate = (positives of the siblings + m g) / (observed of the siblings + m), the item itself left out of both sums
    and of g, the rate of all items: its own past never comes back to it through its siblings.
    """
    rows = counters.select(ITEM_ID).union(items.select(ITEM_ID), distinct=True)
    for table in (counters, _sibling_keys(items, schema)):
        rows = rows.left_join(table, ITEM_ID, rname="{name}_right").drop(f"{ITEM_ID}_right")
    observed = [f"observed_{action}" for action in schema.actions]
    rows = rows.mutate(**{name: rows[name].fill_null(0) for name in (*_counts(schema), *observed)})
    rows = rows.cross_join(_everything(rows, schema))
    features = {name: value for entry in schema.history.siblings for name, value in _siblings(rows, entry, schema)}
    return rows.select(*counters.columns, **features)


def _everything(rows: Table, schema: Schema) -> Table:
    """One row of sums over all items: not as a window, for which Spark would move all items to one place."""
    summed = [name for action in schema.actions for name in _trials(action, schema)]
    return rows.aggregate(**{f"all_{name}": rows[name].sum() for name in summed})


def _trials(action: str, schema: Schema) -> tuple[str, str]:
    """Columns of an item's positive and observed labels within the lookback."""
    return f"item_{action}_{schema.lookback_days}d", f"observed_{action}"


def _counts(schema: Schema) -> list[str]:
    """The item's own counters: 0 without history, where its rates are null."""
    features = schema.select(Entity.ITEM, Kind.NUMERIC, stored=True)
    return [f.name for f in features if f.group is FeatureGroup.HISTORICAL and f.default is not None]


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
    alike = ibis.window(group_by=keys)
    known = reduce(lambda one, other: one & other, [key.notnull() for key in keys])
    weight = schema.history.sibling_smoothing

    def siblings(name: str) -> Any:
        return _of_the_others(rows[name], alike)

    impressions, *rates = sibling_names(entry, schema.actions)
    yield impressions, ibis.ifelse(known, siblings(impressions_of(Entity.ITEM, schema.lookback_days)), None)
    for action, rate in zip(schema.actions, rates, strict=True):
        positive, observed = _trials(action, schema)
        others = [rows[f"all_{name}"] - rows[name] for name in (positive, observed)]
        average = others[0].cast("float64") / others[1].nullif(0)
        trials = (siblings(observed) + weight).nullif(0)
        yield rate, ibis.ifelse(known, (siblings(positive) + weight * average) / trials, None)


def _of_the_others(counts: Any, alike: Any) -> Any:
    return counts.sum().over(alike) - counts


def _sequences(engaged: Table, schema: Schema) -> Table:
    import ibis

    recent = engaged.filter(engaged[AGE] <= schema.lookback_days)
    last = latest(recent, schema.history.sequence_length)
    event = ibis.struct({name: last[name] for name in SEQUENCE_ORDER[1:]})
    lists = last.group_by(USER_ID).aggregate(events=event.collect().sort())
    parts = {SEQUENCE_ITEMS: _part(lists.events, ITEM_ID), SEQUENCE_ACTIONS: _part(lists.events, MASK)}
    return lists.select(USER_ID, **parts)


def _affinities(daily: Table, schema: Schema, column: str) -> Table:
    """The categories of ``column`` a user saw most within the lookback, as parallel lists."""
    import ibis

    counts = ["impressions", *(f"positive_{action}" for action in schema.actions)]
    rows = daily.filter(daily[AGE] <= schema.lookback_days)
    # Narrow integers: the ranking below sorts one row per (user, category), its widest step.
    totals = rows.group_by(USER_ID, CATEGORY).aggregate(**{name: rows[name].sum().cast("int32") for name in counts})
    per_user = ibis.window(group_by=USER_ID, order_by=[ibis.desc(totals.impressions), totals[CATEGORY]])
    top = totals.mutate(rank=ibis.row_number().over(per_user))
    top = top.filter(top["rank"] < schema.history.affinity_size)
    entry = ibis.struct({name: top[name] for name in ("rank", CATEGORY, *counts)})
    lists = top.group_by(USER_ID).aggregate(entries=entry.collect().sort())
    names = affinity_lists(column, schema.actions)
    parts = {name: _part(lists.entries, field) for name, field in zip(names, [CATEGORY, *counts], strict=True)}
    return lists.select(USER_ID, **parts)


def _part(entries: Any, field: str) -> Any:
    return entries.map(lambda entry: entry[field].cast("int64"))
