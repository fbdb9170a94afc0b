"""Clients: :class:`Client` asks for rankings, :class:`TritonClient` makes the few other calls to a Triton server.

Both speak gRPC, and every refusal of the server becomes a ServingError.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tritonclient.grpc import InferRequestedOutput, aio

from freshrank.bundle.golden import Tensors
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.mappings import MAPPINGS
from freshrank.errors import ConfigError
from freshrank.schema import ITEM_ID, QUERY_ITEM_ID, USER_ID, Kind, Schema
from freshrank.serving.client.ids import Codes, Id, converted
from freshrank.serving.protocol import OUTPUTS, context_columns
from freshrank.serving.repository import RANKING
from freshrank.serving.triton import (
    CHANNEL_ARGUMENTS,
    TritonClient,
    input_tensor,
    off_wire,
    on_wire,
    output_arrays,
    refusals,
    refuse_other_project,
)
from freshrank.settings import settings

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Answer:
    """What the server said of each candidate, in the order they were given."""

    items: list[Id]
    actions: list[str]
    probabilities: np.ndarray[Any, Any]
    """float32 [N, A], calibrated."""
    score: np.ndarray[Any, Any]
    """float32 [N]: probabilities weighted by the utilities of the schema."""
    cold: np.ndarray[Any, Any]
    """bool [N]: younger than the schema's ``fresh_days``, or not known."""
    known: np.ndarray[Any, Any]
    """bool [N]: whether the online store holds the item."""
    model_version: int
    arm: int
    """Of the running experiment: 0 the champion, also without an experiment; 1, ... the challengers in their order."""
    degraded: bool
    """The online store could not be read, and every feature counted as missing."""

    def rows(self) -> list[dict[str, Any]]:
        """One dict per candidate, best first: rank, item, score, p_<action>, ..., cold, known."""
        order = np.argsort(-self.score, kind="stable").tolist()
        return [{"rank": rank} | self._row(place) for rank, place in enumerate(order, start=1)]

    def _row(self, place: int) -> dict[str, Any]:
        names = [f"p_{action}" for action in self.actions]
        probabilities = dict(zip(names, self.probabilities[place].tolist(), strict=True))
        flags = {"cold": bool(self.cold[place]), "known": bool(self.known[place])}
        return {"item": self.items[place], "score": float(self.score[place])} | probabilities | flags

    @classmethod
    def of(cls, items: Sequence[Id], schema: Schema, answer: Tensors) -> Self:
        return cls(
            items=list(items),
            actions=schema.actions,
            probabilities=answer["probabilities"],
            score=answer["score"],
            cold=answer["cold"],
            known=answer["known"],
            model_version=int(answer["model_version"][0]),
            arm=int(answer["arm"][0]),
            degraded=bool(answer["degraded"][0]),
        )


class _RequestCodec:
    """Shared by both clients: converts ids, times and values as in the log to tensors, and answers back."""

    def __init__(self, url: str, schema: Schema, mappings: Path, timeout: float = 30.0) -> None:
        """``mappings`` holds ``<column>.parquet`` for every column whose values were text at the import."""
        self.url = url
        self.timeout = timeout
        self.schema = schema
        self._codes = Codes(mappings)
        self._is_own_server = False

    @classmethod
    def for_dataset(cls, data: Path | str, timeout: float = 30.0) -> Self:
        """For the imported dataset at ``data`` and the server that the settings name; ``timeout`` seconds a request."""
        dataset = Dataset.open(Path(data))
        return cls(settings().triton_grpc_url, dataset.schema, dataset.path / MAPPINGS, timeout)

    def _request(
        self,
        user: Id,
        candidates: Sequence[Id],
        at: str | datetime | None,
        context: Sequence[str] | Mapping[str, Any] | None,
        query: Id | None,
        version: int | None,
    ) -> Tensors:
        if isinstance(candidates, str | bytes):
            raise ConfigError(f"candidates: received the text {candidates!r}, expected a list of item ids")
        tensors = _context(context, self.schema, self._codes)
        tensors |= {} if query is None else {QUERY_ITEM_ID: np.array([self._codes.id(ITEM_ID, query)])}
        ids = [self._codes.id(ITEM_ID, item) for item in candidates]
        return _request(self._codes.id(USER_ID, user), ids, at, version) | tensors


class Client(_RequestCodec):
    """Ranks candidates for users of one dataset; close it, or use it in a ``with``."""

    def __init__(self, url: str, schema: Schema, mappings: Path, timeout: float = 30.0) -> None:
        super().__init__(url, schema, mappings, timeout)
        self._triton = TritonClient(url, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._triton.close()

    def rank(
        self,
        user: Id,
        candidates: Sequence[Id],
        at: str | datetime | None = None,
        context: Sequence[str] | Mapping[str, Any] | None = None,
        query: Id | None = None,
        *,
        version: int | None = None,
        request_id: str = "",
    ) -> Answer:
        """Rank ``candidates`` for ``user``; ids as in the log, unknown ones included.

        Args:
            at: time of the request: ISO 8601 with a zone, or an aware datetime; now by default.
            context: values of context columns, by name or as ``name=value``; one not named, or None, is missing.
            query: the item the request starts from, where the schema has ``query_item_id``.
            version: a loaded version that is to answer, whatever serves and whatever experiment runs.
            request_id: what the request log calls it; outcomes are joined on it.

        Raises:
            ConfigError: a time without a zone, candidates that are no list, or an id or context value that cannot be.
            ServingError: no server, one of another dataset, nothing published, or the server refused.
        """
        return self._ask(candidates, self._request(user, candidates, at, context, query, version), request_id)

    def rank_ids(
        self,
        user_id: int,
        item_ids: Sequence[int],
        at: datetime | None = None,
        *,
        version: int | None = None,
        request_id: str = "",
    ) -> Answer:
        """Rank by the int64 ids of the imported dataset."""
        return self._ask(item_ids, _request(user_id, item_ids, at, version), request_id)

    def _ask(self, items: Sequence[Id], request: Tensors, request_id: str) -> Answer:
        if not self._is_own_server:
            self._triton.require_project(self.schema.name)
            self._is_own_server = True
        names = [spec.name for spec in OUTPUTS]
        answer = self._triton.infer(RANKING, on_wire(request), names, request_id=request_id)
        return Answer.of(items, self.schema, off_wire(answer))


class AsyncClient(_RequestCodec):
    """The asyncio twin of :class:`Client`, for services that hold many requests at once; ``async with``."""

    def __init__(self, url: str, schema: Schema, mappings: Path, timeout: float = 30.0) -> None:
        super().__init__(url, schema, mappings, timeout)
        self._checking = asyncio.Lock()
        self._client = aio.InferenceServerClient(url, channel_args=CHANNEL_ARGUMENTS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.close()

    async def rank(
        self,
        user: Id,
        candidates: Sequence[Id],
        at: str | datetime | None = None,
        context: Sequence[str] | Mapping[str, Any] | None = None,
        query: Id | None = None,
        *,
        version: int | None = None,
        request_id: str = "",
    ) -> Answer:
        """As :meth:`Client.rank`."""
        return await self._ask(candidates, self._request(user, candidates, at, context, query, version), request_id)

    async def rank_ids(
        self,
        user_id: int,
        item_ids: Sequence[int],
        at: datetime | None = None,
        *,
        version: int | None = None,
        request_id: str = "",
    ) -> Answer:
        """Rank by the int64 ids of the imported dataset."""
        return await self._ask(item_ids, _request(user_id, item_ids, at, version), request_id)

    async def _ask(self, items: Sequence[Id], request: Tensors, request_id: str) -> Answer:
        await self._require_own_server()
        names = [spec.name for spec in OUTPUTS]
        with refusals(self.url, f"asking {RANKING}"):
            result = await self._client.infer(
                RANKING,
                [input_tensor(name, value) for name, value in on_wire(request).items()],
                outputs=[InferRequestedOutput(name) for name in names],
                request_id=request_id,
                client_timeout=self.timeout,
            )
        return Answer.of(items, self.schema, off_wire(output_arrays(result, names)))

    async def _require_own_server(self) -> None:
        async with self._checking:
            if self._is_own_server:
                return
            with refusals(self.url, f"asking for the configuration of {RANKING}"):
                answer = await self._client.get_model_config(RANKING, client_timeout=self.timeout)
            refuse_other_project(self.url, answer.config, self.schema.name)
            self._is_own_server = True


def _request(user_id: int, item_ids: Sequence[int], at: str | datetime | None, version: int | None = None) -> Tensors:
    tensors = {"user_id": np.array([user_id], np.int64), "item_ids": np.array(item_ids, np.int64)}
    tensors |= {} if at is None else {"event_time": np.array([_microseconds(at)])}
    return tensors if version is None else tensors | {"version": np.array([version], np.int64)}


def _microseconds(at: str | datetime) -> int:
    when = converted(datetime.fromisoformat, at) if isinstance(at, str) else at
    if when is None or when.tzinfo is None:
        raise ConfigError(f"at: received {str(at)!r}, expected a time with its zone, e.g. 2024-05-01T12:00:00+00:00")
    return (when - _EPOCH) // timedelta(microseconds=1)


def _context(given: Sequence[str] | Mapping[str, Any] | None, schema: Schema, codes: Codes) -> Tensors:
    values = dict(given) if isinstance(given, Mapping) else dict(map(_named, given or []))
    values = {name: value for name, value in values.items() if value is not None}
    if not values:
        return {}
    categorical, numeric = (context_columns(schema, kind) for kind in (Kind.CATEGORICAL, Kind.NUMERIC))
    for name in values:
        if name not in (*categorical, *numeric):
            raise ConfigError(f"context: received column '{name}', expected one of {[*categorical, *numeric]}")
    encoded = [codes.category(name, values[name]) if name in values else 0 for name in categorical]
    return {
        "context_categorical": np.array(encoded, np.int64),
        "context_numeric": np.array([_number(name, values.get(name, 0)) for name in numeric], np.float32),
        "context_present": np.array([name in values for name in (*categorical, *numeric)]),
    }


def _named(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"context: received {text!r}, expected name=value")
    return name, value


def _number(name: str, value: Any) -> float:
    number = converted(float, value)
    if number is None or not np.isfinite(number):
        raise ConfigError(f"context column '{name}': received {value!r}, expected a finite number")
    return number
