"""An imported dataset, read: manifest, schema, tables and their fingerprints."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import polars as pl

from freshrank.datasets.mappings import MAPPINGS, Texts
from freshrank.dates import days, midnight
from freshrank.errors import DataError, FreshrankError
from freshrank.schema import CREATED_AT, ITEM_ID, JUDGED_CREATED_AT, Schema, load_schema
from freshrank.storage.files import fingerprint, read_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
Frame = pl.DataFrame | pl.LazyFrame


@dataclass(frozen=True)
class Dataset:
    """A validated, imported dataset; read-only."""

    path: Path
    schema: Schema
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Dataset":
        """Open an imported directory; a :class:`DataError` says how to import one that is not."""
        if not (path / MANIFEST).exists():
            raise DataError(
                f"{path}: no {MANIFEST}, so this is not an imported dataset; run "
                f"`freshrank import parquet {path} --out DIR` or `freshrank import kuairand`"
            )
        return cls(path, load_schema(path / "schema.yaml"), read_json(path / MANIFEST))

    @property
    def days(self) -> list[date]:
        """Days that hold impressions, ascending."""
        return sorted(date.fromisoformat(day) for day in self.manifest["days"])

    @property
    def missing_days(self) -> list[date]:
        """Days without an impression between the first and the last that hold some, ascending."""
        present = self.days
        return sorted(set(days(present[0], present[-1])) - set(present))

    def partition(self, day: date) -> Path:
        return self.path / "impressions" / f"date={day.isoformat()}" / "part-0.parquet"

    def impressions(self, wanted: list[date] | tuple[date, ...] | None = None) -> pl.LazyFrame:
        """The log of ``wanted`` days (default all), in (event_timestamp, user_id, item_id) order per day.

        Columns: request_id, event_timestamp (Datetime us UTC), user_id, item_id (Int64), the schema's actions
        (Int8, null = not observed), context columns, ``usage`` (String), ``day`` (Date).
        """
        present = set(self.days)
        chosen = [day for day in (wanted or self.days) if day in present]
        if not chosen:
            raise DataError(f"{self.path}: no impressions on {_span(wanted)}; the log holds {_span(self.days)}")
        frames = [pl.scan_parquet(self.partition(d)).with_columns(pl.lit(d).alias("day")) for d in chosen]
        return pl.concat(frames, how="vertical_relaxed")

    def items(self) -> pl.DataFrame:
        return pl.read_parquet(self.path / "items.parquet")

    def users(self) -> pl.DataFrame:
        return pl.read_parquet(self.path / "users.parquet")

    def births(self) -> pl.DataFrame:
        """item_id, created_at and judged_created_at of every item; the last is created_at where the table lacks it."""
        items = pl.scan_parquet(self.path / "items.parquet")
        present = items.collect_schema()
        judged = pl.coalesce([name for name in (JUDGED_CREATED_AT, CREATED_AT) if name in present])
        return items.select(ITEM_ID, CREATED_AT, judged.alias(JUDGED_CREATED_AT)).collect()

    def texts(self) -> Texts:
        """What the codes of ids and categories stand for."""
        return Texts(self.schema, self.path / MAPPINGS)

    def mapping_digest(self, column: str, rows: int) -> str:
        """Fingerprint of the first ``rows`` strings of a mapping: an import that only appended keeps it."""
        values = pl.read_parquet(self.path / MAPPINGS / f"{column}.parquet").sort("code")["value"]
        return fingerprint(values.head(rows).to_list())

    def rows(self, day: date) -> int:
        """Impressions of ``day``."""
        return int(self.manifest["days"][day.isoformat()]["rows"])

    def log_fingerprint(self, wanted: Sequence[date]) -> str:
        """Changes when the declared impressions or the log of any ``wanted`` day does."""
        declared = {name: column.model_dump(mode="json") for name, column in self.schema.impressions.items()}
        offset = self.schema.utc_offset_hours
        return fingerprint({"impressions": declared, "utc_offset_hours": offset, "days": self._facts(wanted)})

    def items_fingerprint(self, day: date, columns: Sequence[str] | None = None) -> str:
        """Changes when ``columns`` (default all) or the creation of any item created before the end of ``day`` does;
        items that came later leave it as it is."""
        sha256 = self.manifest["files"]["items.parquet"]["sha256"]
        end = midnight(day + timedelta(days=1), self.schema.utc_offset_hours)
        return _items_fingerprint(self.path, sha256, end, None if columns is None else tuple(dict.fromkeys(columns)))

    def fingerprint(self, wanted: Sequence[date]) -> str:
        """Changes when the schema, items, users or the log of any ``wanted`` day changes."""
        files = self.manifest["files"]
        return fingerprint({"schema": self.schema.model_dump(mode="json"), "files": files, "days": self._facts(wanted)})

    def _facts(self, wanted: Sequence[date]) -> dict[str, Any]:
        return {day.isoformat(): self.manifest["days"].get(day.isoformat()) for day in wanted}


@lru_cache(maxsize=4096)
def _items_fingerprint(path: Path, sha256: str, end: datetime, columns: tuple[str, ...] | None) -> str:
    """``sha256`` is that of the file: another one is not answered from memory."""
    items = pl.scan_parquet(path / "items.parquet").filter(pl.col(CREATED_AT).cast(pl.Datetime("us", "UTC")) < end)
    read = pl.all() if columns is None else pl.col(ITEM_ID, CREATED_AT, *columns)
    known = items.select(read).sort(ITEM_ID).collect()
    written = BytesIO()
    known.rechunk().write_ipc(written, compat_level=pl.CompatLevel.oldest())
    return hashlib.sha256(written.getvalue()).hexdigest()[:16]


def _span(chosen: list[date] | tuple[date, ...] | None) -> str:
    return f"{min(chosen)} .. {max(chosen)}" if chosen else "any day"


def existing(out: Path) -> Dataset | None:
    """The dataset at that path; a corrupt one counts as none and is replaced."""
    try:
        dataset = Dataset.open(out)
        return dataset if dataset.days else None
    except (FreshrankError, OSError, ValueError, KeyError, TypeError):
        return None
