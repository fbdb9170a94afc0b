"""What a direct read of an online store is held to."""

import numpy as np
from ranking_world import RankingWorld

from freshrank.features.columns import Columns
from freshrank.features.store import FeatureStore
from freshrank.schema import ITEM_ID, USER_ID, Entity
from freshrank.serving.ranking.online_store import Online

UNKNOWN = 10_000_000


def assert_reads_as_feast(world: RankingWorld, online: Online) -> None:
    store = FeatureStore(world.dataset, world.workspace)
    users = np.array([*world.dataset.users()[USER_ID], -1, UNKNOWN])
    items = np.array([UNKNOWN, *world.dataset.items()[ITEM_ID], 2**62])
    stored = online.read({Entity.USER: users, Entity.ITEM: items}, store.held_seconds())
    tables = {Entity.USER: store.online_users(users.tolist()), Entity.ITEM: store.online_items(items.tolist())}
    for entity, table in tables.items():
        expected = Columns.of(table, online.layouts[entity])
        assert stored[entity].columns.arrays.keys() == expected.arrays.keys()
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(stored[entity].columns.arrays[name], array, strict=True)
    births = tables[Entity.ITEM]["created_at_us"]
    assert stored[Entity.ITEM].created_us.tolist() == births.fill_null(0).to_list()
    assert stored[Entity.ITEM].known.tolist() == births.is_not_null().to_list()
