"""The same expressions on DuckDB and on Spark: the same numbers, to the last bit."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from freshrank.datasets.dataset import Dataset
from freshrank.errors import ConfigError
from freshrank.features.daily_aggregates import aggregate_names, aggregate_path
from freshrank.features.snapshots import build_history
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace
from tests.tiny_log import day, impression, log_schema, read_snapshots, write_log

pytestmark = pytest.mark.integration

SCHEMA = log_schema().with_siblings(("category", "tags", "duration", "category+duration"))
LAST = 23 + 59 / 60
SNAPSHOTS = [day(number) for number in (-1, 1, 3, 6)]
"""The last of February 2024, the day after the first of March, a day after a gap, and one after quiet days."""
LOG = [
    # Days -2 and -1 are the 28th and 29th of February; local midnight is at 22:00 UTC of the day before.
    *(impression(-2, user, item, click=item % 2, hour=0) for user in (1, 2) for item in (1, 2, 3)),
    impression(-2, 1, 3, click=1, save=None, hour=LAST),
    impression(-1, 1, 2, click=1, save=1, hour=0),
    # Ties: five items at one instant, two of them engaged with, and equal counts of two categories.
    *(impression(0, 3, item, click=int(item in (2, 5)), save=None, hour=12) for item in (5, 4, 3, 2, 1)),
    impression(0, 2, 3, click=1, usage="evaluation"),
    impression(0, 2, 3, click=0, usage="history", hour=LAST),
    # Nothing on day 1; an item that is born on day 3 is shown at once.
    *(impression(2, user, 1 + user, click=None, save=1, hour=user) for user in (1, 2, 3)),
    impression(3, 1, 6, click=1, hour=7),
]
LATE = [impression(0, 1, 1, click=1, hour=3), impression(2, 4, 5, click=1, save=1, hour=0)]


@pytest.fixture(scope="module")
def spark() -> Iterator[None]:
    from pyspark.sql import SparkSession

    quick = {
        "spark.ui.enabled": "false",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.sql.shuffle.partitions": "1",
    }
    session = SparkSession.builder.master("local[1]").config(map=quick).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield
    session.stop()


def build(engine: str, dataset: Dataset, workspace: Workspace, days: list[date]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRESHRANK_FEATURES_ENGINE", engine)
        settings.cache_clear()
        build_history(dataset, workspace, days)
    settings.cache_clear()


def assert_same(one: Workspace, other: Workspace, dataset: Dataset) -> None:
    for on in SNAPSHOTS:
        actual, expected = read_snapshots(one, on), read_snapshots(other, on)
        for entity in expected:
            assert_frame_equal(actual[entity], expected[entity], check_exact=True)
    for on in dataset.days:
        for name in aggregate_names(dataset.schema):
            actual_part, expected_part = (pl.read_parquet(aggregate_path(each, on, name)) for each in (one, other))
            assert_frame_equal(actual_part, expected_part, check_exact=True, check_dtypes=False)


@pytest.mark.usefixtures("spark")
def test_spark_and_duckdb_write_the_same_features(tmp_path: Path) -> None:
    """Ties, gaps, late rows, days of a time zone, a month's end; built before the late rows came and after."""
    homes = {engine: Workspace.of("tiny_log", tmp_path / engine) for engine in ("duckdb", "spark")}
    for log in (LOG, LOG + LATE):
        dataset = write_log(tmp_path / "data", log, SCHEMA)
        for engine, workspace in homes.items():
            build(engine, dataset, workspace, SNAPSHOTS)
        assert_same(homes["spark"], homes["duckdb"], dataset)


def test_a_machine_without_spark_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine was asked for, so DuckDB does not quietly stand in."""
    monkeypatch.setitem(__import__("sys").modules, "pyspark.sql", None)
    dataset = write_log(tmp_path / "data", LOG, SCHEMA)
    with pytest.raises(ConfigError, match="pip install"):
        build("spark", dataset, Workspace.of("tiny_log", tmp_path / "home"), SNAPSHOTS[:2])
    settings.cache_clear()
