"""Daily aggregates of the log, from which snapshots are summed.

A day's run reads its own day of the log and the parts of the days before it, never their log. So a backfill and one
run a day give the same numbers by construction. ``<features>/daily/date=YYYY-MM-DD/`` holds, each with the ``day``:

``user.parquet``, ``item.parquet``  per entity: ``impressions``, ``positive_<action>``, ``observed_<action>``
``affinity_<column>.parquet``       per user and category: ``impressions``, ``positive_<action>``
``engaged.parquet``                 per user the last ``sequence_length`` impressions with an action: time, item,
                                    ``mask`` (bit per positive action)
``built.json``                      its fingerprint, rows of the log, how many of them came after it was first built
"""

import logging
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from functools import reduce
from pathlib import Path
from typing import Any

from freshrank.datasets.dataset import Dataset
from freshrank.features.engines import Engine, Table, open_engine
from freshrank.schema import EVENT_TIMESTAMP, IN_HISTORY, ITEM_ID, USAGE, USER_ID, Entity, Kind, Schema
from freshrank.storage.derived import fingerprint_of, is_current, marked, marking
from freshrank.storage.files import atomic_directory
from freshrank.storage.workspace import Workspace

KEYS = {Entity.USER: USER_ID, Entity.ITEM: ITEM_ID}
DAY = "day"
CATEGORY = "category"
MASK = "mask"
ENGAGED = "engaged"
_BUILT = "built.json"

log = logging.getLogger(__name__)


def aggregates_directory(workspace: Workspace, day: date) -> Path:
    return workspace.features / "daily" / f"date={day.isoformat()}"


def aggregate_path(workspace: Workspace, day: date, part: str) -> Path:
    return aggregates_directory(workspace, day) / f"{part}.parquet"


def affinity_aggregate(column: str) -> str:
    return f"affinity_{column}"


def aggregate_names(schema: Schema) -> list[str]:
    return [*KEYS, ENGAGED, *map(affinity_aggregate, schema.history.affinity)]


def aggregates_fingerprint(dataset: Dataset, day: date) -> str:
    """Changes when the day's log does, the categories of items that existed by its end, or code."""
    history = dataset.schema.history
    settings = {"actions": dataset.schema.actions, "length": history.sequence_length, "affinity": history.affinity}
    items = dataset.items_fingerprint(day, history.affinity)
    return fingerprint_of(
        {"settings": settings, "items": items, "log": dataset.log_fingerprint([day])}, build_daily_aggregates
    )


def _marker(workspace: Workspace, day: date) -> Path:
    return aggregates_directory(workspace, day) / _BUILT


def stale_days(dataset: Dataset, workspace: Workspace, days: Sequence[date]) -> list[date]:
    """Those of ``days`` in the log whose parts are missing or of other inputs or code, ascending."""
    present = sorted(set(days) & set(dataset.days))
    return [day for day in present if not is_current(_marker(workspace, day), aggregates_fingerprint(dataset, day))]


def build_daily_aggregates(dataset: Dataset, workspace: Workspace, days: Sequence[date]) -> Iterator[date]:
    """Write the aggregates of each of ``days`` and yield the day once they are written."""
    if not days:
        return
    queries: dict[str, str] = {}
    with open_engine() as engine:
        items = engine.read([dataset.path / "items.parquet"])
        for day in days:
            log = engine.view("log_of_day", read_log(engine, dataset, day))
            queries = queries or {n: engine.compile(t) for n, t in daily_aggregates(log, items, dataset.schema).items()}
            _write(engine, dataset, workspace, day, queries)
            yield day


def _write(engine: Engine, dataset: Dataset, workspace: Workspace, day: date, queries: dict[str, str]) -> None:
    before, rows = marked(_marker(workspace, day)), dataset.rows(day)
    late = max(0, rows - before.get("rows", rows))
    if late:
        log.warning(
            "history: %d rows of %s came late, after its features were built; later days' snapshots are built "
            "anew with them, though what was served did not know them",
            late,
            day,
        )
    expected = aggregates_fingerprint(dataset, day)
    with (
        atomic_directory(aggregates_directory(workspace, day)) as directory,
        marking(directory / _BUILT, expected, rows=rows, late=before.get("late", 0) + late),
    ):
        for name, query in queries.items():
            engine.write(query, directory / f"{name}.parquet")


def read_log(engine: Engine, dataset: Dataset, day: date) -> Table:
    """The impressions of ``day`` that feed history: keys, event_timestamp, ``day``, actions."""
    import ibis

    log = engine.read([dataset.partition(day)])
    log = log.filter(log[USAGE].isin([usage.value for usage in IN_HISTORY]))
    return log.select(USER_ID, ITEM_ID, EVENT_TIMESTAMP, *dataset.schema.actions, **{DAY: ibis.literal(day)})


def daily_aggregates(log: Table, items: Table, schema: Schema) -> dict[str, Table]:
    """All aggregates of one day, by name."""
    parts = {entity.value: _counts(log, [key], schema.actions) for entity, key in KEYS.items()}
    parts[ENGAGED] = _engaged(log, schema)
    parts |= {
        affinity_aggregate(column): _by_category(log, items, schema, column) for column in schema.history.affinity
    }
    return parts


def _counts(log: Table, keys: list[str], actions: list[str], observed: bool = True) -> Table:
    """Impressions, and per action the positive and the observed ones, per ``keys``."""
    sums = {"impressions": log.count()}
    sums |= {f"positive_{action}": positive(log, action).sum() for action in actions}
    if observed:
        sums |= {f"observed_{action}": log[action].count() for action in actions}
    counted = log.group_by(*keys, DAY).aggregate(**{name: value.cast("int64") for name, value in sums.items()})
    return counted.order_by(keys)


def positive(log: Table, action: str) -> Any:
    return (log[action] == 1).fill_null(False).cast("int64")


def _by_category(log: Table, items: Table, schema: Schema, column: str) -> Table:
    several = schema.items[column].kind is Kind.MULTI_VALUED
    categories = items.select(ITEM_ID, **{CATEGORY: items[column][0] if several else items[column]})
    joined = log.inner_join(categories.drop_null(CATEGORY), ITEM_ID)
    return _counts(joined, [USER_ID, CATEGORY], schema.actions, observed=False)


def _engaged(log: Table, schema: Schema) -> Table:
    """No sequence reaches further back into a day than its own length."""
    mask = reduce(
        lambda left, right: left + right,
        [positive(log, action) * (1 << bit) for bit, action in enumerate(schema.actions)],
    )
    engaged = log.mutate(**{MASK: mask}).filter(lambda t: t[MASK] > 0)
    last = latest(engaged, schema.history.sequence_length)
    return last.select(USER_ID, DAY, EVENT_TIMESTAMP, ITEM_ID, MASK).order_by(SEQUENCE_ORDER)


SEQUENCE_ORDER = [USER_ID, EVENT_TIMESTAMP, ITEM_ID, MASK]


def latest(engaged: Table, length: int) -> Table:
    """The last ``length`` rows of each user, by time, item and mask."""
    import ibis

    order = [ibis.desc(engaged[name]) for name in SEQUENCE_ORDER[1:]]
    place = ibis.row_number().over(ibis.window(group_by=USER_ID, order_by=order))
    numbered = engaged.mutate(place=place)
    return numbered.filter(numbered.place < length).drop("place")


def reach_days(dataset: Dataset, day: date) -> list[date]:
    """The days in the log that the snapshot of ``day`` is summed from, ascending."""
    first = day - timedelta(days=dataset.schema.lookback_days + 1)
    return [seen for seen in dataset.days if first <= seen < day]
