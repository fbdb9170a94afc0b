"""What is read straight from the online store is what Feast's own client reads, and what tables hold."""

from collections.abc import Iterator

import numpy as np
import pytest
from online_reads import assert_reads_as_feast
from ranking_world import RankingWorld

from freshrank.features.columns import Columns
from freshrank.features.store import FeatureStore
from freshrank.schema import ITEM_ID, Entity
from freshrank.serving.ranking.features import ItemCache
from freshrank.serving.ranking.online_store import Online, StoredFeatures, online_rows

UNKNOWN = 10_000_000


@pytest.fixture
def online(world: RankingWorld) -> Iterator[Online]:
    """The world's store, read directly."""
    opened = Online(world.dataset.schema, online_rows(world.dataset.schema, world.workspace))
    yield opened
    opened.close()


def test_a_direct_read_of_sqlite_equals_that_of_feasts_client_bit_for_bit(world: RankingWorld, online: Online) -> None:
    """Every user and item of the log and some that are unknown: values, masks and defaults."""
    assert_reads_as_feast(world, online)


def test_rows_older_than_what_the_registry_holds_are_missing(world: RankingWorld, online: Online) -> None:
    """An entity that has left the snapshots keeps its old row in the store; content has no day and stays."""
    held = FeatureStore(world.dataset, world.workspace).held_seconds()
    later = {view: at + 1 for view, at in held.items()}
    items = world.dataset.items()[ITEM_ID].to_numpy()[:50]
    now, after = (online.read({Entity.ITEM: items}, at)[Entity.ITEM] for at in (held, later))
    impressions = f"item_impressions_{world.dataset.schema.lookback_days}d"
    assert now.columns.values(impressions).max() > 0
    assert after.columns.values(impressions).max() == 0
    assert (after.columns.values("category") == now.columns.values("category")).all()
    assert after.known.all()


def found(online: Online, births: list[int]) -> StoredFeatures:
    """Items that were born at ``births``; 0 for one that is not known."""
    columns = Columns.missing(online.layouts[Entity.ITEM], len(births))
    return StoredFeatures(columns, np.array(births), np.array(births) > 0, np.array(births) // 2)


def test_a_kept_item_is_asked_for_again_within_its_time_and_an_unknown_one_sooner(online: Online) -> None:
    """Of 60 s a known item is kept 30 to 60, of which chance decides, an unknown one 2.5 to 5."""
    cache = ItemCache(online.layouts[Entity.ITEM], seconds=60)
    ids = np.arange(1, 101)
    assert cache.stale(ids, now=0.0).tolist() == ids.tolist()
    cache.put(ids, found(online, [10] * 50 + [0] * 50), now=0.0)
    assert len(cache.stale(ids, now=2.4)) == 0
    assert cache.stale(ids, now=5.1).tolist() == list(range(51, 101))
    assert 60 < len(cache.stale(ids, now=45.0)) < 90
    assert cache.stale(ids, now=60.1).tolist() == ids.tolist()


def test_items_keep_their_values_while_the_memory_grows(online: Online) -> None:
    """Put one by one and taken in any order, repeated and unknown ones too."""
    cache = ItemCache(online.layouts[Entity.ITEM], seconds=60)
    for number in range(1, 200):
        cache.put(np.array([number]), found(online, [1000 + number]), now=0.0)
    taken = cache.take(cache.slots(np.array([7, 199, 7, UNKNOWN])))
    assert taken.created_us.tolist() == [1007, 1199, 1007, 0]
    assert taken.known.tolist() == [True, True, True, False]
    assert taken.counted_us.tolist() == [503, 599, 503, 0]


def test_a_full_memory_starts_anew_and_never_answers_for_another_item(online: Online) -> None:
    """The most it holds is its capacity; what was dropped is asked for again."""
    cache = ItemCache(online.layouts[Entity.ITEM], seconds=60, capacity=10)
    for first in range(1, 50, 5):
        ids = np.arange(first, first + 5)
        cache.make_room(5)
        cache.put(ids, found(online, (1000 + ids).tolist()), now=0.0)
        assert len(cache) <= 10
        assert cache.take(cache.slots(ids)).created_us.tolist() == (1000 + ids).tolist()
    assert 1 in cache.stale(np.array([1, 49]), now=0.0)
