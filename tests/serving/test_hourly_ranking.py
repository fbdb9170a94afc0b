"""Ranking reads what was pushed this hour: the trainer's scores while it stands, and none of it afterwards."""

from collections.abc import Iterator
from datetime import UTC, datetime, time, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from ranking_world import RUN_DATE, WORLD, RankingWorld

from freshrank.config import ValidationConfig
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.simulator import simulate
from freshrank.features.columns import Columns
from freshrank.features.frames import Frame
from freshrank.features.hourly import HOUR, build_hourly, delay, life, only_standing
from freshrank.features.store import FeatureStore
from freshrank.pipeline import steps
from freshrank.schema import ITEM_ID, Entity, Origin, dump_schema
from freshrank.serving.ranking.online_store import Online, online_rows
from freshrank.serving.ranking.ranked import Ranked
from freshrank.serving.ranking.service import RankingService
from freshrank.serving.repository import Pointer
from freshrank.serving.triton import on_wire
from freshrank.settings import settings

pytestmark = pytest.mark.integration

NOON = datetime.combine(RUN_DATE, time(12), UTC)
TOLERANCE = 1e-5


class HourlyWorld(RankingWorld):
    """The small world with hourly counters; its ranker answers in this process, without Triton."""

    @cached_property
    def dataset(self) -> Dataset:
        plain = simulate(self.home / "data", WORLD)
        history = plain.schema.history.model_copy(update={"hourly": True})
        schema = plain.schema.model_copy(update={"history": history})
        (plain.path / "schema.yaml").write_text(dump_schema(schema))
        return Dataset.open(plain.path)

    def serve(self) -> None:
        version = self.repository.install_version(self.bundle(seed=0))
        self.repository.point_to(Pointer(version=version, run_date=RUN_DATE.isoformat(), fingerprint="f"))

    def service(self) -> RankingService:
        """Items are read anew by each."""
        ranker = self.served_ranker()
        return RankingService(self.repository, settings().home, lambda version, blocks: ranker.run(blocks))


@pytest.fixture(scope="module")
def hourly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HourlyWorld]:
    """Trained, with the counters until noon of the served day online."""
    home = tmp_path_factory.mktemp("hourly")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FRESHRANK_HOME", str(home))
        settings.cache_clear()
        world = HourlyWorld(home)
        world.build_features()
        build_hourly(world.dataset, world.workspace, [RUN_DATE])
        world.serve()
        steps.push_hourly(world.data, NOON)
        yield world
    settings.cache_clear()


def names(world: HourlyWorld) -> list[str]:
    return [f.name for f in world.dataset.schema.select(Entity.ITEM) if f.origin is Origin.HOURLY]


def without_hourly(frame: Frame, world: HourlyWorld) -> Frame:
    nulls = [pl.lit(None, pl.Float32).alias(name) for name in names(world)]
    return Frame(frame.users, frame.items.with_columns(nulls), frame.rows)


def answered(
    world: HourlyWorld, rows: pl.DataFrame, late: timedelta = timedelta()
) -> Iterator[tuple[pl.Series, Ranked]]:
    """What the service says to each logged request, asked ``late``, with the places of its rows."""
    service = world.service()
    for request in rows.partition_by("request_id", maintain_order=True):
        first = request.row(0, named=True)
        tensors = {
            "user_id": np.array([first["user_id"]]),
            "item_ids": request["item_id"].to_numpy(),
            "event_time": np.array([int((first["event_timestamp"] + late).timestamp() * 1e6)]),
            "context_categorical": np.array([first["surface"]]),
        }
        if first["query_item_id"] is not None:
            tensors["query_item_id"] = np.array([first["query_item_id"]])
        (answer,) = service.rank([on_wire(tensors)])
        assert isinstance(answer, Ranked)
        yield request["place"], answer


def while_it_stands(world: HourlyWorld) -> pl.DataFrame:
    known = NOON + delay(world.dataset.schema)
    rows = world.logged.rows.with_row_index("place")
    return rows.filter(pl.col("event_timestamp").is_between(known, known + HOUR, "left"))


def test_requests_of_the_hour_get_the_trainers_scores(hourly: HourlyWorld) -> None:
    """No skew: what was pushed at noon is what the frame of that day replays from 12:10 to 13:10; and it matters."""
    ranker, items = hourly.served_ranker(), hourly.dataset.items()
    expected = ranker.score(hourly.logged, items)["probabilities"]
    ignorant = ranker.score(without_hourly(hourly.logged, hourly), items)["probabilities"]
    rows = while_it_stands(hourly)
    for places, answer in answered(hourly, rows):
        assert np.abs(answer.answer["probabilities"] - expected[places]).max() < TOLERANCE
    assert np.abs(expected - ignorant)[rows["place"]].max() > 100 * TOLERANCE


def test_requests_after_it_ended_are_scored_without_it(hourly: HourlyWorld) -> None:
    """No push for two hours: missing, as training knows it from items of which nothing was counted; never stale."""
    late = life(hourly.dataset.schema)
    rows = while_it_stands(hourly)
    for _, answer in answered(hourly, rows, late):
        numeric = answer.inputs["item_numeric"]
        place = [f.name for f in hourly.served_ranker().encoder.numeric(Entity.ITEM)]
        assert np.isnan(numeric[:, [place.index(name) for name in names(hourly)]]).all()
        assert np.isfinite(answer.answer["score"]).all()


@pytest.mark.parametrize("late", [timedelta(0), HOUR, 2 * HOUR, timedelta(minutes=-20)], ids=str)
def test_a_direct_read_stands_as_long_as_feasts_client_says(hourly: HourlyWorld, late: timedelta) -> None:
    """Before, while and after the counters stand: every item of the log and one that nobody knows."""
    schema, at = hourly.dataset.schema, NOON + timedelta(minutes=15) + late
    store = FeatureStore(hourly.dataset, hourly.workspace)
    ids = np.array([10_000_000, *hourly.dataset.items()[ITEM_ID]])
    online = Online(schema, online_rows(schema, hourly.workspace))
    stored = online.read({Entity.ITEM: ids}, store.held_seconds())[Entity.ITEM]
    at_us = np.full(len(ids), int(at.timestamp() * 1e6))
    direct = only_standing(stored.columns, stored.counted_us, at_us, schema)
    expected = Columns.of(store.online_items(ids.tolist(), at), online.layouts[Entity.ITEM])
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(direct.arrays[name], array, strict=True)
    standing = ~np.isnan(direct.values("item_impressions_24h"))
    assert standing.any() == (timedelta(0) <= late <= HOUR)
    online.close()


def test_the_newest_day_of_hourly_counters_passes_validation(hourly: HourlyWorld, tmp_path: Path) -> None:
    """The leak detector looks at daily snapshots, which hold no hourly counters."""
    facts = steps.validate(hourly.data, RUN_DATE.isoformat(), ValidationConfig(), tmp_path / "validation")
    assert facts["expectations"] > 0
