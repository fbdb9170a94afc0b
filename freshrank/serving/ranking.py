"""Ids in, calibrated scores out: what the Triton model ``ranking`` does, without Triton.

A request is answered by the version the pointer names when it arrives. Whatever the online store does not know, or
cannot say in time, is a missing feature: the answer is finite and says that it is cold or degraded.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from freshrank.datasets.contract import Dataset
from freshrank.encoding import Blocks, Catalog, Encoder
from freshrank.errors import ServingError
from freshrank.feature_store import CREATED_AT_US, FeatureStore
from freshrank.frames import assemble_request
from freshrank.schema import ITEM_AGE, QUERY_ITEM_ID, SEQUENCE_ITEMS, Kind, Schema
from freshrank.serving.bundle import Tensors, TensorSpec
from freshrank.serving.feast_import import import_feast
from freshrank.serving.protocol import INPUTS, MAX_CANDIDATES, REQUIRED, context_columns
from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.workspace import Workspace

READ_SECONDS = 1.0
"""A read of the online store that takes longer is given up; it takes some 10 milliseconds."""
OPEN_SECONDS = 30.0
CallRanker = Callable[[int, Blocks], Blocks]
_SPECS = {spec.name: spec for spec in INPUTS}
_KINDS = {"context_categorical": Kind.CATEGORICAL, "context_numeric": Kind.NUMERIC}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_MICROSECOND = (datetime(9999, 1, 1, tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)

log = logging.getLogger(__name__)


class BadRequest(ValueError):
    """The request is the client's to mend; the text says what was received and what was expected."""


class NothingPublished(ServingError):
    """No version has been put in service yet."""


@dataclass(frozen=True)
class Query:
    """A checked request; ``context`` holds arrays of one value per candidate, by column."""

    user_id: int
    item_ids: npt.NDArray[np.int64]
    at: datetime
    context: dict[str, npt.NDArray[Any]]

    @property
    def query_items(self) -> list[int]:
        return self.context[QUERY_ITEM_ID][:1].tolist() if QUERY_ITEM_ID in self.context else []

    @classmethod
    def parse(cls, request: Tensors, schema: Schema) -> "Query":
        """Check a request's tensors against ``protocol.INPUTS`` and the schema's context columns.

        Raises:
            BadRequest: a tensor is missing, not known, or not what was expected.
        """
        _check_tensors(request)
        count = len(request["item_ids"])
        if not 1 <= count <= MAX_CANDIDATES:
            raise BadRequest(f"item_ids: received {count} candidates, expected 1 to {MAX_CANDIDATES}")
        given = _context(request, schema)
        if schema.has_query and QUERY_ITEM_ID in request:
            given[QUERY_ITEM_ID] = request[QUERY_ITEM_ID]
        context = {name: np.repeat(value, count) for name, value in given.items()}
        return cls(int(request["user_id"][0]), request["item_ids"], _event_time(request), context)


def _check_tensors(request: Tensors) -> None:
    unknown = sorted(set(request) - set(_SPECS))
    missing = [name for name in REQUIRED if name not in request]
    if unknown or missing:
        raise BadRequest(f"received tensors {sorted(request)}, expected {list(REQUIRED)} and any of {list(_SPECS)}")
    for name, value in request.items():
        _check_tensor(value, _SPECS[name])


def _check_tensor(value: npt.NDArray[Any], spec: TensorSpec) -> None:
    sizes = zip(value.shape, spec.shape, strict=False)
    fits = value.ndim == len(spec.shape) and all(wanted in (-1, size) for size, wanted in sizes)
    if not fits or value.dtype != spec.dtype:
        expected = f"{spec.dtype} of shape {list(spec.shape)} (-1: any)"
        raise BadRequest(f"{spec.name}: received {value.dtype} of shape {list(value.shape)}, expected {expected}")


def _context(request: Tensors, schema: Schema) -> dict[str, npt.NDArray[Any]]:
    """The context values that are there: arrays of length 1, by column."""
    columns = {tensor: context_columns(schema, kind) for tensor, kind in _KINDS.items()}
    order = [name for names in columns.values() for name in names]
    sent = {name for tensor, names in columns.items() if tensor in request for name in names}
    present = request.get("context_present", np.array([name in sent for name in order], dtype=np.bool_))
    _check_length("context_present", present, order)
    values: dict[str, npt.NDArray[Any]] = {}
    for tensor in columns.keys() & request.keys():
        _check_length(tensor, request[tensor], columns[tensor])
        values |= dict(zip(columns[tensor], request[tensor].reshape(-1, 1), strict=True))
    there = {name: values[name] for name, is_there in zip(order, present, strict=True) if is_there and name in values}
    for name, value in there.items():
        if not np.isfinite(value[0]):
            raise BadRequest(f"context column '{name}': received {value[0]}, expected a finite number; "
                             "mark a missing value in context_present")  # fmt: skip
    return there


def _check_length(tensor: str, values: npt.NDArray[Any], columns: list[str]) -> None:
    if len(values) != len(columns):
        raise BadRequest(
            f"{tensor}: received {len(values)} values, expected {len(columns)}, one per column of {columns}"
        )


def _event_time(request: Tensors) -> datetime:
    microseconds = int(request.get("event_time", np.zeros(1))[0])
    if not 0 <= microseconds < _LAST_MICROSECOND:
        raise BadRequest(f"event_time: received {microseconds}, expected microseconds since 1970 UTC, or 0 for now")
    return _EPOCH + timedelta(microseconds=microseconds) if microseconds else datetime.now(UTC)


@dataclass(frozen=True)
class Known:
    """What the online store says about one request: a row for the user, one per distinct item, sequence and query
    included."""

    users: pl.DataFrame
    items: pl.DataFrame

    def inputs(self, query: Query, encoder: Encoder) -> tuple[Blocks, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """The ranker's inputs, and which candidates are cold and which are known; what is not held is missing."""
        users = _rows(self.users, [query.user_id])
        items = _rows(self.items, query.item_ids)
        frame = assemble_request(encoder.schema, users, items, query.at, query.context)
        # As in training, an item of a sequence that the items table does not hold is new, not empty.
        catalog = Catalog.build(self.items.filter(pl.col(CREATED_AT_US).is_not_null()), encoder)
        cold = (frame.rows[ITEM_AGE] < encoder.schema.fresh_days).to_numpy()
        return encoder.inputs(frame, catalog), cold, items[CREATED_AT_US].is_not_null().to_numpy()


def _rows(table: pl.DataFrame, ids: npt.ArrayLike) -> pl.DataFrame:
    """One row per id, in their order; nulls where the table has none."""
    key = table.columns[0]
    wanted = pl.DataFrame({key: np.asarray(ids, dtype=np.int64)})
    return wanted.join(table, on=key, how="left", maintain_order="left")


class OnlineReader:
    """Reads the online store in bounded time: ``seconds``, but for the first read, which opens it."""

    def __init__(self, schema: Schema, home: Path, seconds: float = READ_SECONDS) -> None:
        self.schema = schema
        self._workspace = Workspace.of(schema.name, home)
        self._seconds = seconds
        self._limit = OPEN_SECONDS
        self._store = self._connect()
        self._executor = ThreadPoolExecutor(1, "online-store")
        self._pending: Future[Known] | None = None

    def read(self, user_id: int, item_ids: list[int]) -> Known:
        """What is known of the user, of ``item_ids`` and of the items of the user's sequence.

        Raises TimeoutError when it takes too long, and otherwise whatever Feast raises: the next read connects afresh.
        """
        # One thread at most can hang in a store that never answers; the requests meanwhile do not wait for it.
        if self._pending and not self._pending.done():
            raise TimeoutError("an earlier read of the online store still hangs")
        limit, self._limit = self._limit, self._seconds
        self._pending = self._executor.submit(self._read, self._store, user_id, item_ids)
        try:
            return self._pending.result(limit)
        except TimeoutError:
            raise TimeoutError(f"no answer from the online store within {limit:g} s") from None
        except Exception:
            self._store = self._connect()
            raise

    def nothing(self) -> Known:
        """An empty answer with the columns of a full one; the store is not asked."""
        return Known(self._store.online_users([]), self._store.online_items([]))

    def _connect(self) -> FeatureStore:
        # Reading online takes the schema alone: neither the log nor its manifest need to be where the server is.
        return FeatureStore(Dataset(Path(), self.schema, {}), self._workspace)

    @staticmethod
    def _read(store: FeatureStore, user_id: int, item_ids: list[int]) -> Known:
        users = store.online_users([user_id])
        sequence = users[SEQUENCE_ITEMS].explode().drop_nulls().to_list()
        return Known(users, store.online_items(list(dict.fromkeys([*item_ids, *sequence]))))


@dataclass(frozen=True)
class _Version:
    number: int
    encoder: Encoder
    reader: OnlineReader


class RankingService:
    """Answers requests with the served version of ``repository``; features come from the online store of ``home``.

    ``call_ranker(version, blocks)`` gives that version's outputs by name. Not for use by several threads.
    """

    def __init__(self, repository: ModelRepository, home: Path, call_ranker: CallRanker) -> None:
        self._repository = repository
        self._home = home
        self._call_ranker = call_ranker
        self._seen: tuple[int, int, int] | None = None
        self._pointer: Pointer | None = None
        self._versions: dict[int, _Version] = {}
        self._readable = True

    def warm_up(self) -> None:
        """Import Feast, and where a version is served load it and open its store, so that no request waits for it."""
        import_feast()
        try:
            version = self._version(self._served())
            version.reader.read(0, [0])
        except NothingPublished as error:
            log.info("%s", error)
        except Exception as error:
            self._note(error)

    def rank(self, request: Tensors) -> Tensors:
        """Tensors of ``protocol.OUTPUTS`` for tensors of ``protocol.INPUTS``.

        Raises:
            BadRequest: the request is not what the protocol says.
            NothingPublished: there is no version to answer.
        """
        version = self._version(self._served())
        query = Query.parse(request, version.encoder.schema)
        (blocks, cold, known), degraded = self._inputs(version, query)
        answer = self._call_ranker(version.number, blocks)
        return {
            "probabilities": answer["probabilities"],
            "score": answer["score"],
            "model_version": np.array([version.number]),
            "arm": np.array([0]),
            "cold": cold,
            "known": known,
            "degraded": np.array([degraded]),
        }

    def _inputs(
        self, version: _Version, query: Query
    ) -> tuple[tuple[Blocks, npt.NDArray[np.bool_], npt.NDArray[np.bool_]], bool]:
        try:
            wanted = [*query.item_ids.tolist(), *query.query_items]
            inputs = version.reader.read(query.user_id, wanted).inputs(query, version.encoder)
        except Exception as error:
            # Whatever is wrong with the store, a ranking without features is better than none.
            self._note(error)
            return version.reader.nothing().inputs(query, version.encoder), True
        self._note(None)
        return inputs, False

    def _note(self, error: Exception | None) -> None:
        """Log when the store breaks and when it is back, not at every request between."""
        if self._readable and error:
            problem = str(error).partition("\n")[0]
            log.warning("the online store cannot be read, requests are answered without features: %s: %s",
                        type(error).__name__, problem)  # fmt: skip
        elif error is None and not self._readable:
            log.warning("the online store can be read again")
        self._readable = error is None

    def _served(self) -> Pointer:
        """The pointer, read again only when its file is another one."""
        try:
            state = self._repository.pointer_path.stat()
        except FileNotFoundError:
            raise NothingPublished("nothing is published yet; publish a bundle with `freshrank publish`") from None
        seen = (state.st_mtime_ns, state.st_size, state.st_ino)
        if self._pointer is None or seen != self._seen:
            self._pointer, self._seen = self._repository.served(), seen
        assert self._pointer
        return self._pointer

    def _version(self, pointer: Pointer) -> _Version:
        if pointer.version not in self._versions:
            encoder = Encoder.load(self._repository.version_directory(pointer.version))
            kept = {number: version for number, version in self._versions.items() if number in pointer.live}
            self._versions = kept | {pointer.version: _Version(pointer.version, encoder, self._reader(encoder.schema))}
        return self._versions[pointer.version]

    def _reader(self, schema: Schema) -> OnlineReader:
        """That of a version of the same schema, where there is one: a new version then finds its store open."""
        readers = [version.reader for version in self._versions.values() if version.encoder.schema == schema]
        return readers[0] if readers else OnlineReader(schema, self._home)
