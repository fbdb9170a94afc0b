"""Historical features: what a snapshot may see, and what it makes of it."""

import tempfile
from collections import defaultdict
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from freshrank.datasets.dataset import Dataset
from freshrank.errors import MissingArtifact
from freshrank.features import daily_aggregates, snapshots
from freshrank.features.daily_aggregates import KEYS, stale_days
from freshrank.schema import Entity, Kind
from freshrank.storage.derived import marked
from freshrank.storage.workspace import Workspace
from tests.tiny_log import FIRST, ITEMS, at, day, impression, log_schema, read_snapshots, snapshots_of, write_log

pytestmark = pytest.mark.integration

Log = list[dict[str, Any]]
SCHEMA = log_schema()


def snapshot(tmp_path: Path, log: Log, number: int, entity: Entity) -> dict[int, dict[str, Any]]:
    """Rows of the snapshot of day ``number``, by id."""
    dataset = write_log(tmp_path / "data", log)
    frames = snapshots_of(dataset, [day(number)])[day(number)]
    return {row[KEYS[entity]]: row for row in frames[entity].to_dicts()}


def test_item_counters_cover_their_windows_and_end_the_day_before(tmp_path: Path) -> None:
    """Of impressions on days 0..4, the 1-day window of day 4 holds day 3 and the 3-day window days 1..3."""
    log = [impression(number, user=1, item=1, click=number % 2) for number in range(5)]
    row = snapshot(tmp_path, log, 4, Entity.ITEM)[1]
    assert (row["item_impressions_1d"], row["item_click_1d"]) == (1, 1)
    assert (row["item_impressions_3d"], row["item_click_3d"]) == (3, 2)
    assert row["item_click_rate_3d"] == pytest.approx(2 / 3)


def test_a_rate_counts_observed_labels_only_and_is_null_without_any(tmp_path: Path) -> None:
    """Three impressions, labels 1, 0 and null: click rate 1/2; save was never observed: no rate, counter 0."""
    log = [impression(0, 1, 1, click, None, hour) for hour, click in enumerate((1, 0, None))]
    row = snapshot(tmp_path, log, 1, Entity.ITEM)[1]
    assert (row["item_impressions_1d"], row["item_click_rate_1d"]) == (3, 0.5)
    assert (row["item_save_1d"], row["item_save_rate_1d"]) == (0, None)


def test_the_sequence_keeps_the_last_engaged_items_oldest_first(tmp_path: Path) -> None:
    """Length 3 of four engaged impressions; equal times are ordered by item; the bits are click = 1, save = 2."""
    log = [
        impression(0, 1, 5, click=1),
        impression(1, 1, 3, click=1, save=1, hour=9),
        impression(1, 1, 2, click=0, save=1, hour=9),
        impression(1, 1, 4, click=0, save=None, hour=10),
        impression(2, 1, 1, click=1, save=None),
    ]
    row = snapshot(tmp_path, log, 3, Entity.USER)[1]
    assert row["sequence_item_ids"] == [2, 3, 1]
    assert row["sequence_actions"] == [2, 3, 1]


def test_the_sequence_forgets_what_is_older_than_the_lookback(tmp_path: Path) -> None:
    """With 3 days of lookback the snapshot of day 4 no longer holds the click of day 0."""
    log = [impression(0, 1, 1, click=1), impression(2, 1, 2, click=1)]
    assert snapshot(tmp_path, log, 4, Entity.USER)[1]["sequence_item_ids"] == [2]


def test_affinities_are_the_most_seen_categories_ties_by_value(tmp_path: Path) -> None:
    """Items 1 and 2 are of category 10, items 3 and 5 of 20, item 4 of none; the first tag of item 1 is 7."""
    log = [impression(0, 1, item, click=1, hour=item) for item in (3, 1, 4, 5, 2)]
    row = snapshot(tmp_path, log, 1, Entity.USER)[1]
    assert (row["affinity_category_values"], row["affinity_category_impressions"]) == ([10, 20], [2, 2])
    assert (row["affinity_category_click"], row["affinity_category_save"]) == ([2, 2], [0, 0])
    assert row["affinity_tags_values"] == [7, 8]


def test_an_entity_that_left_all_windows_gets_one_row_of_zeros(tmp_path: Path) -> None:
    """Seen on day 0 only, with 3 days of lookback: counted until day 3, zero on day 4, absent on day 5."""
    log = [impression(0, 1, 1, click=1)]
    last, left = (snapshot(tmp_path, log, number, Entity.USER)[1] for number in (3, 4))
    assert (last["user_impressions_3d"], last["sequence_item_ids"]) == (1, [1])
    assert (left["user_impressions_3d"], left["user_click_rate_3d"]) == (0, None)
    assert left["sequence_item_ids"] == left["affinity_category_values"] == []
    assert snapshot(tmp_path, log, 5, Entity.USER) == {}


def test_withheld_impressions_are_in_no_counter(tmp_path: Path) -> None:
    """Usage 'evaluation' is judged only; 'history' and 'training' are counted."""
    log = [impression(0, 1, 1, usage=usage) for usage in ("evaluation", "history", "training")]
    assert snapshot(tmp_path, log, 1, Entity.ITEM)[1]["item_impressions_1d"] == 2


def test_a_snapshot_stands_for_local_midnight(tmp_path: Path) -> None:
    """With an offset of +2 hours day 1 begins at 22:00 UTC of the date before; the row was known at once."""
    row = snapshot(tmp_path, [impression(0, 1, 1)], 1, Entity.ITEM)[1]
    assert row["snapshot_timestamp"] == row["created_timestamp"] == at(1, 0)


def test_moving_an_impression_to_the_day_itself_takes_it_out_of_the_snapshot(tmp_path: Path) -> None:
    """One minute before midnight is history, midnight is not."""
    before = [impression(1, 1, 1, hour=24 - 1 / 60), impression(0, 1, 1)]
    after = [impression(2, 1, 1, hour=0), impression(0, 1, 1)]
    counts = [snapshot(tmp_path, log, 2, Entity.ITEM)[1]["item_impressions_3d"] for log in (before, after)]
    assert counts == [2, 1]


def naive(log: Log, on: date, entity: Entity) -> list[dict[str, Any]]:
    """The snapshot of ``on``, from the definitions, one impression at a time."""
    key, lookback = KEYS[entity], SCHEMA.lookback_days
    seen: dict[int, Log] = defaultdict(list)
    for row in log:
        age = (on - _day(row)).days
        if 1 <= age <= lookback + 1 and row["usage"] != "evaluation":
            seen[row[key]].append(row | {"age": age})
    return [{key: owner} | _features(seen[owner], entity) for owner in sorted(seen)]


def _day(row: dict[str, Any]) -> date:
    return FIRST + timedelta(days=(row["event_timestamp"] - at(0, 0)).days)


def _features(rows: Log, entity: Entity) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for window in SCHEMA.history.windows:
        inside = [row for row in rows if row["age"] <= window]
        features[f"{entity}_impressions_{window}d"] = len(inside)
        for action in SCHEMA.actions:
            labels = [row[action] for row in inside if row[action] is not None]
            features[f"{entity}_{action}_{window}d"] = sum(labels)
            features[f"{entity}_{action}_rate_{window}d"] = sum(labels) / len(labels) if labels else None
    return features | (_lists(rows) if entity is Entity.USER else {})


def _lists(rows: Log) -> dict[str, Any]:
    inside = [row for row in rows if row["age"] <= SCHEMA.lookback_days]
    events = [(r["event_timestamp"], r["item_id"], (r["click"] or 0) + 2 * (r["save"] or 0)) for r in inside]
    last = sorted(event for event in events if event[2])[-SCHEMA.history.sequence_length :]
    lists: dict[str, Any] = {"sequence_item_ids": [e[1] for e in last], "sequence_actions": [e[2] for e in last]}
    return lists | _affinity(inside, "category") | _affinity(inside, "tags")


def _affinity(rows: Log, column: str) -> dict[str, Any]:
    values = dict(zip(ITEMS["item_id"], ITEMS[column].to_list(), strict=True))
    first = {
        item: (value[0] if value else None) if isinstance(value, list) else value for item, value in values.items()
    }
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        if (value := first[row["item_id"]]) is not None:
            for place, number in enumerate((1, row["click"] or 0, row["save"] or 0)):
                counts[value][place] += number
    top = sorted(counts, key=lambda value: (-counts[value][0], value))[: SCHEMA.history.affinity_size]
    names = [f"affinity_{column}_{part}" for part in ("impressions", *SCHEMA.actions)]
    return {f"affinity_{column}_values": top} | {
        name: [counts[value][place] for value in top] for place, name in enumerate(names)
    }


def assert_no_difference(dataset: Dataset, log: Log, days: list[date]) -> None:
    for on, frames in snapshots_of(dataset, days).items():
        for entity, frame in frames.items():
            schema = snapshots.history_schema(SCHEMA, entity)
            columns = [name for name in schema if not name.endswith("timestamp")]
            expected = pl.DataFrame(naive(log, on, entity), schema={name: schema[name] for name in columns})
            assert_frame_equal(frame.select(columns), expected)


label = st.sampled_from([0, 1, None])
impressions = st.builds(
    impression,
    number=st.integers(0, 7),
    user=st.integers(1, 3),
    item=st.integers(1, 5),
    click=label,
    save=label,
    hour=st.integers(0, 23),
    usage=st.sampled_from(["all", "history", "evaluation"]),
)


@settings(max_examples=15, deadline=None)
@given(log=st.lists(impressions, min_size=1, max_size=30), days=st.sets(st.integers(0, 12), min_size=1, max_size=4))
def test_snapshots_agree_with_a_count_by_hand(log: Log, days: set[int]) -> None:
    """Any log, any set of days computed together: the same numbers as the plain loop over impressions."""
    with tempfile.TemporaryDirectory() as folder:
        assert_no_difference(write_log(Path(folder) / "data", log), log, [day(number) for number in sorted(days)])


def test_a_log_that_grows_every_day_agrees_with_a_count_by_hand(tmp_path: Path) -> None:
    """One impression on day 0, two on day 1, and so on: no window can be another day's."""
    log = [impression(number, 1, 1, click=1, hour=hour) for number in range(5) for hour in range(number + 1)]
    assert_no_difference(write_log(tmp_path / "data", log), log, [day(3)])


@pytest.fixture
def built(tmp_path: Path) -> tuple[Dataset, Workspace]:
    dataset = write_log(tmp_path / "data", [impression(number, 1, 1, click=1) for number in range(6)])
    workspace = Workspace.of("tiny_log", tmp_path / "home")
    snapshots.build_history(dataset, workspace, [day(2), day(3)])
    return dataset, workspace


def _files(workspace: Workspace) -> dict[Path, tuple[int, bytes]]:
    """Of the snapshots."""
    paths = [path for entity in KEYS for path in (workspace.features / entity).rglob("*.parquet")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_files_hold_key_timestamps_and_features_in_schema_order(built: tuple[Dataset, Workspace]) -> None:
    """The file of a day has exactly the declared columns and dtypes."""
    frame = pl.read_parquet(snapshots.snapshot_path(built[1], Entity.USER, day(2)), hive_partitioning=False)
    assert dict(frame.schema) == snapshots.history_schema(SCHEMA, Entity.USER)
    assert frame.columns[3:] == [f.name for f in SCHEMA.select(Entity.USER, stored=True) if f.snapshot]
    assert set(snapshots.historical_kinds(SCHEMA, Entity.ITEM).values()) == {Kind.NUMERIC}


def test_a_day_whose_inputs_are_unchanged_is_not_rebuilt(built: tuple[Dataset, Workspace]) -> None:
    """Building again leaves the files as they are, to the modification time."""
    before = _files(built[1])
    snapshots.build_history(*built, [day(2), day(3)])
    assert _files(built[1]) == before


def test_a_changed_log_rebuilds_only_the_days_that_see_it(built: tuple[Dataset, Workspace], tmp_path: Path) -> None:
    """A new impression on day 2 is in the past of day 3 but not of day 2."""
    before = _files(built[1])
    dataset = write_log(tmp_path / "data", [impression(n, 1, 1, click=1) for n in range(6)] + [impression(2, 2, 2)])
    snapshots.build_history(dataset, built[1], [day(2), day(3)])
    changed = {path.parent.name for path, content in _files(built[1]).items() if before[path] != content}
    assert changed == {f"date={day(3)}"}


@pytest.mark.parametrize("entity", [Entity.USER, Entity.ITEM])
def test_a_day_killed_halfway_is_rebuilt_to_the_same_bytes(built: tuple[Dataset, Workspace], entity: Entity) -> None:
    """Whichever file was not written yet, the run after the kill ends where an undisturbed one does."""
    dataset, workspace = built
    before = {path: content for path, (_, content) in _files(workspace).items()}
    snapshots.snapshot_path(workspace, entity, day(3)).unlink()
    with pytest.raises(MissingArtifact, match="features build"):
        snapshots.require_history(dataset, workspace, [day(2), day(3)])
    snapshots.build_history(dataset, workspace, [day(2), day(3)])
    assert {path: content for path, (_, content) in _files(workspace).items()} == before


def test_the_first_day_of_a_log_has_an_empty_snapshot(tmp_path: Path) -> None:
    """Nothing came before it: no rows, all columns."""
    assert snapshot(tmp_path, [impression(0, 1, 1)], 0, Entity.USER) == {}


def test_backfill_and_daily_runs_write_the_same_bytes(tmp_path: Path) -> None:
    """Seven days at once, or each when it has come, with the log and the items that there were then."""
    log = [
        impression(n, 1 + k % 3, 1 + (n + k) % 5, click=k % 2, save=(n + k) % 2, hour=k)
        for n in range(7)
        for k in (3, 9)
    ]
    days = [day(number) for number in range(1, 8)]
    at_once, daily = (Workspace.of("tiny_log", tmp_path / name) for name in ("at_once", "daily"))
    snapshots.build_history(write_log(tmp_path / "whole", log), at_once, days)
    for number in range(1, 8):
        seen = [row for row in log if _day(row) < day(number)]
        known = ITEMS.filter(pl.col("created_at") < at(number, 0))
        snapshots.build_history(write_log(tmp_path / "growing", seen, items=known), daily, [day(number)])
    contents = [
        {path.relative_to(workspace.home): content for path, (_, content) in _files(workspace).items()}
        for workspace in (at_once, daily)
    ]
    assert len(contents[0]) == 14
    assert contents[0] == contents[1]


def test_a_days_run_reads_no_log_but_that_days(built: tuple[Dataset, Workspace]) -> None:
    """Without the files of the days before it, the next day's snapshot is written all the same."""
    dataset, workspace = built
    for number in (0, 1, 2):
        dataset.partition(day(number)).unlink()
    snapshots.build_history(dataset, workspace, [day(4)])
    assert read_snapshots(workspace, day(4))[Entity.ITEM]["item_impressions_3d"].to_list() == [3]


def test_an_item_that_is_born_later_makes_no_past_day_stale(built: tuple[Dataset, Workspace], tmp_path: Path) -> None:
    """Tomorrow's import brings new items: with another category for an old one the days that saw it are built anew."""
    log = [impression(number, 1, 1, click=1) for number in range(6)]
    newborn = ITEMS.tail(1).with_columns(
        item_id=pl.lit(7, pl.Int64), created_at=pl.lit(at(9), ITEMS["created_at"].dtype)
    )
    grown = write_log(tmp_path / "grown", log, items=pl.concat([ITEMS, newborn]))
    assert stale_days(grown, built[1], [day(0), day(1), day(2)]) == []
    moved = ITEMS.with_columns(pl.when(pl.col("item_id") == 1).then(99).otherwise("category").alias("category"))
    changed = write_log(tmp_path / "moved", log, items=moved)
    assert stale_days(changed, built[1], [day(0), day(1), day(2)]) == [day(0), day(1), day(2)]


def test_rows_that_come_late_are_counted_and_said(
    built: tuple[Dataset, Workspace], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of day 1, then one more: three in all; the snapshot of the day after knows them."""
    log = [impression(number, 1, 1, click=1) for number in range(6)]
    for late in (2, 3):
        more = [impression(1, 2, 2, hour=hour) for hour in range(late)]
        snapshots.build_history(write_log(tmp_path / "late", log + more), built[1], [day(2)])
    facts = marked(daily_aggregates.aggregates_directory(built[1], day(1)) / "built.json")
    assert (facts["rows"], facts["late"]) == (4, 3)
    assert "2 rows of 2024-03-02 came late" in caplog.text
    assert read_snapshots(built[1], day(2))[Entity.ITEM]["item_impressions_1d"].to_list() == [1, 3]
