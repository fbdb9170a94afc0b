"""Days and their boundaries: the limits of every window, snapshot and partition are computed here."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING

from freshrank.errors import ConfigError

if TYPE_CHECKING:
    import polars as pl


def midnight(day: date, utc_offset_hours: float) -> datetime:
    """The UTC instant at which ``day`` starts on a calendar ``utc_offset_hours`` ahead of UTC."""
    return datetime.combine(day, time(), UTC) - timedelta(hours=utc_offset_hours)


def day_of(timestamp: "pl.Expr", utc_offset_hours: float) -> "pl.Expr":
    """Calendar day (pl.Date) of a UTC timestamp expression."""
    shifted = timestamp + timedelta(hours=utc_offset_hours)
    return shifted.dt.date()


def days(first: date, last: date) -> Iterator[date]:
    """All days from ``first`` to ``last``, both included."""
    for offset in range((last - first).days + 1):
        yield first + timedelta(days=offset)


def parse_day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"date: received {text!r}, expected YYYY-MM-DD, e.g. 2022-05-09") from None


def parse_instant(text: str) -> datetime:
    """An ISO 8601 time with its zone, in UTC."""
    try:
        return _with_zone(datetime.fromisoformat(text)).astimezone(UTC)
    except ValueError:
        raise ConfigError(
            f"at: received {text!r}, expected a time with its zone, e.g. 2024-05-01T12:00:00+00:00"
        ) from None


def _with_zone(at: datetime) -> datetime:
    if at.tzinfo is None:
        raise ValueError(at)
    return at
