"""Hourly counters of fresh items: what was pushed at an hour is what training replays, and nothing later."""

from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from freshrank.cli.main import app
from freshrank.datasets.dataset import Dataset
from freshrank.dates import parse_instant
from freshrank.errors import ConfigError, DataError, MissingArtifact
from freshrank.features import hourly
from freshrank.features.frames import Frame, load_frame, serving_frame
from freshrank.features.hourly import HOUR, build_hourly, hour_counters, standing_hour
from freshrank.features.snapshots import CREATED, build_history
from freshrank.features.store import FeatureStore, model_service
from freshrank.schema import HistoryConfig, Schema, hourly_names
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace
from tests.tiny_log import ITEMS, at, day, impression, log_schema, write_log

pytestmark = pytest.mark.integration

DELAY = timedelta(minutes=10)
NEW = 6
"""Born at 6:00 of day 3."""
BORN = at(3, 6)
IMPRESSIONS, (CLICKS, SAVES), (CLICK_RATE, SAVE_RATE) = hourly_names(["click", "save"])
NAMES = [IMPRESSIONS, CLICKS, SAVES, CLICK_RATE, SAVE_RATE]
MORNING = [
    impression(3, 1, NEW, click=1, hour=7 + 10 / 60),
    impression(3, 2, NEW, click=0, hour=7 + 50 / 60),
    impression(3, 3, NEW, click=None, save=None, hour=8 + 20 / 60),
    impression(3, 4, NEW, click=1, hour=8.5, usage="evaluation"),
]


def hourly_log_schema(**changed: object) -> Schema:
    history = {"windows": (1, 3), "sequence_length": 3, "hourly": True, "hourly_delay_minutes": 10} | changed
    return log_schema().model_copy(update={"fresh_days": 3.0, "history": HistoryConfig.model_validate(history)})


SCHEMA = hourly_log_schema()


@pytest.fixture
def morning(tmp_path: Path) -> FeatureStore:
    """Registered, with the counters of days 3 and 4 as files; nothing online."""
    return built(write_log(tmp_path / "data", MORNING, SCHEMA), tmp_path / "home")


def built(dataset: Dataset, home: Path) -> FeatureStore:
    store = FeatureStore(dataset, Workspace.of("tiny_log", home))
    build_history(dataset, store.workspace, [day(3), day(4)])
    build_hourly(dataset, store.workspace, [day(3), day(4)])
    store.apply()
    return store


def of_item(counters: pl.DataFrame, item: int) -> list[tuple[object, ...]]:
    return counters.filter(pl.col("item_id") == item).select(NAMES).rows()


def test_an_hour_counts_the_24_full_hours_before_it(morning: FeatureStore) -> None:
    """Two impressions from 7 to 8, one from 8 to 9 whose actions were not observed, one withheld: 0, 2, 3, and a day
    later 1 and 0. At 6:00 the item had just been born and has no row."""
    hours = [at(3, 6), at(3, 7), at(3, 8), at(3, 9), at(4, 8), at(4, 9)]
    counters = hour_counters(morning.dataset, hours)
    assert of_item(counters, NEW) == [
        (0, 0, 0, None, None),
        (2, 1, 0, 0.5, 0),
        (3, 1, 0, 0.5, 0),
        (1, 0, 0, None, None),
        (0, 0, 0, None, None),
    ]
    assert counters.schema == hourly.hourly_schema(SCHEMA)
    assert (counters[CREATED] - counters["snapshot_timestamp"] == DELAY).all()


def test_an_item_that_grew_out_of_being_fresh_has_nulls_until_its_last_numbers_have_ended(
    morning: FeatureStore,
) -> None:
    """Item 4 is three days old at 12:00 of day 2; its counters of 11:00 would stand until 13:10."""
    counters = hour_counters(morning.dataset, [at(2, hour) for hour in range(10, 18)])
    rows = counters.filter(pl.col("item_id") == 4)
    assert rows["snapshot_timestamp"].to_list() == [at(2, hour) for hour in (10, 11, 12, 13, 14)]
    assert rows[IMPRESSIONS].to_list() == [0, 0, None, None, None]
    assert {1, 2, 3}.isdisjoint(counters["item_id"])


minutes = st.integers(0, 40 * 60)


@hypothesis_settings(max_examples=15, deadline=None)
@given(shown=st.lists(st.tuples(minutes, st.sampled_from([1, 4, 5]), st.sampled_from([0, 1, None])), max_size=30))
def test_counters_equal_a_count_over_the_log(
    tmp_path_factory: pytest.TempPathFactory, shown: list[tuple[int, int, int | None]]
) -> None:
    """Any impressions of three items over 40 hours, counted in Python for every hour of them and a day more."""
    log = [impression(1, 1, item, click=click, hour=minute / 60) for minute, item, click in shown]
    dataset = write_log(tmp_path_factory.mktemp("any") / "data", [*log, impression(0, 1, 1)], SCHEMA)
    hours = [at(1, hour) for hour in range(64)]
    for row in hour_counters(dataset, hours).iter_rows(named=True):
        seen = [
            click
            for minute, item, click in shown
            if item == row["item_id"] and is_counted(at(1, minute / 60), row["snapshot_timestamp"])
        ]
        born = ITEMS.filter(pl.col("item_id") == row["item_id"])["created_at"].item()
        fresh = row["snapshot_timestamp"] - born < timedelta(days=3)
        assert row[IMPRESSIONS] == (len(seen) if fresh else None)
        assert row[CLICKS] == (seen.count(1) if fresh else None)
        assert row[CLICK_RATE] == pytest.approx(rate(seen) if fresh else None)


def is_counted(shown: datetime, hour: datetime) -> bool:
    return hour - timedelta(hours=24) <= shown < hour


def rate(clicks: list[int | None]) -> float | None:
    observed = [click for click in clicks if click is not None]
    return sum(observed) / len(observed) if observed else None


def test_an_impression_reads_the_hour_that_was_online_by_then(morning: FeatureStore) -> None:
    """With a delay of ten minutes 9:09 still reads what was counted until 8:00, and 9:10 what was until 9:00."""
    moments = [at(3, 6.5), at(3, 7 + 9 / 60), at(3, 9 + 9 / 60), at(3, 9 + 10 / 60), at(3, 9.99)]
    wanted = pl.DataFrame({"item_id": [NEW] * 5, "event_timestamp": moments}, schema_overrides={"item_id": pl.Int64})
    assert morning.offline_items(wanted)[IMPRESSIONS].to_list() == [None, None, 2, 3, 3]
    assert [standing_hour(moment, SCHEMA) for moment in moments[2:4]] == [at(3, 8), at(3, 9)]


def test_what_is_online_stands_from_its_delay_until_one_missed_push_later(morning: FeatureStore) -> None:
    """The counters of 9:00: null at 9:09, there from 9:10 until just before 11:10, then missing and not stale."""
    assert morning.push_hourly(at(3, 9)) == 1
    moment, last = timedelta(microseconds=1), at(3, 11) + DELAY
    at_times = [at(3, 9) + DELAY - moment, at(3, 9) + DELAY, last - moment, last, at(9)]
    read = [morning.online_items([NEW], each)[IMPRESSIONS].item() for each in at_times]
    assert read == [None, 3, 3, None, None]
    assert morning.online_items([NEW])[IMPRESSIONS].to_list() == [None]


def test_a_push_can_be_repeated_and_never_goes_back(morning: FeatureStore, caplog: pytest.LogCaptureFixture) -> None:
    """9:00 twice, then 8:00: the store holds 9:00 and the log says that 8:00 came too late."""
    morning.push_hourly(at(3, 9))
    before = morning.online_items([4, 5, NEW, 99], at(3, 9.5))
    morning.push_hourly(at(3, 9))
    assert morning.push_hourly(at(3, 8)) == 0
    assert_frame_equal(morning.online_items([4, 5, NEW, 99], at(3, 9.5)), before)
    assert "received the earlier" in caplog.text


def test_a_log_that_does_not_reach_the_hour_is_not_pushed_as_nobody_came(morning: FeatureStore) -> None:
    """The last impression is of 8:30: 9:00 can be counted, 10:00 cannot; what is online stays and ends by itself."""
    morning.push_hourly(at(3, 9))
    with pytest.raises(DataError, match="import the log"):
        morning.push_hourly(at(3, 10))
    assert morning.online_items([NEW], at(3, 10.5))[IMPRESSIONS].to_list() == [3]


def test_what_cannot_be_pushed_is_refused_by_name(morning: FeatureStore, tmp_path: Path) -> None:
    """Half an hour, an hour without zone, a schema without hourly counters."""
    for hour in (at(3, 8.5), at(3, 8).replace(tzinfo=None)):
        with pytest.raises(ConfigError, match="full hour in UTC"):
            morning.push_hourly(hour)
    plain = FeatureStore(write_log(tmp_path / "plain", MORNING), Workspace.of("tiny_log", tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"history\.hourly"):
        plain.push_hourly(at(3, 9))


def test_a_frame_without_the_counters_of_its_days_is_refused(tmp_path: Path) -> None:
    """Training must not take new items for items of which nothing is known."""
    dataset, workspace = write_log(tmp_path / "data", MORNING, SCHEMA), Workspace.of("tiny_log", tmp_path / "home")
    build_history(dataset, workspace, [day(3)])
    with pytest.raises(MissingArtifact, match="hourly counters"):
        load_frame(dataset, workspace, [day(3)])


def test_a_schema_without_hourly_counters_is_written_as_before_there_were_any() -> None:
    """Fingerprints, features and files of existing data sets stay as they are."""
    plain = log_schema()
    assert not [name for name in plain.history.model_dump() if "hourly" in name]
    assert not [feature.name for feature in plain.features() if feature.name.endswith("24h")]
    assert "hourly" in SCHEMA.history.model_dump()


# ---------------------------------------------------------------- replay

EVENING = range(21, 27)
"""Hours of day 3 that are pushed, over midnight."""


def evening_log(seed: int) -> list[dict[str, object]]:
    """Impressions at random minutes, of the new item among others, at least one an hour; while the counters of 23:00
    stand, the new item is shown at 0:05 alone, when those of 0:00 can be counted and are not yet known."""
    quiet = range(23 * 60 + 10, 24 * 60 + 10)
    minutes = pl.Series([each for each in range(20 * 60, 27 * 60) if each not in quiet]).sample(60, seed=seed).to_list()
    items = [[NEW, NEW, 4, 1][(minute + seed) % 4] for minute in minutes]
    filler = [impression(3, 2, 2, hour=hour) for hour in range(20, 27)]
    filler.append(impression(3, 1, NEW, hour=24 + 5 / 60))
    return filler + [
        impression(3, 1, item, click=minute % 2, hour=minute / 60) for minute, item in zip(minutes, items, strict=True)
    ]


def replayed(store: FeatureStore) -> pl.DataFrame:
    """What training reads: every impression with the hourly counters of its item."""
    frame = load_frame(store.dataset, store.workspace, [day(3), day(4)])
    rows = frame.rows.filter(pl.col("event_timestamp") >= at(3, EVENING[0]) + DELAY)
    return rows.select("event_timestamp", "item_id").with_columns(frame.items[rows["item_row"]].select(NAMES))


def pushed(store: FeatureStore, log: list[dict[str, object]], asked: pl.DataFrame, scratch: Path) -> pl.DataFrame:
    """What serving read: each hour pushed from the log as it was then, and asked by the impressions until the next."""
    answers = []
    for number in EVENING:
        hour = at(3, number)
        known = [row for row in log if row["event_timestamp"] < hour + DELAY]
        store.dataset = write_log(scratch / str(number), known, SCHEMA)
        store.push_hourly(hour)
        for row in asked.filter(pl.col("event_timestamp").is_between(hour + DELAY, hour + DELAY + HOUR, "left")).rows():
            answers.append(store.online_items([row[1]], row[0]).select(pl.lit(row[0]).alias("at"), "item_id", *NAMES))
    return pl.concat(answers).rename({"at": "event_timestamp"}).cast(dict(asked.schema))


@pytest.fixture(params=[0, 1])
def evening(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[dict[str, object]], Dataset]:
    log = evening_log(request.param)
    return log, write_log(tmp_path / "whole", log, SCHEMA)


def test_training_replays_what_was_pushed_for_every_impression(
    evening: tuple[list[dict[str, object]], Dataset], tmp_path: Path
) -> None:
    """Six hours over midnight, pushed one after the other from the log as far as it was known; the frame, built days
    later from the whole log, holds the same numbers for each impression."""
    log, dataset = evening
    replay = replayed(built(dataset, tmp_path / "trainer"))
    online = pushed(built(dataset, tmp_path / "server"), log, replay, tmp_path)
    assert_frame_equal(online, replay, check_exact=True)
    new = replay.filter(pl.col("item_id") == NEW)
    assert new[IMPRESSIONS].n_unique() > 3
    assert replay.filter(pl.col("item_id") == 1)[IMPRESSIONS].null_count() > 0


def test_a_served_frame_equals_the_trainers_while_the_hour_stands(morning: FeatureStore) -> None:
    """Item 6 requested at 8:20 of day 3, after the push of 8:00: the item row of the frame, exactly."""
    morning.materialize(day(3))
    morning.push_hourly(at(3, 8))
    frame: Frame = load_frame(morning.dataset, morning.workspace, [day(3)])
    row = frame.rows.filter(pl.col("user_id") == 3).row(0, named=True)
    served = serving_frame(morning, 3, [NEW], row["event_timestamp"])
    assert served.items[IMPRESSIONS].to_list() == [2]
    assert_frame_equal(served.items, frame.items[[row["item_row"]]], check_exact=True)


def test_an_item_has_a_row_per_day_and_per_hour_that_its_counters_stand(morning: FeatureStore) -> None:
    """Item 6 was shown twice while its counters of 7:00 stood, and twice while those of 8:00 did."""
    frame = load_frame(morning.dataset, morning.workspace, [day(3)])
    assert frame.items["item_id"].to_list() == [NEW] * 2
    assert frame.items[IMPRESSIONS].to_list() == [0, 2]
    assert frame.items.columns[:2] == ["item_id", "day"]


# ---------------------------------------------------------------- services


def test_a_version_has_a_service_of_what_it_reads(tmp_path: Path) -> None:
    """A ranker without the sibling prior and without hourly counters: its service has neither."""
    schema = hourly_log_schema(siblings=("category",))
    store = FeatureStore(write_log(tmp_path / "data", MORNING, schema), Workspace.of("tiny_log", tmp_path / "home"))
    store.apply()
    plain = schema.model_copy(update={"history": schema.history.model_copy(update={"siblings": (), "hourly": False})})
    store.register_model(3, plain)
    whole, part = (features_of(store, name) for name in ("ranking", model_service(3)))
    assert whole - part == {
        "sibling_category_impressions",
        "sibling_category_click_rate",
        "sibling_category_save_rate",
        *NAMES,
    }
    assert part == {f.name for f in plain.features() if f.stored} | {"created_at_us"}


def features_of(store: FeatureStore, service: str) -> set[str]:
    views = store._feast.get_feature_service(service).feature_view_projections
    return {feature.name for view in views for feature in view.features}


# ---------------------------------------------------------------- commands


def test_the_commands_push_and_show_what_stands_at_a_time(
    morning: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`features push --at` pushes the hour that stands then; `features get --at` shows it as long as it does."""
    monkeypatch.setenv("FRESHRANK_HOME", str(morning.workspace.home))
    settings.cache_clear()
    data, moment = ["--data", str(morning.dataset.path)], ["--at", at(3, 9.5).isoformat()]
    shown = ["features", "get", *data, "--item", str(NEW)]
    said = [
        CliRunner().invoke(app, words).output for words in (["features", "push", *data, *moment], shown + moment, shown)
    ]
    settings.cache_clear()
    assert f"counters until {at(3, 9).isoformat()}: 1 items" in said[0]
    assert f'"{IMPRESSIONS}": 3.0' in said[1]
    assert f'"{IMPRESSIONS}": null' in said[2]


@pytest.mark.parametrize("moment", ["noon", "2024-03-04T09:30:00"])
def test_a_time_that_is_none_or_has_no_zone_is_refused(moment: str) -> None:
    """An hour more or less would be another hour's counters."""
    with pytest.raises(ConfigError, match="time with its zone"):
        parse_instant(moment)
