"""Features of users and items for serving: users are read at every request, items are cached for a short time.

Whatever the online store does not know, or does not say in time, is a missing feature; items that are kept are
answered from memory while the store is down.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from freshrank.features.columns import Arrays, Columns, Int, Layout
from freshrank.schema import SEQUENCE_ITEMS, Entity, Kind
from freshrank.serving.ranking.latest import Latest
from freshrank.serving.ranking.online_store import Held, Online, StoredFeatures

CAPACITY = 200_000
"""Approximate capacity of the item cache; a full cache is cleared, which makes the next requests read more."""
UNKNOWN_SECONDS = 5.0
"""An item that the store did not hold is asked for again after this long, or sooner where items are kept shorter."""
PAUSE_SECONDS = 1.0
"""After a read that failed slowly the store is left alone for this long: the requests meanwhile do not wait for it."""
SLOW_SECONDS = 0.1
HELD_SECONDS = 60.0
"""How old the answer to "which day do the snapshots stand for" may be before the registry is asked again, which no
request waits for."""
_CREATED, _KNOWN, _COUNTED = _OF_ITEMS = "created_us", "known", "counted_us"
_NOTHING = 0
"""The slot of an item of which nothing is known."""

log = logging.getLogger(__name__)


class ItemCache:
    """Items as columnar blocks, one slot each; slot 0 is an item of which nothing is known."""

    def __init__(self, layout: Layout, seconds: float, capacity: int = CAPACITY, seed: int = 0) -> None:
        self.layout = layout
        self._seconds = seconds
        self._capacity = capacity
        self._random = np.random.default_rng(seed)
        self.clear()

    def clear(self) -> None:
        nothing = Columns.missing(self.layout, 1)
        times = {_CREATED: np.zeros(1, np.int64), _COUNTED: np.zeros(1, np.int64)}
        self._arrays: Arrays = nothing.arrays | times | {_KNOWN: np.zeros(1, np.bool_)}
        self._expires = np.full(1, np.inf)
        self._slots: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def make_room(self, count: int) -> None:
        """Before ``count`` items are asked for: nothing is dropped while a request is put together."""
        if len(self._slots) + count > self._capacity:
            self.clear()

    def stale(self, ids: Int, now: float) -> Int:
        """Those of ``ids`` that must be read, each once."""
        slots = self.slots(ids)
        wanted = ids[(slots == _NOTHING) | (self._expires[slots] <= now)]
        return np.unique(wanted) if len(wanted) else wanted

    def slots(self, ids: Int) -> Int:
        """Slot of each id, 0 for one that is not held."""
        get = self._slots.get
        return np.array([get(number, _NOTHING) for number in ids.tolist()], np.int64)

    def put(self, ids: Int, stored: StoredFeatures, now: float) -> None:
        """Keep what was ``stored`` of distinct ``ids``."""
        if not len(ids):
            return
        slots = self._reserved(ids)
        others = {name: getattr(stored, name) for name in _OF_ITEMS}
        for name, rows in (stored.columns.arrays | others).items():
            self._arrays[name][slots] = rows
        # Not all at once: what was read together would otherwise be read together for ever.
        seconds = np.where(stored.known, self._seconds, min(self._seconds, UNKNOWN_SECONDS))
        self._expires[slots] = now + seconds * self._random.uniform(0.5, 1.0, len(ids))

    def _reserved(self, ids: Int) -> Int:
        for number in ids.tolist():
            self._slots.setdefault(number, len(self._slots) + 1)
        if len(self._slots) >= len(self._expires):
            size = 2 * (len(self._slots) + 1)
            self._arrays = {name: _longer(array, size) for name, array in self._arrays.items()}
            self._expires = _longer(self._expires, size)
        return self.slots(ids)

    def take(self, slots: Int) -> StoredFeatures:
        """What is held in ``slots``."""
        columns = {name: array[slots] for name, array in self._arrays.items() if name not in _OF_ITEMS}
        return StoredFeatures(Columns(self.layout, columns), *(self._arrays[name][slots] for name in _OF_ITEMS))


def _longer(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    grown = np.zeros((size, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


@dataclass(frozen=True)
class Known:
    """What is known of one or more requests."""

    users: Columns
    """One row per user asked for."""
    items: StoredFeatures
    """One row per item asked for."""
    looked_up: StoredFeatures
    """The known items among those of the users' sequences and those asked to be looked up; ascending ids."""
    looked_up_ids: Int
    problem: Exception | None
    """What kept the store from being read; users and items that were not kept are then missing."""


class OnlineFeatures:
    """Reads for ranking; not for use by several threads.

    Args:
        connect: opens the store; called again at the next read after one that failed.
        read_held: which instant the snapshots of each view stand for, from the registry.
        seconds: how long an item is kept.
    """

    def __init__(self, connect: Callable[[], Online], read_held: Callable[[], Held], seconds: float) -> None:
        self._connect = connect
        self._held = Latest(read_held, "the feature registry", seconds=0.0, every=HELD_SECONDS)
        self._online = connect()
        self._cache = ItemCache(self._online.layouts[Entity.ITEM], seconds)
        self._cached_for: Held = {}
        self._paused_until = float("-inf")

    def read(self, user_ids: Int, item_ids: Int, lookups: Int) -> Known:
        """Users and items in the given order; ``lookups`` are items of which only the content matters."""
        now = time.monotonic()
        users = Columns.missing(self._online.layouts[Entity.USER], len(user_ids))
        sequences, problem = np.zeros(0, np.int64), None
        try:
            held = self._held_for(len(item_ids) + len(lookups) + users.arrays[Kind.SEQUENCE].size)
            users = self._fresh(user_ids, np.concatenate([item_ids, lookups]), held, now)
            sequences = users.values(SEQUENCE_ITEMS)[users.present(SEQUENCE_ITEMS)]
            self._fresh(np.zeros(0, np.int64), sequences, held, now)
        except Exception as error:
            problem = error
        looked_up, ids = self._known(np.concatenate([sequences, lookups]))
        return Known(users, self._cache.take(self._cache.slots(item_ids)), looked_up, ids, problem)

    def _held_for(self, count: int) -> Held:
        """Which snapshots stand, with room for ``count`` items of theirs."""
        held, _ = self._held.value()
        if held != self._cached_for:
            self._cache.clear()
            self._cached_for = held
        self._cache.make_room(count)
        return held

    def _fresh(self, user_ids: Int, item_ids: Int, held: Held, now: float) -> Columns:
        """Features of users, and every one of ``item_ids`` in the cache."""
        wanted = self._cache.stale(item_ids, now)
        if not len(wanted) and not len(user_ids):
            return Columns.missing(self._online.layouts[Entity.USER], 0)
        stored = self._asked({Entity.USER: user_ids, Entity.ITEM: wanted}, held, now)
        self._cache.put(wanted, stored[Entity.ITEM], now)
        return stored[Entity.USER].columns

    def _asked(self, wanted: dict[Entity, Int], held: Held, now: float) -> dict[Entity, StoredFeatures]:
        if now < self._paused_until:
            raise TimeoutError("the online store did not answer in time a moment ago and is left alone")
        try:
            return self._online.read(wanted, held)
        except Exception:
            if time.monotonic() - now > SLOW_SECONDS:
                self._paused_until = time.monotonic() + PAUSE_SECONDS
            self._online.close()
            self._online = self._connect()
            raise

    def _known(self, ids: Int) -> tuple[StoredFeatures, Int]:
        ids = np.unique(ids)
        cached = self._cache.take(self._cache.slots(ids))
        rows = cached.known.nonzero()[0]
        return StoredFeatures(cached.columns.take(rows), *(getattr(cached, name)[rows] for name in _OF_ITEMS)), ids[
            rows
        ]
