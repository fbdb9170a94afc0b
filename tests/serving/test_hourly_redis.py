"""Hourly counters in a real Redis: pushed through Feast, read directly, and over when they are over."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from freshrank.bench.serving.redis_server import RedisServer
from freshrank.features.hourly import only_standing
from freshrank.features.store import FeatureStore
from freshrank.schema import Entity
from freshrank.serving.ranking.online_store import Online, RedisReader, online_rows
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace
from tests.features.test_hourly import IMPRESSIONS, MORNING, NEW, SCHEMA
from tests.tiny_log import at, write_log

pytestmark = pytest.mark.integration


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FeatureStore]:
    """Registered, nothing online."""
    with RedisServer(tmp_path / "redis") as redis:
        monkeypatch.setenv("FRESHRANK_ONLINE_STORE", "redis")
        monkeypatch.setenv("FRESHRANK_REDIS_URL", redis.url)
        settings.cache_clear()
        opened = FeatureStore(
            write_log(tmp_path / "data", MORNING, SCHEMA), Workspace.of("tiny_log", tmp_path / "home")
        )
        opened.apply()
        yield opened
    settings.cache_clear()


@pytest.mark.parametrize(("minutes", "expected"), [(9, None), (10, 3.0), (129, 3.0), (130, None)])
def test_what_was_pushed_to_redis_stands_as_long_as_in_sqlite(
    store: FeatureStore, minutes: int, expected: float | None
) -> None:
    """8:00, then 9:00 over it: from 9:10 until before 11:10, by Feast's client and by our own reader alike."""
    store.push_hourly(at(3, 8))
    store.push_hourly(at(3, 9))
    when = at(3, 9) + timedelta(minutes=minutes)
    rows = online_rows(SCHEMA, store.workspace)
    assert isinstance(rows, RedisReader)
    stored = Online(SCHEMA, rows).read({Entity.ITEM: np.array([NEW, 99])}, {})[Entity.ITEM]
    direct = only_standing(stored.columns, stored.counted_us, np.full(2, int(when.timestamp() * 1e6)), SCHEMA)
    assert store.online_items([NEW, 99], when)[IMPRESSIONS].to_list() == [expected, None]
    assert direct.values(IMPRESSIONS).tolist() == pytest.approx([expected or np.nan, np.nan], nan_ok=True)
