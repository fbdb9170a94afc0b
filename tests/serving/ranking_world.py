"""A small simulated world with a trained bundle, a materialized online store and a server: what ranking needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path

import polars as pl
import pytest

from freshrank.bench.measure import free_ports
from freshrank.bundle.onnx_ranker import OnnxRanker
from freshrank.config import CalibrationConfig, ModelConfig, TechniquesConfig, TrainingConfig, WindowConfig
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.features.frames import Frame, load_frame
from freshrank.pipeline import steps
from freshrank.serving.deploy.local import repository, server
from freshrank.serving.deploy.local_server import TritonServer
from freshrank.serving.deploy.publish import publish
from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace

WORLD = WorldConfig(
    users=150, days=6, items_at_start=200, new_items_per_day=15, impressions_per_day=4000, query_items=True
)
RUN_DATE = WORLD.last_day
"""The last day of the log is the one that is served: its requests are known, but not to the model."""
WINDOWS = WindowConfig(train_days=3)


@dataclass
class RankingWorld:
    """Dataset, bundles and server under one home, which the settings name."""

    home: Path

    @cached_property
    def dataset(self) -> Dataset:
        return simulate(self.home / "data", WORLD)

    @property
    def data(self) -> Path:
        return self.dataset.path

    @property
    def workspace(self) -> Workspace:
        return Workspace.of(self.dataset.schema.name)

    @property
    def server(self) -> TritonServer:
        return server(self.data)

    @property
    def repository(self) -> ModelRepository:
        return repository(self.data)

    @property
    def online_store(self) -> Path:
        return self.workspace.feast / "online.db"

    def build_features(self) -> None:
        steps.build_features(self.data, RUN_DATE.isoformat(), WINDOWS)
        steps.materialize(self.data, RUN_DATE.isoformat())

    def bundle(self, seed: int) -> Path:
        """A ranker trained from ``seed``; another seed gives other answers."""
        day = RUN_DATE.isoformat()
        trained, out = self.home / f"trained{seed}", self.home / f"bundle{seed}"
        small = ModelConfig(item_id_dim=4, categorical_dim=4, sequence_dim=8, group_dim=8, mlp=(16, 8), expert_dim=8)
        training = TrainingConfig(seed=seed, batch_size=256, learning_rate=1e-2)
        steps.train(self.data, day, WINDOWS, small, TechniquesConfig(), training, trained)
        steps.calibrate(self.data, day, WINDOWS, CalibrationConfig(min_positives=1), trained, out)
        return out

    def publish(self, seed: int) -> Pointer:
        return publish(self.bundle(seed), settings().triton_grpc_url, self.repository)

    def served_ranker(self) -> OnnxRanker:
        """The served version outside the server."""
        pointer = self.repository.served()
        assert pointer
        return OnnxRanker(self.repository.version_directory(pointer.version), threads=1)

    @cached_property
    def logged(self) -> Frame:
        """What was asked on the served day, with features from the offline store."""
        return load_frame(self.dataset, self.workspace, [RUN_DATE])

    def young_items(self) -> pl.DataFrame:
        """Items born in the week before the served day."""
        week = pl.lit(RUN_DATE - timedelta(days=WORLD.fresh_days - 1)).cast(pl.Datetime("us", "UTC"))
        return self.dataset.items().filter(pl.col("created_at").is_between(week, pl.lit(RUN_DATE)))


def never_asked(world: RankingWorld) -> int:
    """An item that the store holds and that no request of these tests names otherwise."""
    asked = world.dataset.impressions([RUN_DATE]).select("item_id", "query_item_id").collect()
    named = {*asked["item_id"], *asked["query_item_id"], *range(151)}
    return next(number for number in world.dataset.items()["item_id"] if number not in named)


def noon(day: date) -> str:
    return f"{day.isoformat()}T12:00:00+00:00"


@contextmanager
def served_world(home: Path, **variables: str) -> Iterator[RankingWorld]:
    """A world whose first bundle is served, under settings of its own: FRESHRANK_<variable>."""
    with pytest.MonkeyPatch.context() as environment:
        ports = {f"TRITON_{name.upper()}_PORT": str(port) for name, port in free_ports()}
        for name, value in ({"HOME": str(home)} | ports | variables).items():
            environment.setenv(f"FRESHRANK_{name}", value)
        settings.cache_clear()
        world = RankingWorld(home)
        world.build_features()
        world.server.start()
        world.publish(seed=0)
        yield world
        world.server.stop()
    settings.cache_clear()
