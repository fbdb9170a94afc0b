"""Ranking from a real Redis: the same features and scores, and what happens when it dies, hangs and comes back."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
from online_reads import assert_reads_as_feast
from ranking_world import RUN_DATE, RankingWorld, never_asked, noon, served_world

from freshrank.bench.serving.redis_server import RedisServer
from freshrank.features.store import FeatureStore
from freshrank.serving.client import Answer, Client
from freshrank.serving.ranking.online_store import Online, RedisReader, online_rows

pytestmark = pytest.mark.integration

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def redis_world(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankingWorld]:
    """A world served from Redis, its items read anew at every request."""
    variables = {"ONLINE_STORE": "redis", "REDIS_URL": redis.url, "ITEM_CACHE_SECONDS": "0"}
    with served_world(tmp_path_factory.mktemp("redis_world"), **variables) as world:
        yield world


def rank(world: RankingWorld, items: list[int]) -> Answer:
    with Client.for_dataset(world.data) as client:
        return client.rank(1, items, at=noon(RUN_DATE))


def test_a_direct_read_of_redis_equals_that_of_feasts_client_bit_for_bit(redis_world: RankingWorld) -> None:
    """Every user and item of the log and some that are unknown: values, masks and defaults."""
    rows = online_rows(redis_world.dataset.schema, redis_world.workspace)
    assert isinstance(rows, RedisReader)
    assert_reads_as_feast(redis_world, Online(redis_world.dataset.schema, rows))


def test_logged_requests_get_the_trainers_scores_from_redis(redis_world: RankingWorld) -> None:
    """No skew, whichever store is online."""
    logged = redis_world.logged
    expected = redis_world.served_ranker().score(logged, redis_world.dataset.items())["probabilities"]
    with Client.for_dataset(redis_world.data) as client:
        for rows in logged.rows.with_row_index("place").partition_by("request_id", maintain_order=True)[:100]:
            first = rows.row(0, named=True)
            context = {"surface": first["surface"]}
            answer = client.rank(
                first["user_id"], rows["item_id"].to_list(), first["event_timestamp"], context, first["query_item_id"]
            )
            assert np.abs(answer.probabilities - expected[rows["place"]]).max() < TOLERANCE
            assert not answer.degraded


def test_a_redis_that_dies_degrades_the_answers_until_it_is_back_with_its_data(
    redis_world: RankingWorld, redis: RedisServer
) -> None:
    """Killed: finite, degraded, known only what was read before. Back but empty: not degraded, nothing known.
    Materialized: as before. Triton is not restarted."""
    before = rank(redis_world, [1, 2, 3])
    redis.kill()
    dead = rank(redis_world, [1, 2, 3, never_asked(redis_world)])
    assert dead.degraded
    assert dead.known.tolist() == [True, True, True, False]
    assert np.isfinite(dead.score).all()
    redis.start()
    empty = rank(redis_world, [1, 2, 3])
    assert (empty.degraded, empty.known.any()) == (False, False)
    FeatureStore(redis_world.dataset, redis_world.workspace).materialize(RUN_DATE)
    after = rank(redis_world, [1, 2, 3])
    assert after.known.all()
    assert np.abs(after.score - before.score).max() < 1e-6


def until_whole(world: RankingWorld) -> Answer:
    """The first answer of those that follow that is not degraded."""
    deadline = time.monotonic() + 60
    while (answer := rank(world, [1, 2, 3])).degraded:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def test_a_redis_that_hangs_costs_one_deadline_and_no_more(redis_world: RankingWorld, redis: RedisServer) -> None:
    """It accepts connections and never answers: the first request waits for the deadline, the next ones do not."""
    before = rank(redis_world, [1, 2, 3])
    redis.pause()
    try:
        moments, answers = [time.monotonic()], []
        for _ in range(6):
            answers.append(rank(redis_world, [1, 2, 3]))
            moments.append(time.monotonic())
    finally:
        redis.resume()
    assert all(answer.degraded and np.isfinite(answer.score).all() for answer in answers)
    first, *others = np.diff(moments)
    assert np.median(others) < first / 2
    after = until_whole(redis_world)
    assert np.abs(after.score - before.score).max() < 1e-6
