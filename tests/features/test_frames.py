"""Frames: impressions with the features their users and items had that day."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from freshrank.datasets.dataset import Dataset
from freshrank.errors import MissingArtifact
from freshrank.features.frames import Frame, empty_frame, load_frame, serving_frame
from freshrank.features.snapshots import CREATED, build_history, snapshot_path
from freshrank.features.store import FeatureStore, stored_schema
from freshrank.schema import IN_EVALUATION, IN_TRAINING, Entity
from freshrank.storage.workspace import Workspace
from tests.tiny_log import at, day, impression, log_schema, write_log

pytestmark = pytest.mark.integration

SCHEMA = log_schema()
DAYS = [day(number) for number in range(6)]
LOG = [
    impression(0, 1, 1, hour=1, usage="history"),
    impression(1, 1, 1, click=1, hour=1),
    impression(1, 2, 1, save=None, hour=1),
    impression(1, 1, 3, hour=20),
    impression(2, 3, 5, click=None, hour=0, usage="training"),
    impression(3, 1, 6, click=1, save=1, hour=6),
    impression(3, 1, 1, hour=18, usage="evaluation"),
    impression(3, 4, 2, hour=18, usage="evaluation"),
    impression(4, 2, 6, hour=6),
    impression(4, 1, 1, hour=12),
    impression(4, 3, 4, hour=12),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Workspace]:
    return make_world(tmp_path_factory.mktemp("frames"), LOG)


def make_world(root: Path, log: list[dict[str, object]]) -> tuple[Dataset, Workspace]:
    dataset, workspace = write_log(root / "data", log), Workspace.of("tiny_log", root / "home")
    build_history(dataset, workspace, DAYS)
    return dataset, workspace


@pytest.fixture(scope="module")
def frame(world: tuple[Dataset, Workspace]) -> Frame:
    return load_frame(*world, DAYS)


@pytest.fixture(scope="module")
def store(world: tuple[Dataset, Workspace]) -> FeatureStore:
    """Online holds day 4."""
    store = FeatureStore(*world)
    store.apply()
    store.materialize(day(4))
    return store


def assert_same(left: Frame, right: Frame) -> None:
    for table in ("users", "items", "rows"):
        assert_frame_equal(getattr(left, table), getattr(right, table), check_exact=True)


def test_rows_are_ordered_by_time_user_and_item(frame: Frame) -> None:
    """Rows of usage 'history' are in no frame; the other ten are in the log's order."""
    assert frame.rows.height == len(LOG) - 1
    assert_frame_equal(frame.rows, frame.rows.sort("event_timestamp", "user_id", "item_id"))


def test_rows_point_at_their_user_and_item_of_the_day(frame: Frame) -> None:
    """Following user_row and item_row gives the row's own ids and day; each (entity, day) is held once."""
    for entity, table in ((Entity.USER, frame.users), (Entity.ITEM, frame.items)):
        pointed = table[frame.rows[f"{entity}_row"]].select(f"{entity}_id", "day")
        assert_frame_equal(pointed, frame.rows.select(f"{entity}_id", "day"))
        assert table.select(f"{entity}_id", "day").is_unique().all()
        assert table.columns == [f"{entity}_id", "day", *list(stored_schema(SCHEMA, entity))[1:]]


def test_features_are_those_of_the_snapshot_at_midnight(world: tuple[Dataset, Workspace], frame: Frame) -> None:
    """Joined on the calendar day, without Feast: the same numbers, null where there was no snapshot."""
    for entity, table in ((Entity.USER, frame.users), (Entity.ITEM, frame.items)):
        parts = [
            pl.read_parquet(snapshot_path(world[1], entity, each), hive_partitioning=False).with_columns(day=each)
            for each in DAYS
        ]
        joined = table.select(f"{entity}_id", "day").join(
            pl.concat(parts), on=[f"{entity}_id", "day"], how="left", maintain_order="left"
        )
        names = [name for name in joined.columns if name in table.columns]
        assert_frame_equal(table.select(names), joined.select(names), check_exact=True)


def test_age_is_in_days_since_creation_and_never_negative(frame: Frame) -> None:
    """Item 6 was created at 6:00 of day 3: 0 days old when first shown, 1 day old a day later."""
    ages = frame.rows.filter(pl.col("item_id") == 6)["item_age_days"]
    assert ages.to_list() == [0.0, 1.0]
    assert ages.dtype == pl.Float32
    assert frame.rows["judged_age_days"].equals(frame.rows["item_age_days"].alias("judged_age_days"))


def test_exposures_count_earlier_days_that_feed_history(frame: Frame) -> None:
    """Item 1: one impression on day 0, two on day 1, one withheld on day 3, so 1, 1, 3 and 3 before each."""
    assert frame.rows.filter(pl.col("item_id") == 1)["exposures"].to_list() == [1, 1, 3, 3]
    assert frame.rows["exposures"].dtype == pl.Int64


def test_a_frame_of_one_usage_holds_only_what_its_rows_need(world: tuple[Dataset, Workspace], frame: Frame) -> None:
    """Evaluation rows without training's, and the reverse, each pointing at the right user and item."""
    training, evaluation = load_frame(*world, DAYS, IN_TRAINING), load_frame(*world, DAYS, IN_EVALUATION)
    assert set(training.rows["usage"]) == {"all", "training"}
    assert set(evaluation.rows["usage"]) == {"all", "evaluation"}
    for part in (training, evaluation):
        test_rows_point_at_their_user_and_item_of_the_day(part)
        assert part.users.height == part.rows["user_row"].n_unique()
        assert part.items.height == part.rows["item_row"].n_unique()


def test_days_loaded_one_by_one_are_the_days_loaded_together(tmp_path: Path, frame: Frame) -> None:
    """The cache of a day does not depend on which days were asked for with it."""
    world = make_world(tmp_path, LOG)
    days = [load_frame(*world, [each]) for each in DAYS[1:5]]
    assert_frame_equal(pl.concat([each.users for each in days]), frame.users)
    rows = pl.concat([each.rows for each in days]).drop("user_row", "item_row")
    assert_frame_equal(rows, frame.rows.drop("user_row", "item_row"))
    assert_same(load_frame(*world, DAYS), frame)


def test_a_cached_day_is_read_again_not_built_again(
    world: tuple[Dataset, Workspace], frame: Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything cached Feast is not asked."""
    monkeypatch.setattr("freshrank.features.frames.FeatureStore", None)
    assert_same(load_frame(*world, DAYS), frame)


def test_what_happens_on_a_day_or_later_changes_no_feature_of_that_day(tmp_path: Path) -> None:
    """The same morning of day 2 before two different futures: equal users, items, exposures and ages."""
    past = [impression(0, 1, 1, click=1), impression(1, 2, 1), impression(2, 1, 1, hour=1)]
    future = [impression(2, 1, 1, click=1, save=1, hour=hour) for hour in range(2, 20)] + [impression(3, 1, 1, click=1)]
    quiet = load_frame(*make_world(tmp_path / "quiet", past), [day(2)])
    busy = load_frame(*make_world(tmp_path / "busy", past + future), [day(2)])
    assert_frame_equal(quiet.users, busy.users)
    assert_frame_equal(quiet.items, busy.items)
    names = ["item_age_days", "exposures"]
    assert_frame_equal(quiet.rows.select(names), busy.rows.head(1).select(names))


def test_what_is_written_during_a_day_reaches_none_of_its_impressions(tmp_path: Path) -> None:
    """The snapshots of day 2 are mended to 90 impressions at noon: user 1 and item 1, shown at 8:00 and at 20:00, are
    read as of 8:00 for both."""
    log = [impression(1, 1, 1), impression(2, 1, 1, hour=8), impression(2, 1, 1, hour=20)]
    dataset, workspace = write_log(tmp_path / "data", log), Workspace.of("tiny_log", tmp_path / "home")
    build_history(dataset, workspace, [day(2)])
    for entity in (Entity.USER, Entity.ITEM):
        path = snapshot_path(workspace, entity, day(2))
        written = pl.read_parquet(path, hive_partitioning=False)
        late = written.with_columns(pl.lit(at(2, 12)).alias(CREATED), pl.lit(90).alias(f"{entity}_impressions_3d"))
        late.cast(dict(written.schema)).write_parquet(path.with_name("mended.parquet"))
    frame = load_frame(dataset, workspace, [day(2)])
    assert frame.rows.height == 2
    assert frame.users["user_impressions_3d"].to_list() == frame.items["item_impressions_3d"].to_list() == [1.0]


def test_a_frame_without_snapshots_is_refused(tmp_path: Path) -> None:
    """Training must not silently see every history as missing."""
    dataset = write_log(tmp_path / "data", LOG)
    with pytest.raises(MissingArtifact, match="features build"):
        load_frame(dataset, Workspace.of("tiny_log", tmp_path / "home"), [day(3)])


def test_days_the_log_lacks_give_an_empty_frame_of_the_same_columns(
    world: tuple[Dataset, Workspace], frame: Frame
) -> None:
    """No impressions: no rows, every column, every dtype."""
    assert_same(load_frame(*world, [day(40)]), empty_frame(SCHEMA))
    assert all(getattr(empty_frame(SCHEMA), name).schema == getattr(frame, name).schema for name in ("users", "items"))
    assert empty_frame(SCHEMA).rows.schema == frame.rows.schema


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, 2), extra=st.lists(st.sampled_from([2, 3, 77, -5]), max_size=5))
def test_an_online_frame_equals_the_offline_one_of_that_impression(
    store: FeatureStore, frame: Frame, place: int, extra: list[int]
) -> None:
    """Every impression of day 4, requested among other candidates: the same user, item, age and context, exactly."""
    row = frame.rows.filter(pl.col("day") == day(4)).row(place, named=True)
    candidates = [*extra, row["item_id"]]
    context = {"surface": np.full(len(candidates), row["surface"])}
    served = serving_frame(store, row["user_id"], candidates, row["event_timestamp"], context)
    assert_frame_equal(served.users, frame.users[[row["user_row"]]], check_exact=True)
    assert_frame_equal(served.items[-1:], frame.items[[row["item_row"]]], check_exact=True)
    shared = ["event_timestamp", "day", "user_id", "item_id", "surface", "item_age_days"]
    assert served.rows.row(-1, named=True) | {name: row[name] for name in shared} == served.rows.row(-1, named=True)
    assert served.rows.schema == frame.rows.schema


def test_unknown_ids_are_served_as_new_and_empty(store: FeatureStore) -> None:
    """Nobody and nothing known: one user row and two item rows of nulls, age 0, labels null."""
    served = serving_frame(store, -7, [901, 902], at(4))
    assert served.users.drop("user_id", "day").null_count().row(0) == (1,) * (served.users.width - 2)
    assert served.items.drop("item_id", "day").null_count().row(0) == (2,) * (served.items.width - 2)
    assert served.rows["item_age_days"].to_list() == [0.0, 0.0]
    assert served.rows["user_row"].to_list() == [0, 0]
    assert served.rows["item_row"].to_list() == [0, 1]
    assert served.rows.select("click", "save", "surface").null_count().row(0) == (2, 2, 2)


def test_an_item_shown_before_its_creation_time_has_age_zero(store: FeatureStore) -> None:
    """Clocks differ; an age is never negative."""
    assert serving_frame(store, 1, [6], at(3, 6) - timedelta(hours=2)).rows["item_age_days"].to_list() == [0.0]
