"""Impression log -> hourly counters of fresh items: what a daily snapshot cannot know of an item born today.

The counters of an hour H (a full hour, UTC) count an item's impressions in the 24 hours before H. They are pushed into
the online store and stand from H + delay (``history.hourly_delay_minutes``) until those of the next hour do. Without a
next push they end :data:`MISSED` hours later and read as missing. An impression at t is trained with the counters of
floor_hour(t - delay), which are the ones it would have been served with.

Items older than ``fresh_days`` have none: their daily counters say it all. One that has just grown out of it gets rows
of nulls, which end the life of its last numbers.
"""

from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from freshrank.datasets.dataset import Dataset
from freshrank.dates import midnight
from freshrank.errors import DataError, MissingArtifact
from freshrank.features.columns import Columns, Int
from freshrank.features.snapshots import CREATED, remove_outgrown
from freshrank.schema import (
    CREATED_AT,
    EVENT_TIMESTAMP,
    IN_HISTORY,
    ITEM_ID,
    SNAPSHOT,
    USAGE,
    Entity,
    Origin,
    Schema,
    hourly_names,
)
from freshrank.storage.derived import fingerprint_of, is_current, marking
from freshrank.storage.files import atomic_write
from freshrank.storage.workspace import Workspace

HOUR = timedelta(hours=1)
WINDOW = 24
"""Hours that are counted."""
MISSED = 1
"""Pushes that may be missing before the last one's counters end."""
COUNTED = "counted_until"
"""Of an impression: the hour whose counters it reads; null where its item is none that has any."""
_UTC = pl.Datetime("us", "UTC")


def delay(schema: Schema) -> timedelta:
    """How long after an hour its counters are known."""
    return timedelta(minutes=schema.history.hourly_delay_minutes)


def life(schema: Schema) -> timedelta:
    """How long after an hour its counters still stand where no newer ones came."""
    return delay(schema) + (1 + MISSED) * HOUR


def standing_hour(at: datetime, schema: Schema) -> datetime:
    """The hour whose counters are known at ``at``."""
    return (at - delay(schema)).replace(minute=0, second=0, microsecond=0)


def hourly_schema(schema: Schema) -> dict[str, pl.DataType]:
    """Columns and dtypes of the counters: item_id, the hour, when they are known, features in Schema order."""
    features = [feature.name for feature in schema.select(Entity.ITEM) if feature.origin is Origin.HOURLY]
    return {ITEM_ID: pl.Int64(), SNAPSHOT: _UTC, CREATED: _UTC} | dict.fromkeys(features, pl.Float32())


def hourly_folder(workspace: Workspace) -> Path:
    return workspace.features / "item_hourly"


def hourly_path(workspace: Workspace, day: date) -> Path:
    return hourly_folder(workspace) / f"date={day.isoformat()}" / "part-0.parquet"


def hour_counters(dataset: Dataset, hours: Sequence[datetime]) -> pl.DataFrame:
    """One row per item and hour of ``hours`` (full hours), with the columns of :func:`hourly_schema`, by item and hour.

    Items that were created before the hour and were fresh within :func:`life` of it; of those that are fresh no more
    every feature is null, of the others a counter is 0 and a rate null where nothing was seen.
    """
    schema = dataset.schema
    counts = _counts(_seen(dataset, hours), hours, schema.actions)
    rows = _young(dataset.items(), hours, schema).join(counts, on=[ITEM_ID, SNAPSHOT], how="left")
    return (
        rows.select(ITEM_ID, SNAPSHOT, *_features(schema))
        .select(pl.col(name).cast(dtype) for name, dtype in hourly_schema(schema).items())
        .sort(ITEM_ID, SNAPSHOT)
    )


def _seen(dataset: Dataset, hours: Sequence[datetime]) -> pl.LazyFrame:
    """Impressions that any of ``hours`` counts."""
    first, last = min(hours) - WINDOW * HOUR, max(hours)
    reach = timedelta(hours=dataset.schema.utc_offset_hours)
    wanted = [day for day in dataset.days if (first + reach).date() <= day <= (last + reach).date()]
    at = pl.col(EVENT_TIMESTAMP)
    return dataset.impressions(wanted or dataset.days[:1]).filter(
        (at >= first) & (at < last) & pl.col(USAGE).is_in([usage.value for usage in IN_HISTORY])
    )


def _counts(seen: pl.LazyFrame, hours: Sequence[datetime], actions: list[str]) -> pl.DataFrame:
    """Impressions, and per action the positive and the observed ones, per item and hour of ``hours``."""
    sums = {"impressions": pl.len()}
    sums |= {f"positive_{action}": (pl.col(action) == 1).sum() for action in actions}
    sums |= {f"observed_{action}": pl.col(action).count() for action in actions}
    until = pl.col(EVENT_TIMESTAMP).dt.truncate("1h").cast(_UTC)
    counted_by = [until + count * HOUR for count in range(1, WINDOW + 1)]
    return (
        seen.group_by(ITEM_ID, until.alias(EVENT_TIMESTAMP))
        .agg(**sums)
        .with_columns(pl.concat_list(counted_by).alias(SNAPSHOT))
        .explode(SNAPSHOT)
        .filter(pl.col(SNAPSHOT).is_in(pl.Series(hours, dtype=_UTC).implode()))
        .group_by(ITEM_ID, SNAPSHOT)
        .agg(pl.col(name).sum().cast(pl.Int64) for name in sums)
        .collect()
    )


def _young(items: pl.DataFrame, hours: Sequence[datetime], schema: Schema) -> pl.DataFrame:
    """Items and hours that have a row; ``fresh`` where the row holds numbers."""
    born = items.select(ITEM_ID, pl.col(CREATED_AT).cast(_UTC))
    # Not the whole catalogue times the hours of a day.
    born = born.filter(
        pl.col(CREATED_AT).is_between(min(hours) - timedelta(days=schema.fresh_days) - life(schema), max(hours))
    )
    grid = born.join(pl.DataFrame({SNAPSHOT: pl.Series(hours, dtype=_UTC)}), how="cross")
    fresh = pl.col(SNAPSHOT) - pl.col(CREATED_AT) < timedelta(days=schema.fresh_days)
    return grid.filter(has_counters(pl.col(SNAPSHOT), schema)).with_columns(fresh.alias("fresh"))


def has_counters(hour: pl.Expr, schema: Schema) -> pl.Expr:
    """Whether there is a row of an item (``created_at``) and an hour."""
    age = hour - pl.col(CREATED_AT).cast(_UTC)
    return (age > timedelta()) & (age < timedelta(days=schema.fresh_days) + life(schema))


def _features(schema: Schema) -> list[pl.Expr]:
    impressions, positives, rates = hourly_names(schema.actions)
    counts = {impressions: pl.col("impressions").fill_null(0)}
    counts |= {name: pl.col(f"positive_{a}").fill_null(0) for name, a in zip(positives, schema.actions, strict=True)}
    observed = [pl.col(f"observed_{action}") for action in schema.actions]
    shares = {
        name: pl.col(f"positive_{a}") / pl.when(seen > 0).then(seen)
        for name, a, seen in zip(rates, schema.actions, observed, strict=True)
    }
    known = (pl.col(SNAPSHOT) + delay(schema)).alias(CREATED)
    return [known, *(pl.when("fresh").then(value).alias(name) for name, value in (counts | shares).items())]


def build_hourly(dataset: Dataset, workspace: Workspace, days: Iterable[date]) -> None:
    """Write the counters that impressions on ``days`` read, where they are missing or their inputs have changed.

    ``features/item_hourly/date=YYYY-MM-DD/part-0.parquet``, by the day on which the hour lies. Does nothing where the
    schema asks for no hourly counters.
    """
    if not dataset.schema.history.hourly:
        return
    stale = {day: key for day, key in hourly_fingerprints(dataset, days).items() if not _is_built(workspace, day, key)}
    if stale:
        remove_outgrown(hourly_folder(workspace), hourly_schema(dataset.schema))
    for day, key in stale.items():
        with marking(_marker(workspace, day), key):
            _write_day(dataset, workspace, day)


def _write_day(dataset: Dataset, workspace: Workspace, day: date) -> None:
    with atomic_write(hourly_path(workspace, day)) as temporary:
        hour_counters(dataset, _hours(day, dataset.schema)).write_parquet(temporary)


def require_hourly(dataset: Dataset, workspace: Workspace, days: Iterable[date]) -> None:
    """Raise :class:`MissingArtifact` unless the counters that impressions on ``days`` read are there and of today's
    inputs; never where the schema asks for none."""
    if not dataset.schema.history.hourly:
        return
    absent = [day for day, key in hourly_fingerprints(dataset, days).items() if not _is_built(workspace, day, key)]
    if absent:
        raise MissingArtifact(
            f"hourly counters: those of {absent[0]} .. {absent[-1]} ({len(absent)} days) are missing or older than the "
            "log; run `freshrank features build` first"
        )


def hourly_fingerprints(dataset: Dataset, days: Iterable[date]) -> dict[date, str]:
    """Fingerprint per day whose hours are read on ``days``: right after midnight those of the day before stand."""
    reach = timedelta(days=1)
    wanted = sorted({each for day in days for each in (day - reach, day)})
    return {day: fingerprint_of(_inputs(dataset, [day - reach, day]), _write_day) for day in wanted}


def _inputs(dataset: Dataset, days: list[date]) -> dict[str, object]:
    """Of the items their creation says which are fresh; those born later change nothing."""
    return {
        "schema": dataset.schema.model_dump(mode="json"),
        "log": dataset.log_fingerprint(days),
        "items": dataset.items_fingerprint(days[-1], ()),
    }


def _hours(day: date, schema: Schema) -> list[datetime]:
    """The full hours (UTC) that lie on ``day``."""
    start, end = (midnight(each, schema.utc_offset_hours) for each in (day, day + timedelta(days=1)))
    first = start.replace(minute=0, second=0, microsecond=0)
    hours = [first + count * HOUR for count in range(26)]
    return [hour for hour in hours if start <= hour < end]


def _marker(workspace: Workspace, day: date) -> Path:
    return workspace.features / "built" / f"hourly-{day.isoformat()}.json"


def _is_built(workspace: Workspace, day: date, expected: str) -> bool:
    return is_current(_marker(workspace, day), expected, hourly_path(workspace, day))


def with_counted_hour(rows: pl.DataFrame, items: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """``rows`` with :data:`COUNTED`: null for items without counters, whose features do not change during a day."""
    hour = (pl.col(EVENT_TIMESTAMP).cast(_UTC) - delay(schema)).dt.truncate("1h")
    births = items.select(ITEM_ID, pl.col(CREATED_AT))
    return (
        rows.join(births, on=ITEM_ID, how="left", maintain_order="left")
        .with_columns(pl.when(has_counters(hour, schema)).then(hour).alias(COUNTED))
        .drop(CREATED_AT)
    )


def require_log(dataset: Dataset, hour: datetime) -> None:
    """Raise :class:`DataError` unless the log reaches the hour before ``hour``.

    Counters of a log that came late would say that nobody saw the new items; none at all read as missing.
    """
    day = (hour - HOUR + timedelta(hours=dataset.schema.utc_offset_hours)).date()
    recent = [each for each in dataset.days if each >= day]
    newest = dataset.impressions(recent).select(pl.col(EVENT_TIMESTAMP).max()).collect().item() if recent else None
    if newest is None or newest < hour - HOUR:
        held = newest or f"the day {dataset.days[-1]}"
        raise DataError(
            f"the log in {dataset.path} ends at {held}, expected impressions of {hour - HOUR} or later; "
            f"import the log up to {hour} and try again"
        )


def stand(counted_us: Int, at_us: Int, schema: Schema) -> np.ndarray:
    """Bool [N]: whether counters of an hour (microseconds since 1970, 0 for none) stand at an instant."""
    age = at_us - counted_us
    shortest, longest = (each // timedelta(microseconds=1) for each in (delay(schema), life(schema)))
    return (counted_us > 0) & (age >= shortest) & (age < longest)


def only_standing(items: Columns, counted_us: Int, at_us: Int, schema: Schema) -> Columns:
    """``items`` with hourly counters that do not stand at ``at_us`` [N] as missing."""
    names = [feature.name for feature in items.layout.features if feature.origin is Origin.HOURLY]
    if not names or not (ended := ~stand(counted_us, at_us, schema)).any():
        return items
    standing = Columns(items.layout, {name: array.copy() for name, array in items.arrays.items()})
    for name in names:
        standing.values(name)[ended] = np.nan
    return standing
