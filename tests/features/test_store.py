"""The feature store: what was known when, the same offline and online."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.writer import write_dataset
from freshrank.errors import MissingArtifact
from freshrank.features import store as module
from freshrank.features.snapshots import CREATED, build_history, snapshot_path
from freshrank.features.store import CREATED_AT_US, FeatureStore, stored_schema
from freshrank.schema import EVENT_TIMESTAMP, SNAPSHOT, Entity
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace
from tests.tiny_log import ITEMS, USERS, UTC_TIMESTAMP, at, day, impression, log_schema, write_log

pytestmark = pytest.mark.integration

SCHEMA = log_schema()
BIG = 2**60 + 1
LAST = 9
LOG = [
    *(impression(number, user=1, item=1 + number % 5, click=number % 2, hour=number) for number in range(8)),
    impression(0, user=2, item=2, click=1, save=None),
    impression(2, user=3, item=3, click=None, save=None),
    impression(5, user=3, item=5, click=1, save=1),
    impression(3, user=4, item=6, click=0, hour=7),
]


def history_days() -> list[int]:
    """Days whose snapshots exist: day 6 is missing."""
    return [number for number in range(LAST + 1) if number != 6]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_log(tmp_path_factory.mktemp("store") / "data", LOG)


@pytest.fixture(scope="module")
def applied(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Registered, with snapshots, nothing online: for offline reads."""
    workspace = Workspace.of("tiny_log", tmp_path_factory.mktemp("applied"))
    build_history(dataset, workspace, [day(number) for number in history_days()])
    store = FeatureStore(dataset, workspace)
    store.apply()
    return store


@pytest.fixture(scope="module")
def online(applied: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Materialized for day 4."""
    store = copy_of(applied, tmp_path_factory.mktemp("online"))
    store.materialize(day(4))
    return store


@pytest.fixture
def fresh(applied: FeatureStore, tmp_path: Path) -> FeatureStore:
    return copy_of(applied, tmp_path)


def copy_of(applied: FeatureStore, home: Path) -> FeatureStore:
    """The same snapshots under a registry and an online store of its own."""
    workspace = Workspace.of("tiny_log", home)
    shutil.copytree(applied.workspace.features, workspace.features)
    store = FeatureStore(applied.dataset, workspace)
    store.apply()
    return store


def keys(name: str, rows: list[tuple[int, int, float]]) -> pl.DataFrame:
    table = {name: [row[0] for row in rows], "event_timestamp": [at(row[1], row[2]) for row in rows]}
    return pl.DataFrame(table, schema={name: pl.Int64, "event_timestamp": UTC_TIMESTAMP})


def expected(store: FeatureStore, entity: Entity, wanted: pl.DataFrame) -> pl.DataFrame:
    """The same read by pandas' merge_asof over the files, snapshots valid for less than a day."""
    files = [snapshot_path(store.workspace, entity, day(number)) for number in history_days()]
    history = pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in files])
    static = pl.read_parquet(module.static_path(store.workspace, entity))
    extra = [CREATED_AT_US] if entity is Entity.ITEM else []
    parts = [
        merged_as_of(wanted, history, entity, SNAPSHOT, pd.Timedelta(days=1) - pd.Timedelta(microseconds=1)),
        merged_as_of(wanted, static, entity, EVENT_TIMESTAMP, None),
    ]
    read = {name: part[name] for part in parts for name in part.columns} | {f"{entity}_id": wanted[f"{entity}_id"]}
    return pl.DataFrame(read).select(*stored_schema(SCHEMA, entity), *extra)


def merged_as_of(
    wanted: pl.DataFrame, table: pl.DataFrame, entity: Entity, instant: str, tolerance: pd.Timedelta | None
) -> pl.DataFrame:
    """The row of ``table`` that pandas finds for each of ``wanted``; nulls where it finds none."""
    key = f"{entity}_id"
    rows = table.select(key, known=instant).with_row_index("row").to_pandas().sort_values("known")
    asked = wanted.with_row_index("place").to_pandas().sort_values("event_timestamp", kind="stable")
    merged = pd.merge_asof(asked, rows, left_on="event_timestamp", right_on="known", by=key, tolerance=tolerance)
    places = pl.from_pandas(merged[["place", "row"]]).sort("place")["row"]
    return table.select(pl.all().gather(places.cast(pl.UInt32)))


moments = st.tuples(st.integers(1, 7), st.integers(-1, LAST), st.sampled_from([0, 0.5, 7, 12, 23.999]))


@hypothesis_settings(max_examples=10, deadline=None)
@given(rows=st.lists(moments, min_size=1, max_size=25))
def test_offline_reads_equal_merge_asof_row_for_row(applied: FeatureStore, rows: list[tuple[int, int, float]]) -> None:
    """Any ids, known or not, at any instants, repeated or not: same values, same number of rows, same order."""
    users, items = keys("user_id", rows), keys("item_id", rows)
    assert_frame_equal(applied.offline_users(users), expected(applied, Entity.USER, users))
    assert_frame_equal(applied.offline_items(items), expected(applied, Entity.ITEM, items))


def test_an_impression_sees_the_snapshot_of_its_own_day_from_midnight_on(applied: FeatureStore) -> None:
    """User 1 was shown one item a day: on day 2 the 3-day counter says 2, at midnight and late alike."""
    read = applied.offline_users(keys("user_id", [(1, 2, 0), (1, 2, 23.9), (1, 1, 23.9)]))
    assert read["user_impressions_3d"].to_list() == [2.0, 2.0, 1.0]


def test_a_missing_snapshot_reads_as_missing_not_as_the_day_before(applied: FeatureStore) -> None:
    """Day 6 was never built: its history is null, the profile is there; day 7 is whole again."""
    read = applied.offline_users(keys("user_id", [(1, 6, 0), (1, 6, 12), (1, 7, 0)]))
    assert read["user_impressions_3d"].to_list() == [None, None, 3.0]
    assert read["sequence_item_ids"].is_null().to_list() == [True, True, False]
    assert read["country"].to_list() == [5, 5, 5]


def test_a_value_written_later_is_unknown_before_it_was_written(fresh: FeatureStore) -> None:
    """At 18:00 of day 4 its snapshot was mended to 90 impressions for user 1; user 9 was not in it before."""
    path = snapshot_path(fresh.workspace, Entity.USER, day(4))
    written = pl.read_parquet(path, hive_partitioning=False).filter(pl.col("user_id") == 1)
    late = written.with_columns(pl.lit(at(4, 18)).cast(UTC_TIMESTAMP).alias(CREATED), user_impressions_3d=pl.lit(90.0))
    rows = pl.concat([late, late.with_columns(user_id=pl.lit(9, pl.Int64))])
    rows.cast(dict(written.schema)).write_parquet(path.with_name("mended.parquet"))
    read = fresh.offline_users(keys("user_id", [(1, 4, 12), (1, 4, 18), (9, 4, 17.9), (9, 4, 18.1)]))
    assert read["user_impressions_3d"].to_list() == [3.0, 90.0, None, 90.0]


def test_content_is_unknown_before_an_item_is_created(applied: FeatureStore) -> None:
    """Item 6 was created at 6:00 of day 3."""
    read = applied.offline_items(keys("item_id", [(6, 3, 5), (6, 3, 6), (6, 4, 0)]))
    assert read["category"].to_list() == [None, 30, 30]
    assert read[CREATED_AT_US][1] == int(at(3, 6).timestamp() * 1e6)


def test_an_empty_list_is_not_a_missing_one(applied: FeatureStore, online: FeatureStore) -> None:
    """Item 3 has no tags, the tags of item 4 are not known; both stores tell them apart."""
    for tags in (
        applied.offline_items(keys("item_id", [(3, 4, 0), (4, 4, 0)]))["tags"],
        online.online_items([3, 4])["tags"],
    ):
        assert tags.to_list() == [[], None]


def test_columns_and_dtypes_are_the_same_in_every_read(applied: FeatureStore, online: FeatureStore) -> None:
    """Offline, online, and of no rows at all."""
    reads = [
        applied.offline_items(keys("item_id", [(1, 4, 0)])),
        applied.offline_items(keys("item_id", [])),
        online.online_items([1]),
        online.online_items([]),
    ]
    assert all(read.schema == reads[0].schema for read in reads)
    assert dict(list(reads[0].schema.items())[:-1]) == stored_schema(SCHEMA, Entity.ITEM)


@hypothesis_settings(max_examples=12, deadline=None)
@given(ids=st.lists(st.sampled_from([*range(1, 8), -1, 0, BIG]), min_size=1, max_size=12))
def test_online_reads_equal_offline_reads_of_the_day(online: FeatureStore, ids: list[int]) -> None:
    """Known, unknown and repeated ids, one row each, in order: exactly what an impression of day 4 would see."""
    moment = [(each, 4, 0.0) for each in ids]
    assert_frame_equal(online.online_users(ids), online.offline_users(keys("user_id", moment)), check_exact=True)
    assert_frame_equal(online.online_items(ids), online.offline_items(keys("item_id", moment)), check_exact=True)


def test_a_store_without_anything_online_answers_with_nulls(applied: FeatureStore) -> None:
    """Before the first materialization every feature of every id is missing; nothing is raised."""
    read = applied.online_users([1, 99])
    assert read["user_id"].to_list() == [1, 99]
    assert read.drop("user_id").null_count().row(0) == (2,) * (read.width - 1)


def test_who_left_the_snapshots_reads_as_missing_even_if_days_were_skipped(fresh: FeatureStore) -> None:
    """User 2 was seen on day 0 only; online holds day 2, then day 9, and no snapshot between."""
    fresh.materialize(day(2))
    assert fresh.online_users([2])["user_impressions_3d"].to_list() == [1.0]
    fresh.materialize(day(9))
    read = FeatureStore(fresh.dataset, fresh.workspace).online_users([2])
    assert read["user_impressions_3d"].to_list() == read["sequence_item_ids"].to_list() == [None]
    assert read["age"].to_list() == [30.0]


def test_an_earlier_day_does_not_replace_a_later_one(fresh: FeatureStore, caplog: pytest.LogCaptureFixture) -> None:
    """Repeating day 2 after day 4 changes nothing, and the log says so."""
    fresh.materialize(day(4))
    later = fresh.online_users([1, 2, 3])
    fresh.materialize(day(2))
    assert_frame_equal(fresh.online_users([1, 2, 3]), later)
    assert "and stays" in caplog.text


def test_a_changed_schema_is_registered_over_the_old_one(fresh: FeatureStore, tmp_path: Path) -> None:
    """A feature more in schema.yaml: the next apply serves it, without a new workspace."""
    columns = fresh.schema.items | {"length": fresh.schema.items["duration"]}
    schema = fresh.schema.model_copy(update={"items": columns})
    items = ITEMS.with_columns(pl.col("duration").alias("length"))
    source = fresh.dataset.impressions().drop("day").collect()
    dataset = write_dataset(tmp_path / "wider", schema, source, items, USERS, {})
    build_history(dataset, fresh.workspace, [day(number) for number in history_days()])
    store = FeatureStore(dataset, fresh.workspace)
    store.apply()
    store.materialize(day(4))
    assert store.online_items([2])["length"].to_list() == [2.5]


def test_a_materialization_killed_halfway_is_completed_by_the_next(
    fresh: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile reads answer; afterwards the store is as if nothing had happened."""
    fresh.materialize(day(3))
    sqlite = type(fresh._feast._get_provider().online_store)
    write, batches = sqlite.online_write_batch, itertools.count()

    def killed(*arguments: object, **named: object) -> None:
        if next(batches) == 2:
            raise KeyboardInterrupt
        write(*arguments, **named)

    monkeypatch.setattr(sqlite, "online_write_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        fresh.materialize(day(4))
    monkeypatch.undo()
    again = FeatureStore(fresh.dataset, fresh.workspace)
    assert again.online_items([1]).height == again.online_users([1]).height == 1
    again.materialize(day(4))
    again.materialize(day(4))
    ids = list(range(1, 7))
    assert_frame_equal(again.online_items(ids), again.offline_items(keys("item_id", [(each, 4, 0) for each in ids])))


def test_what_is_not_built_is_refused_by_name(fresh: FeatureStore) -> None:
    """Day 6 has no snapshot: serving must not silently lose every history."""
    with pytest.raises(MissingArtifact, match=str(day(6))):
        fresh.materialize(day(6))


def test_nothing_is_printed_to_stdout(fresh: FeatureStore, capfd: pytest.CaptureFixture[str]) -> None:
    """Commands answer in JSON on stdout; Feast's own messages would break it."""
    fresh.apply()
    fresh.materialize(day(4))
    fresh.offline_users(keys("user_id", [(1, 4, 0)]))
    fresh.online_users([1])
    assert capfd.readouterr().out == ""


def test_every_stored_feature_is_in_one_view_and_in_the_service(applied: FeatureStore) -> None:
    """The views hold the schema's stored features, historical and other ones apart, and nothing twice."""
    service = applied._feast.get_feature_service(module.SERVICE)
    held = [f.name for view in service.feature_view_projections for f in view.features]
    stored = [f.name for entity in (Entity.USER, Entity.ITEM) for f in SCHEMA.select(entity, stored=True)]
    assert sorted(held) == sorted([*stored, CREATED_AT_US])
    history = applied._feast.get_feature_view("item_history")
    names = {f.name for f in SCHEMA.select(Entity.ITEM, stored=True) if f.snapshot}
    assert {f.name for f in history.features} == names


@pytest.fixture
def redis_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FRESHRANK_ONLINE_STORE", "redis")
    monkeypatch.setenv("FRESHRANK_REDIS_URL", "cache:6379,password=secret")
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.usefixtures("redis_settings")
def test_the_redis_password_is_not_written_to_disk(tmp_path: Path) -> None:
    """feature_store.yaml names the environment variable; Feast fills it in."""
    workspace = Workspace.of("tiny_log", tmp_path)
    module.write_feast_yaml(SCHEMA, workspace)
    text = (workspace.feast / "feature_store.yaml").read_text()
    assert "secret" not in text
    assert "password=secret" in os.path.expandvars(text)
