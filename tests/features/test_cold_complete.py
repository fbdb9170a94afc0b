"""Cold-complete: whatever is missing, of any schema, training and serving see the same finite inputs, and the ranker
answers with a finite number."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from freshrank.config import ModelConfig
from freshrank.datasets.dataset import Dataset
from freshrank.features.encoder import Blocks, Catalog, Encoder
from freshrank.features.frames import load_frame, serving_frame
from freshrank.features.snapshots import build_history
from freshrank.features.store import FeatureStore
from freshrank.models.ranker import Ranker
from freshrank.schema import QUERY_ITEM_ID, Role
from freshrank.serving.ranking.features import OnlineFeatures
from freshrank.serving.ranking.query import Query
from freshrank.serving.ranking.service import RequestBatch, online_features
from freshrank.storage.workspace import Workspace
from tests.generated_worlds import DAYS, START, UNKNOWN, GeneratedWorld, rich_world, worlds

pytestmark = pytest.mark.integration

LAST = START.date() + timedelta(days=DAYS - 1)
SMALL = ModelConfig(
    item_id_dim=2,
    categorical_dim=2,
    min_count=1,
    sequence_dim=4,
    group_dim=4,
    cross_rank=2,
    mlp=(8, 4),
    experts=2,
    expert_dim=4,
    head_dim=4,
)
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}


class Served:
    """A generated world whose last day is asked for: features built, and materialized as of that day's start."""

    def __init__(self, world: GeneratedWorld, root: Path) -> None:
        self.dataset: Dataset = world.write(root / "data")
        self.workspace = Workspace.of("generated", root / "home")
        build_history(self.dataset, self.workspace, [*self.days, LAST])
        self.store = FeatureStore(self.dataset, self.workspace)
        self.store.apply()
        self.store.materialize(LAST)
        self.offline = load_frame(self.dataset, self.workspace, [LAST])
        trained_on = load_frame(self.dataset, self.workspace, [day for day in self.days if day < LAST])
        self.encoder = Encoder.fit(trained_on, world.schema, SMALL.min_count)
        self.catalog = Catalog.build(self.dataset.items(), self.encoder)
        torch.manual_seed(0)
        self.ranker = Ranker(self.encoder, SMALL).eval()

    @property
    def days(self) -> list[date]:
        return self.dataset.days

    def queries(self) -> list[Query]:
        """One per impression of the last day, with what of its context is there."""
        names = [n for n, c in self.dataset.schema.impressions.items() if c.role is Role.CONTEXT or n == QUERY_ITEM_ID]
        return [
            Query(
                user_id=row["user_id"],
                item_ids=np.array([row["item_id"]]),
                at_us=int(row["event_timestamp"].timestamp() * 1_000_000),
                context={name: row[name] for name in names if row[name] is not None},
            )
            for row in self.offline.rows.to_dicts()
        ]

    def by_feast(self, query: Query) -> Blocks:
        """Encoded from Feast's own client."""
        context = {name: np.array([value]) for name, value in query.context.items()}
        frame = serving_frame(self.store, query.user_id, query.item_ids.tolist(), query.at, context)
        return self.encoder.inputs(frame, self.catalog)

    def by_server(self, queries: list[Query], features: OnlineFeatures) -> Blocks:
        """Encoded as the server does, all in one call."""
        batch = RequestBatch(queries)
        known = features.read(batch.user_ids, batch.item_ids, batch.lookups)
        return batch.blocks(known, self.encoder)[0]

    def logits(self, blocks: Blocks) -> np.ndarray:
        with torch.no_grad():
            answer: np.ndarray = self.ranker(
                {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in blocks.items()}
            ).numpy()
        return answer


@contextmanager
def served(world: GeneratedWorld) -> Iterator[Served]:
    with TemporaryDirectory() as root:
        yield Served(world, Path(root))


def per_row(blocks: Blocks) -> Blocks:
    """Every block with a row per candidate: those of users are repeated."""
    index = blocks["user_index"]
    of_users = ("user_", "sequence_")
    return {
        name: block[index] if name.startswith(of_users) else block
        for name, block in blocks.items()
        if name != "user_index"
    }


def assert_same(one: Blocks, other: Blocks) -> None:
    assert one.keys() == other.keys()
    for name, block in one.items():
        np.testing.assert_array_equal(block, other[name], err_msg=name)


def assert_three_ways_agree(world: GeneratedWorld) -> None:
    """Offline frame, Feast's online lookup and the server's own reader give bit-equal inputs, and finite answers."""
    with served(world) as here:
        queries = here.queries()
        offline = here.encoder.inputs(here.offline, here.catalog)
        server = here.by_server(queries, online_features(world.schema, here.workspace))
        assert_same(per_row(offline), per_row(server))
        one_by_one = [per_row(here.by_feast(query)) for query in queries]
        assert_same(
            per_row(offline), {name: np.concatenate([one[name] for one in one_by_one]) for name in one_by_one[0]}
        )
        for blocks in (offline, server):
            assert np.isfinite(here.logits(blocks)).all()
        assert np.isfinite(here.logits(cold(here))).all()


def cold(here: Served) -> Blocks:
    """Nobody asks for unknown items, without any context, of a store that is gone."""
    nobody = Query(UNKNOWN + 7, np.array([UNKNOWN + 8, UNKNOWN + 9]), int(START.timestamp() * 1e6), {})
    features = online_features(here.dataset.schema, here.workspace)
    asked = here.by_server([nobody], features)
    (here.workspace.feast / "online.db").unlink()
    gone = here.by_server([nobody], online_features(here.dataset.schema, here.workspace))
    assert_same(asked, gone)
    return asked


@settings(max_examples=2, **COMMON)
@example(rich_world())
@given(worlds())
def test_offline_frame_online_lookup_and_model_input_agree_and_are_finite(world: GeneratedWorld) -> None:
    """For any schema and any of its values missing."""
    assert_three_ways_agree(world)


@pytest.mark.slow
@settings(max_examples=60, **COMMON)
@given(worlds())
def test_many_schemas_agree_and_are_finite(world: GeneratedWorld) -> None:
    """As above, for many schemas."""
    assert_three_ways_agree(world)
