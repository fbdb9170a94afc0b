"""One request, checked: users, candidates, context and time, or the reason why it is refused."""

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from freshrank.bundle.format import TensorSpec
from freshrank.bundle.golden import Tensors
from freshrank.features.columns import Int
from freshrank.schema import QUERY_ITEM_ID, Kind, Schema
from freshrank.serving.protocol import INPUTS, MAX_CANDIDATES, REQUIRED, context_columns

_SPECS = {spec.name: spec for spec in INPUTS}
_KINDS = {"context_categorical": Kind.CATEGORICAL, "context_numeric": Kind.NUMERIC}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_MICROSECOND = (datetime(9999, 1, 1, tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)

log = logging.getLogger(__name__)


class BadRequest(ValueError):
    """The request is invalid; the text says what was received and what was expected."""


@dataclass(frozen=True)
class Query:
    """A checked request; ``context`` holds one value by column, the query item among them."""

    user_id: int
    item_ids: Int
    at_us: int
    """Microseconds since 1970, UTC."""
    context: dict[str, Any]
    request_id: str = ""

    @property
    def at(self) -> datetime:
        return _EPOCH + timedelta(microseconds=self.at_us)

    @property
    def lookups(self) -> list[int]:
        return [self.context[QUERY_ITEM_ID]] if QUERY_ITEM_ID in self.context else []

    @classmethod
    def of(cls, request: Tensors, schema: Schema, request_id: str = "") -> "Query":
        """A request whose tensors :func:`check_tensors` has let through.

        Raises:
            BadRequest: a value is not what was expected, or the context columns are not those of the schema.
        """
        count = len(request["item_ids"])
        if not 1 <= count <= MAX_CANDIDATES:
            raise BadRequest(f"item_ids: received {count} candidates, expected 1 to {MAX_CANDIDATES}")
        context = _context(request, schema)
        if schema.has_query and QUERY_ITEM_ID in request:
            context[QUERY_ITEM_ID] = int(request[QUERY_ITEM_ID][0])
        return cls(int(request["user_id"][0]), request["item_ids"], _event_time(request), context, request_id)


def check_tensors(request: Tensors) -> None:
    """BadRequest unless the tensors are those of the protocol, whatever the schema."""
    unknown = sorted(set(request) - set(_SPECS))
    missing = [name for name in REQUIRED if name not in request]
    if unknown or missing:
        raise BadRequest(f"received tensors {sorted(request)}, expected {list(REQUIRED)} and any of {list(_SPECS)}")
    for name, value in request.items():
        _check_tensor(value, _SPECS[name])


def without_batch_axis(name: str, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Without the leading dimension of the wire."""
    if value.ndim == 0 or len(value) != 1:
        raise BadRequest(
            f"{name}: received {value.dtype} of shape {list(value.shape)}, expected a leading dimension of 1"
        )
    alone: npt.NDArray[Any] = value[0]
    return alone


def _check_tensor(value: npt.NDArray[Any], spec: TensorSpec) -> None:
    sizes = zip(value.shape, spec.shape, strict=False)
    fits = value.ndim == len(spec.shape) and all(wanted in (-1, size) for size, wanted in sizes)
    if not fits or value.dtype != spec.dtype:
        expected = f"{spec.dtype} of shape {list(spec.shape)} (-1: any)"
        raise BadRequest(f"{spec.name}: received {value.dtype} of shape {list(value.shape)}, expected {expected}")


def _context(request: Tensors, schema: Schema) -> dict[str, Any]:
    """The context values that are there, by column."""
    columns = {tensor: context_columns(schema, kind) for tensor, kind in _KINDS.items()}
    order = [name for names in columns.values() for name in names]
    sent = {name for tensor, names in columns.items() if tensor in request for name in names}
    present = request.get("context_present", np.array([name in sent for name in order], dtype=np.bool_))
    _check_length("context_present", present, order)
    values: dict[str, Any] = {}
    for tensor in columns.keys() & request.keys():
        _check_length(tensor, request[tensor], columns[tensor])
        values |= dict(zip(columns[tensor], request[tensor].tolist(), strict=True))
    there = {name: values[name] for name, is_there in zip(order, present, strict=True) if is_there and name in values}
    for name, value in there.items():
        if not np.isfinite(value):
            raise BadRequest(
                f"context column '{name}': received {value}, expected a finite number; "
                "mark a missing value in context_present"
            )
    return there


def _check_length(tensor: str, values: npt.NDArray[Any], columns: list[str]) -> None:
    if len(values) != len(columns):
        raise BadRequest(
            f"{tensor}: received {len(values)} values, expected {len(columns)}, one per column of {columns}"
        )


def _event_time(request: Tensors) -> int:
    microseconds = int(request["event_time"][0]) if "event_time" in request else 0
    if not 0 <= microseconds < _LAST_MICROSECOND:
        raise BadRequest(f"event_time: received {microseconds}, expected microseconds since 1970 UTC, or 0 for now")
    return microseconds or time.time_ns() // 1000
