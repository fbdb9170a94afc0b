"""Writing features into a Redis that is down, hangs, is full or has another password: one sentence, and repeatable."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis as redis_client

from freshrank.bench.serving.redis_server import RedisServer
from freshrank.errors import ServingError
from freshrank.features.snapshots import build_history
from freshrank.features.store import FeatureStore
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace
from tests.tiny_log import day, impression, write_log

pytestmark = pytest.mark.integration

Open = Callable[..., FeatureStore]
DAY = day(2)
LOG = [impression(number, user=1, item=1 + number, click=1, hour=number) for number in range(2)]
PASSWORD = "hunter2"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def opened(redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens the store, registered and with the snapshots of ``DAY``, with options after Redis' address."""
    dataset, workspace = write_log(tmp_path / "data", LOG), Workspace.of("tiny_log", tmp_path / "home")
    build_history(dataset, workspace, [DAY])
    monkeypatch.setenv("FRESHRANK_ONLINE_STORE", "redis")

    def open_(*options: str) -> FeatureStore:
        monkeypatch.setenv("FRESHRANK_REDIS_URL", ",".join([redis.url, *options]))
        settings.cache_clear()
        return FeatureStore(dataset, workspace)

    open_().apply()
    yield open_
    settings.cache_clear()


def fill(server: RedisServer, limit: int = 1) -> None:
    """From now on it refuses to hold more than ``limit`` bytes; 0 is no limit."""
    host, port = server.url.split(":")
    redis_client.Redis(host=host, port=int(port)).config_set("maxmemory", limit)


@pytest.mark.parametrize(
    ("break_", "options", "said"),
    [
        pytest.param(fill, (), "maxmemory", id="full"),
        # Slow, because the client tries again.
        pytest.param(RedisServer.kill, (), "refused", id="down", marks=pytest.mark.slow),
        pytest.param(RedisServer.pause, ("socket_timeout=0.2",), "Timeout", id="hanging", marks=pytest.mark.slow),
        pytest.param(lambda _: None, (f"password={PASSWORD}",), "password", id="password", marks=pytest.mark.slow),
    ],
)
def test_features_that_redis_does_not_take_are_one_sentence_with_its_address(
    redis: RedisServer,
    opened: Open,
    break_: Callable[[RedisServer], None],
    options: tuple[str, ...],
    said: str,
) -> None:
    """It names the host and how to mend it, not the password; the day is not taken for written."""
    store = opened(*options)
    break_(redis)
    with pytest.raises(ServingError, match=said) as refused:
        store.materialize(DAY)
    assert redis.url in str(refused.value)
    assert "FRESHRANK_REDIS_URL" in str(refused.value)
    assert PASSWORD not in str(refused.value)
    assert set(store.held_seconds()) <= {"item_content", "user_profile"}


@pytest.mark.parametrize(
    ("break_", "mend"),
    [
        pytest.param(fill, lambda server: fill(server, 0), id="full"),
        pytest.param(RedisServer.kill, RedisServer.start, id="down", marks=pytest.mark.slow),
    ],
)
def test_once_redis_is_mended_the_same_step_fills_it(
    redis: RedisServer,
    opened: Open,
    break_: Callable[[RedisServer], None],
    mend: Callable[[RedisServer], None],
) -> None:
    """Nothing has to be removed first."""
    store = opened()
    break_(redis)
    with pytest.raises(ServingError):
        store.materialize(DAY)
    mend(redis)
    assert store.materialize(DAY) is None
    assert store.online_items([1])["item_impressions_3d"].to_list() == [1.0]
