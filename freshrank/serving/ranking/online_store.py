"""Read Feast's online store without Feast's client, which costs some 60 microseconds per entity.

The layout is Feast's published online format: in Redis one hash per entity with a field per feature and a timestamp per
view, in SQLite one table per view with a row per feature; values are serialized ``feast.types.Value`` messages. Tests
hold that every read equals that of :class:`freshrank.features.store.FeatureStore`.
"""

import sqlite3
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from freshrank.features.columns import PRESENT, Columns, Int, Layout
from freshrank.features.daily_aggregates import KEYS
from freshrank.features.encoder import layouts
from freshrank.features.store import CREATED_AT_US, VIEWS, view_columns
from freshrank.schema import Entity, Feature, Kind, Origin, Schema
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace

Values = Sequence[bytes | None]
Read = tuple[Sequence[float | None], list[Values]]
"""Of a view: when each id's row was known (seconds since 1970), and per column the stored values."""
Held = Mapping[str, float]
"""Per view of snapshots the instant (seconds since 1970) its online rows stand for; a view not named holds nothing."""
_FLOAT = b"\x35"
"""Tag of ``float_val`` (field 6, 32 bit): a float is stored in five bytes, which makes a column one copy."""
_FLOAT_RECORD = np.dtype([("tag", "u1"), ("value", "<f4")])
_NULLS = (None, b"")


@dataclass(frozen=True)
class View:
    """A Feast view: its columns in stored order, and what says how long they stand."""

    name: str
    columns: tuple[str, ...]
    origin: Origin


@dataclass(frozen=True)
class StoredFeatures:
    """What the store holds of some users or items, in the order they were asked for."""

    columns: Columns
    created_us: Int
    """Of items: creation time in microseconds since 1970; 0 where not known."""
    known: np.ndarray[Any, np.dtype[np.bool_]]
    """Of items: whether the items table holds them."""
    counted_us: Int
    """Of items: the hour of their hourly counters in microseconds since 1970; 0 where there are none. Whether they
    still stand is for the user to see (``hourly.only_standing``)."""


class StoreReader(Protocol):
    """Where stored bytes come from."""

    def read(self, wanted: Mapping[Entity, Int]) -> dict[Entity, dict[str, Read]]:
        """What is stored of each id, by entity and view."""

    def close(self) -> None:
        """Give the connection back."""


class Online:
    """Decoded reads of one dataset's online store; not for use by several threads."""

    def __init__(self, schema: Schema, rows: StoreReader) -> None:
        self._rows = rows
        self.layouts = layouts(schema)
        self._views = views(schema)

    def read(self, wanted: Mapping[Entity, Int], held: Held) -> dict[Entity, StoredFeatures]:
        """Features of ids by entity, in one round trip; raises whatever the store's client raises."""
        asked = {entity: ids for entity, ids in wanted.items() if len(ids)}
        raw = self._rows.read(asked) if asked else {}
        return {e: self._decoded(e, len(ids), raw.get(e, {}), held) for e, ids in wanted.items()}

    def close(self) -> None:
        self._rows.close()

    def _decoded(self, entity: Entity, count: int, raw: Mapping[str, Read], held: Held) -> StoredFeatures:
        columns: dict[str, Values] = {}
        counted = np.zeros(count, np.int64)
        for view in self._views[entity]:
            if view.name in raw:
                times, values = raw[view.name]
                if view.origin is Origin.HOURLY:
                    counted = np.array([int((at or 0) * 1e6) for at in times], np.int64)
                columns |= zip(view.columns, _current(view, times, values, held), strict=True)
        created = columns.pop(CREATED_AT_US, [None] * count)
        return StoredFeatures(
            decoded(self.layouts[entity], columns, count),
            np.array([0 if value in _NULLS else _message(value).int64_val for value in created], np.int64),
            np.array([value not in _NULLS for value in created], np.bool_),
            counted,
        )


def views(schema: Schema) -> dict[Entity, list[View]]:
    """The views of each entity, as ``feature_store.definitions`` declares them."""
    by_entity: dict[Entity, list[View]] = {entity: [] for entity in KEYS}
    for (entity, origin), name in VIEWS.items():
        if columns := view_columns(schema, entity, origin):
            by_entity[entity].append(View(name, tuple(columns), origin))
    return by_entity


def _current(view: View, times: Sequence[float | None], values: list[Values], held: Held) -> list[Values]:
    """``values`` but for those of a snapshot that is not the one held: their entity is in no snapshot any more."""
    if view.origin is not Origin.SNAPSHOT:
        return values
    oldest = held.get(view.name, float("inf"))
    old = [at is None or at < oldest for at in times]
    if not any(old):
        return values
    return [[None if gone else value for gone, value in zip(old, column, strict=True)] for column in values]


def decoded(layout: Layout, values: Mapping[str, Values], count: int) -> Columns:
    """Stored bytes of ``count`` ids by feature as columns; a feature that is not there is missing."""
    columns = Columns.missing(layout, count)
    for feature in layout.features:
        if feature.name in values:
            kind, place = layout.places[feature.name]
            _DECODE[kind](columns.arrays, place, feature, values[feature.name])
    return columns


def _numbers(arrays: dict[str, Any], place: slice, feature: Feature, column: Values) -> None:
    absent = _FLOAT + struct.pack("<f", feature.missing)
    joined = b"".join([value or absent for value in column])
    if len(joined) == len(column) * _FLOAT_RECORD.itemsize:
        records = np.frombuffer(joined, _FLOAT_RECORD)
        if (records["tag"] == _FLOAT[0]).all():
            arrays[Kind.NUMERIC][:, place.start] = records["value"]
            return
    raise ValueError(
        f"online store: feature '{feature.name}' holds something else than floats; apply and materialize "
        "the dataset again"
    )


def _categories(arrays: dict[str, Any], place: slice, feature: Feature, column: Values) -> None:
    for row, value in enumerate(column):
        if value not in _NULLS:
            arrays[Kind.CATEGORICAL][row, place.start] = _integer(value)
            arrays[PRESENT + Kind.CATEGORICAL][row, place.start] = True


def _lists(arrays: dict[str, Any], place: slice, feature: Feature, column: Values) -> None:
    for row, value in enumerate(column):
        if value not in _NULLS:
            numbers = _message(value).int64_list_val.val
            retained = numbers[: feature.dim] if feature.kind is Kind.MULTI_VALUED else numbers[-feature.dim :]
            filled = slice(place.start, place.start + len(retained))
            arrays[feature.kind][row, filled] = retained
            arrays[PRESENT + feature.kind][row, filled] = True


def _vectors(arrays: dict[str, Any], place: slice, feature: Feature, column: Values) -> None:
    for row, value in enumerate(column):
        if value not in _NULLS:
            # Packed little-endian floats are the end of the message, whatever lengths stand before them.
            arrays[Kind.EMBEDDING][row, place] = np.frombuffer(value[-4 * feature.dim :], "<f4")


_DECODE: dict[Kind, Callable[[dict[str, Any], slice, Feature, Values], None]] = {
    Kind.NUMERIC: _numbers,
    Kind.CATEGORICAL: _categories,
    Kind.MULTI_VALUED: _lists,
    Kind.SEQUENCE: _lists,
    Kind.EMBEDDING: _vectors,
}


def _message(value: bytes) -> Any:
    return _value_type().FromString(value)


@lru_cache(4096)
def _integer(value: bytes) -> int:
    """Of a categorical feature, which has few values."""
    return int(_message(value).int64_val)


@lru_cache(1)
def _value_type() -> Any:
    from feast.protos.feast.types.Value_pb2 import Value

    return Value


@lru_cache(256)
def _seconds(at: bytes) -> float:
    from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]

    return float(Timestamp.FromString(at).seconds)


def key_prefix(entity: Entity) -> bytes:
    """What comes before the eight bytes of an id in Feast's serialized entity key (version 3)."""
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

    key = EntityKey(join_keys=[KEYS[entity]], entity_values=[_value_type()(int64_val=0)])
    return serialize_entity_key(key, entity_key_serialization_version=3)[:-8]


def _entity_keys(prefix: bytes, ids: Int) -> list[bytes]:
    return [prefix + number.tobytes() for number in ids.astype("<i8")]


class RedisReader:
    """One HMGET per entity, all in one pipeline."""

    def __init__(self, schema: Schema, url: str, seconds: float) -> None:
        self.client = _redis(url, seconds)
        self._project = schema.name.encode()
        self._prefixes = {entity: key_prefix(entity) for entity in KEYS}
        self._views = views(schema)
        self._fields = {entity: _fields(views_of_entity) for entity, views_of_entity in self._views.items()}

    def read(self, wanted: Mapping[Entity, Int]) -> dict[Entity, dict[str, Read]]:
        with self.client.pipeline(transaction=False) as pipeline:
            for entity, ids in wanted.items():
                for key in self.keys(entity, ids):
                    pipeline.execute_command("HMGET", key, *self._fields[entity])
            replies = iter(pipeline.execute())
        return {e: self._by_view(e, list(zip(*(next(replies) for _ in ids), strict=True))) for e, ids in wanted.items()}

    def keys(self, entity: Entity, ids: Int) -> list[bytes]:
        return [key + self._project for key in _entity_keys(self._prefixes[entity], ids)]

    def fields(self, entity: Entity) -> list[bytes]:
        """Of the hash of one entity: per view its timestamp, then its columns."""
        return self._fields[entity]

    def close(self) -> None:
        self.client.close()

    def _by_view(self, entity: Entity, columns: list[Values]) -> dict[str, Read]:
        by_view: dict[str, Read] = {}
        start = 0
        for view in self._views[entity]:
            end = start + 1 + len(view.columns)
            times = [None if at is None else _seconds(at) for at in columns[start]]
            by_view[view.name] = (times, columns[start + 1 : end])
            start = end
        return by_view


def _fields(views: Iterable[View]) -> list[bytes]:
    from feast.infra.online_stores.helpers import _mmh3

    return [
        field
        for view in views
        for field in (f"_ts:{view.name}".encode(), *(_mmh3(f"{view.name}:{c}") for c in view.columns))
    ]


def _redis(url: str, seconds: float) -> Any:
    """A client that gives up after ``seconds``, and connects anew at once where the server has hung up."""
    from feast.infra.online_stores.redis import RedisOnlineStore
    from redis import ConnectionError, Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    (node, *_), options = RedisOnlineStore._parse_connection_string(url)
    retry = Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
    limits = {"socket_timeout": seconds, "socket_connect_timeout": seconds, "retry": retry}
    return Redis(host=node["host"], port=int(node["port"]), **limits | options)


class SqliteReader:
    """One query per view; a file that is replaced or mended is opened anew after the error it causes."""

    def __init__(self, schema: Schema, path: Path, seconds: float) -> None:
        self._path = path
        self._seconds = seconds
        self._project = schema.name
        self._prefixes = {entity: key_prefix(entity) for entity in KEYS}
        self._views = views(schema)

    @cached_property
    def _connection(self) -> sqlite3.Connection:
        address = f"{self._path.absolute().as_uri()}?mode=ro"
        return sqlite3.connect(address, uri=True, timeout=self._seconds, check_same_thread=False)

    def read(self, wanted: Mapping[Entity, Int]) -> dict[Entity, dict[str, Read]]:
        try:
            return {e: {view.name: self._view(e, view, ids) for view in self._views[e]} for e, ids in wanted.items()}
        except sqlite3.Error:
            self.close()
            raise

    def close(self) -> None:
        if "_connection" in self.__dict__:
            self._connection.close()
            del self.__dict__["_connection"]

    def _view(self, entity: Entity, view: View, ids: Int) -> Read:
        keys = _entity_keys(self._prefixes[entity], ids)
        marks = ",".join("?" * len(keys))
        query = (
            f'SELECT entity_key, feature_name, value, event_ts FROM "{self._project}_{view.name}" '  # noqa: S608
            f"WHERE entity_key IN ({marks}) ORDER BY entity_key"
        )
        rows = {key: list(stored) for key, stored in groupby(self._connection.execute(query, keys), itemgetter(0))}
        values = {key: {name: value for _, name, value, _ in stored} for key, stored in rows.items()}
        times = [_local_seconds(rows[key][0][3]) if key in rows else None for key in keys]
        return times, [[values[key].get(name) if key in values else None for key in keys] for name in view.columns]


@lru_cache(256)
def _local_seconds(stored: int) -> float:
    """Feast's SQLite store keeps a UTC time as if it were local."""
    return datetime.fromtimestamp(stored).replace(tzinfo=UTC).timestamp()


def online_rows(schema: Schema, workspace: Workspace) -> StoreReader:
    """The store that the settings name."""
    where = settings()
    if where.online_store == "redis":
        return RedisReader(schema, where.redis_url.get_secret_value(), where.online_timeout_seconds)
    return SqliteReader(schema, workspace.feast / "online.db", where.online_timeout_seconds)
