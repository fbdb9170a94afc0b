"""Clients: :class:`Client` asks for rankings, :class:`TritonClient` makes the few other calls to a Triton server.

Both speak gRPC, and every refusal of the server becomes a ServingError.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import polars as pl
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, aio
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from freshrank.datasets.contract import Dataset
from freshrank.datasets.mappings import MAPPINGS, mapping_of
from freshrank.errors import ConfigError, NoAnswerInTime, ServerUnreachable, ServingError
from freshrank.schema import ITEM_ID, QUERY_ITEM_ID, USER_ID, Kind, Schema
from freshrank.serving import control
from freshrank.serving.golden import Tensors
from freshrank.serving.protocol import OUTPUTS, context_columns
from freshrank.serving.repository import RANKING, ModelRepository
from freshrank.settings import settings

UNKNOWN_ID = -1
"""What an id that no import has seen is sent as: it is ranked as a new item, or for a new user."""
_UNLIMITED = -1
_CHANNEL = [
    ("grpc.max_send_message_length", _UNLIMITED),
    ("grpc.max_receive_message_length", _UNLIMITED),
    # A proxy set for the web must not stand between us and a server on loopback or in the cluster.
    ("grpc.enable_http_proxy", 0),
    # gRPC waits 1 s, then longer, before it tries again a server that was still starting.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_UNREACHABLE = (
    "failed to connect to all addresses", "errors resolving", "DNS resolution failed", "Connection refused",
    "Connection reset", "Socket closed",
)  # fmt: skip
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Id = str | int
T = TypeVar("T")


class TritonClient:
    """A gRPC connection to ``url`` (``host:port``); close it, or use it in a ``with``.

    ``token`` goes with the calls that list, load or unload models and with no other; the settings' by default.
    """

    def __init__(self, url: str, timeout: float = 30.0, token: str | None = None) -> None:
        self.url = url
        self._timeout = timeout
        self._deadline = float("inf")
        self._client = InferenceServerClient(url, channel_args=_CHANNEL)
        held = settings().triton_control_token.get_secret_value() if token is None else token
        self._control = {control.GRPC_HEADER: held} if held else None

    @classmethod
    def controlling(cls, repository: ModelRepository, url: str, timeout: float = 30.0) -> Self:
        """With the token of the server of ``repository``."""
        return cls(url, timeout, control.token_of(repository.root))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def within(self, seconds: float) -> Iterator[Self]:
        """All calls together get ``seconds``: what is left of them is the most that each of them waits."""
        self._deadline = time.monotonic() + seconds
        try:
            yield self
        finally:
            self._deadline = float("inf")

    @property
    def timeout(self) -> float:
        """Seconds that a call waits for its answer."""
        return self._limited(self._timeout)

    def _limited(self, seconds: float) -> float:
        # Not 0: Triton's client takes that for "no limit".
        return max(0.001, min(seconds, self._deadline - time.monotonic()))

    def is_ready(self) -> bool:
        """Whether the server has finished starting, models included, and answers."""
        try:
            return bool(self._client.is_server_ready(client_timeout=self.timeout))
        except InferenceServerException:
            return False

    def require_ready(self) -> None:
        if not self.is_ready():
            raise ServerUnreachable(f"no Triton is ready at {self.url}; start one with `freshrank serve`")

    def require_project(self, project: str) -> None:
        """ServingError unless the server ranks for ``project``: another one would answer with items of its own."""
        with _refusals(self.url, f"asking for the configuration of {RANKING}"):
            answer = self._client.get_model_config(RANKING, client_timeout=self.timeout)
        _require_project(self.url, answer.config, project)

    def is_model_ready(self, model: str, version: int | None = None) -> bool:
        with _refusals(self.url, f"asking for {model}"):
            name = "" if version is None else str(version)
            return bool(self._client.is_model_ready(model, name, client_timeout=self.timeout))

    def ready_versions(self) -> dict[str, list[int]]:
        """Loaded versions of every model."""
        with _refusals(self.url, "listing models"):
            index = self._client.get_model_repository_index(headers=self._control, client_timeout=self.timeout)
        loaded: dict[str, list[int]] = {}
        for model in index.models:
            if model.state == "READY":
                loaded.setdefault(model.name, []).append(int(model.version))
        return loaded

    def load(self, model: str, config_json: str | None = None, timeout: float = 300.0) -> None:
        """Load or reload ``model``; with ``config_json`` under that configuration rather than the one on disk.

        Versions that are loaded, listed and unchanged are not touched; on failure all that was loaded stays.
        """
        with _refusals(self.url, f"loading {model}"):
            self._client.load_model(model, headers=self._control, config=config_json,
                                    client_timeout=self._limited(timeout))  # fmt: skip

    def unload(self, model: str) -> None:
        with _refusals(self.url, f"unloading {model}"):
            self._client.unload_model(model, headers=self._control, client_timeout=self.timeout)

    def infer(
        self, model: str, inputs: Tensors, outputs: list[str], version: int | None = None, request_id: str = ""
    ) -> Tensors:
        """Ask ``model``, at ``version`` where given, and return ``outputs`` by name."""
        with _refusals(self.url, f"asking {model}" + ("" if version is None else f" version {version}")):
            result = self._client.infer(
                model,
                [_input(name, value) for name, value in inputs.items()],
                model_version="" if version is None else str(version),
                outputs=[InferRequestedOutput(name) for name in outputs],
                request_id=request_id,
                client_timeout=self.timeout,
            )
            return _outputs(result, outputs)


def _require_project(url: str, config: ModelConfig, expected: str) -> None:
    if "project" not in config.parameters:
        raise ServingError(
            f"the server at {url} does not say which dataset it serves, expected '{expected}'; it was started by an "
            "older freshrank: run `freshrank stop --data PATH`, then `freshrank serve --data PATH`"
        )
    served = config.parameters["project"].string_value
    if served != expected:
        raise ServingError(
            f"the server at {url} serves '{served}', expected '{expected}'; run `freshrank serve --data PATH`"
        )


@contextmanager
def _refusals(url: str, what: str) -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        if _is_unreachable(error):
            raise ServerUnreachable(
                f"no Triton answers at {url}; start it with `freshrank serve --data PATH`"
            ) from error
        # The Python backend appends its stack, which the server's log holds as well.
        message = error.message().split("\n\nAt:")[0].strip()
        kind = NoAnswerInTime if error.status() == "StatusCode.DEADLINE_EXCEEDED" else ServingError
        raise kind(f"{what}: Triton says: {message}") from error


def _is_unreachable(error: InferenceServerException) -> bool:
    # Triton sends the same status itself, e.g. while nothing is published: only gRPC's words tell the two apart.
    return error.status() == "StatusCode.UNAVAILABLE" and any(words in error.message() for words in _UNREACHABLE)


def on_wire(request: Tensors) -> Tensors:
    """Tensors of ``protocol.INPUTS`` as the server takes them, with a leading dimension of 1."""
    return {name: value[None] for name, value in request.items()}


def off_wire(answer: Tensors) -> Tensors:
    """The inverse, for an answer."""
    return {name: value[0] for name, value in answer.items()}


def _input(name: str, value: np.ndarray[Any, Any]) -> InferInput:
    tensor = InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
    return tensor.set_data_from_numpy(value)


def _outputs(result: Any, names: list[str]) -> Tensors:
    answer = {name: result.as_numpy(name) for name in names}
    return {name: value for name, value in answer.items() if value is not None}


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


class _Speaker:
    """What both clients share: the log's own ids, times and values on one side, tensors on the other."""

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


class Client(_Speaker):
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


class AsyncClient(_Speaker):
    """The asyncio twin of :class:`Client`, for services that hold many requests at once; ``async with``."""

    def __init__(self, url: str, schema: Schema, mappings: Path, timeout: float = 30.0) -> None:
        super().__init__(url, schema, mappings, timeout)
        self._checking = asyncio.Lock()
        self._client = aio.InferenceServerClient(url, channel_args=_CHANNEL)

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
        with _refusals(self.url, f"asking {RANKING}"):
            result = await self._client.infer(
                RANKING,
                [_input(name, value) for name, value in on_wire(request).items()],
                outputs=[InferRequestedOutput(name) for name in names],
                request_id=request_id,
                client_timeout=self.timeout,
            )
        return Answer.of(items, self.schema, off_wire(_outputs(result, names)))

    async def _require_own_server(self) -> None:
        async with self._checking:
            if self._is_own_server:
                return
            with _refusals(self.url, f"asking for the configuration of {RANKING}"):
                answer = await self._client.get_model_config(RANKING, client_timeout=self.timeout)
            _require_project(self.url, answer.config, self.schema.name)
            self._is_own_server = True


class Codes:
    """Text of a log -> the int64 codes its import gave it."""

    def __init__(self, mappings: Path) -> None:
        self._files = {path.stem: path for path in mappings.glob("*.parquet")}
        self._loaded: dict[str, dict[str, int]] = {}

    def id(self, column: str, value: Id) -> int:
        """Code of a value; an integer is one already, and text no import has seen is :func:`unknown_id` of it.

        Raises:
            ConfigError: it is neither text nor an integer.
        """
        if isinstance(value, str):
            code = self._code(column, value)
            return unknown_id(value) if code is None else code
        return _integer(column, value)

    def category(self, column: str, value: Id) -> int:
        """The same for a categorical column, where unknown text is UNKNOWN_ID; ConfigError for text where the log holds
        integers."""
        if not isinstance(value, str):
            return _integer(f"context column '{column}'", value)
        code = self._code(column, value)
        if code is None and column not in self._files:
            raise ConfigError(f"context column '{column}': received {value!r}, expected an integer as in the log")
        return UNKNOWN_ID if code is None else code

    def _code(self, column: str, text: str) -> int | None:
        if mapping_of(column) in self._files:
            return self._mapping(mapping_of(column)).get(text)
        return _as(int, text)

    def _mapping(self, name: str) -> dict[str, int]:
        if name not in self._loaded:
            table = pl.read_parquet(self._files[name])
            self._loaded[name] = dict(zip(table["value"], table["code"], strict=True))
        return self._loaded[name]


def unknown_id(text: str) -> int:
    """The code of an id no import has seen: -2 - n, n the first 62 bits of the SHA-256 of its UTF-8 text.

    Of its own, so that new users are drawn into arms one by one and the request log tells new items apart.
    """
    return -2 - (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2)


def _integer(name: str, value: Any) -> int:
    number = _as(int, value)
    if number is None or number != value:
        raise ConfigError(f"{name}: received {value!r}, expected text or an integer, as in the log")
    return number


def _request(user_id: int, item_ids: Sequence[int], at: str | datetime | None, version: int | None = None) -> Tensors:
    tensors = {"user_id": np.array([user_id], np.int64), "item_ids": np.array(item_ids, np.int64)}
    tensors |= {} if at is None else {"event_time": np.array([_microseconds(at)])}
    return tensors if version is None else tensors | {"version": np.array([version], np.int64)}


def _microseconds(at: str | datetime) -> int:
    when = _as(datetime.fromisoformat, at) if isinstance(at, str) else at
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
    number = _as(float, value)
    if number is None or not np.isfinite(number):
        raise ConfigError(f"context column '{name}': received {value!r}, expected a finite number")
    return number


def _as(kind: Callable[[Any], T], value: Any) -> T | None:
    try:
        return kind(value)
    except (TypeError, ValueError):
        return None
