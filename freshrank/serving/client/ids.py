"""Ids of users and items as a client speaks them, mapped to the integers that the server knows."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from freshrank.datasets.layout import mapping_of
from freshrank.errors import ConfigError
from freshrank.serving.fork_gate import FORK_GATE

UNKNOWN_ID = -1
"""Sent for an id that is in no import: it is ranked as an unknown item, or for an unknown user."""

Id = str | int
T = TypeVar("T")
_INT64 = range(-(2**63), 2**63)


class Codes:
    """Text of a log -> the int64 codes its import gave it; threads may share it, and so do forked children."""

    def __init__(self, mappings: Path) -> None:
        self._files = {path.stem: path for path in mappings.glob("*.parquet")}
        self._loaded: dict[str, dict[str, int]] = {}
        self._reading = Lock()

    def id(self, column: str, value: Id) -> int:
        """Code of a value; an integer is one already, and text no import has seen is :func:`unknown_id` of it.

        Raises:
            ConfigError: it is neither text nor an integer, or beyond int64.
        """
        if isinstance(value, str):
            code = self._code(column, column, value)
            return unknown_id(value) if code is None else code
        return integer(column, value, "text or an integer, as in the log")

    def category(self, column: str, value: Id) -> int:
        """The same for a categorical column, where unknown text is UNKNOWN_ID; ConfigError for text where the log holds
        integers."""
        name = f"context column '{column}'"
        if _is_boolean(value):
            return int(value)  # as the import takes them
        if not isinstance(value, str):
            return integer(name, value, "text or an integer, as in the log")
        code = self._code(column, name, value)
        if code is None and column not in self._files:
            raise ConfigError(f"{name}: received {value!r}, expected an integer as in the log")
        return UNKNOWN_ID if code is None else code

    def _code(self, column: str, name: str, text: str) -> int | None:
        if mapping_of(column) in self._files:
            return self._mapping(mapping_of(column)).get(text)
        number = converted(int, text)
        return None if number is None else integer(name, number, "text or an integer, as in the log")

    def _mapping(self, name: str) -> dict[str, int]:
        if name not in self._loaded:
            with FORK_GATE, self._reading:
                if name not in self._loaded:
                    self._loaded[name] = _read(self._files[name])
        return self._loaded[name]


def _read(path: Path) -> dict[str, int]:
    from pyarrow.parquet import ParquetFile

    # In this thread alone: the threads of a pool do not survive a fork, and who waits for them waits for ever.
    with ParquetFile(path, pre_buffer=False) as file:
        table = file.read(["value", "code"], use_threads=False)
    return dict(zip(table["value"].to_pylist(), table["code"].to_pylist(), strict=True))


def unknown_id(text: str) -> int:
    """The code of an id no import has seen: -2 - n, n the first 62 bits of the SHA-256 of its UTF-8 text.

    Of its own, so that new users are drawn into arms one by one and the request log tells new items apart.
    """
    # Half a surrogate pair comes from a request's JSON as well as any other text.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return -2 - (int.from_bytes(digest[:8], "big") >> 2)


def integer(name: str, value: Any, expected: str = "an integer") -> int:
    """``value`` as an int64; ConfigError, which calls it ``name``, where it is no whole number or beyond."""
    number = None if _is_boolean(value) else converted(int, value)
    if number is None or number != value:
        raise ConfigError(f"{name}: received {value!r}, expected {expected}")
    if number not in _INT64:
        raise ConfigError(f"{name}: received {value!r}, expected {expected}, within int64 (-2**63 to 2**63 - 1)")
    return number


def _is_boolean(value: Any) -> bool:
    return type(value).__name__ in ("bool", "bool_")  # numpy's as well, which is not imported here


def converted(kind: Callable[[Any], T], value: Any) -> T | None:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return None
