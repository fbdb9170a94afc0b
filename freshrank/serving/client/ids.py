"""Ids of users and items as a client speaks them, mapped to the integers that the server knows."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from freshrank.datasets.mappings import mapping_of
from freshrank.errors import ConfigError

UNKNOWN_ID = -1
"""Sent for an id that is in no import: it is ranked as an unknown item, or for an unknown user."""

Id = str | int
T = TypeVar("T")


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
        return converted(int, text)

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
    number = converted(int, value)
    if number is None or number != value:
        raise ConfigError(f"{name}: received {value!r}, expected text or an integer, as in the log")
    return number


def converted(kind: Callable[[Any], T], value: Any) -> T | None:
    try:
        return kind(value)
    except (TypeError, ValueError):
        return None
