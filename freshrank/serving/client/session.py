"""One client's conversation with its server: the log's own ids, times and values on one side, tensors on the other."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from freshrank.bundle.golden import Tensors
from freshrank.errors import ConfigError
from freshrank.schema import ITEM_ID, QUERY_ITEM_ID, USER_ID, Kind, Schema
from freshrank.serving.client.ids import Codes, Id, converted, integer
from freshrank.serving.connection import Connection
from freshrank.serving.protocol import OUTPUTS, RANKING, context_columns, off_wire, on_wire

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_OUTPUT_NAMES = [spec.name for spec in OUTPUTS]


class Session:
    """Builds requests and asks the model ``ranking``, once it has seen that the server is that of ``schema``."""

    def __init__(self, url: str, schema: Schema, mappings: Path, timeout: float) -> None:
        self.schema = schema
        self._codes = Codes(mappings)
        self._connection = Connection(url, timeout)
        self._is_own_server = False

    def close(self) -> None:
        self._connection.close()

    def request(
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
        tensors = context_tensors(context, self.schema, self._codes)
        tensors |= {} if query is None else {QUERY_ITEM_ID: np.array([self._codes.id(ITEM_ID, query)])}
        ids = [self._codes.id(ITEM_ID, item) for item in candidates]
        return self.request_of_ids(self._codes.id(USER_ID, user), ids, at, version) | tensors

    @staticmethod
    def request_of_ids(
        user_id: int, item_ids: Sequence[int], at: str | datetime | None, version: int | None
    ) -> Tensors:
        tensors = {"user_id": np.array([integer(USER_ID, user_id)], np.int64), "item_ids": _int64s(ITEM_ID, item_ids)}
        tensors |= {} if at is None else {"event_time": np.array([microseconds(at)])}
        return tensors if version is None else tensors | {"version": np.array([integer("version", version)], np.int64)}

    def ask(self, request: Tensors, request_id: str) -> Tensors:
        if not self._is_own_server:
            self._connection.require_project(self.schema.name)
            self._is_own_server = True
        return off_wire(self._connection.infer(RANKING, on_wire(request), _OUTPUT_NAMES, request_id=request_id))

    async def ask_async(self, request: Tensors, request_id: str) -> Tensors:
        if not self._is_own_server:
            await self._connection.require_project_async(self.schema.name)
            self._is_own_server = True
        asked = self._connection.infer_async(RANKING, on_wire(request), _OUTPUT_NAMES, request_id=request_id)
        return off_wire(await asked)


def _int64s(name: str, values: Sequence[int]) -> np.ndarray[Any, Any]:
    if isinstance(values, np.ndarray) and values.dtype == np.int64:
        return values
    return np.array([integer(name, value) for value in values], np.int64)


def microseconds(at: str | datetime) -> int:
    when = converted(datetime.fromisoformat, at) if isinstance(at, str) else at
    if when is None or when.tzinfo is None:
        raise ConfigError(f"at: received {str(at)!r}, expected a time with its zone, e.g. 2024-05-01T12:00:00+00:00")
    return (when - _EPOCH) // timedelta(microseconds=1)


def context_tensors(given: Sequence[str] | Mapping[str, Any] | None, schema: Schema, codes: Codes) -> Tensors:
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
    if number is None or not abs(number) <= _FLOAT32_MAX:
        raise ConfigError(f"context column '{name}': received {value!r}, expected a finite number that float32 holds")
    return number
