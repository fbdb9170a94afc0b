"""The imported dataset on disk: three Parquet tables, schema.yaml, manifest.json.

DIR/schema.yaml
DIR/items.parquet, DIR/users.parquet
DIR/impressions/date=YYYY-MM-DD/part-0.parquet
DIR/mappings/<column>.parquet      value (string) -> code (int64), for columns that were strings
DIR/manifest.json                  per file and day: rows, sha256; source and protocol; counts of what was repaired
"""

import errno
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl

from freshrank.datasets.appending import (
    check_earlier_days,
    note_numbers,
    refuse_another_log,
    refuse_shrunken_days,
    take_over,
)
from freshrank.datasets.checks import (
    IMPRESSION_KEY,
    Findings,
    as_written,
    check_references,
    check_rows,
    check_unique,
    checked_columns,
    declared,
    harmonised,
    keys_as_written,
)
from freshrank.datasets.dataset import MANIFEST, Dataset, Frame, existing
from freshrank.datasets.mappings import MAPPINGS, Mappings, mapping_of
from freshrank.dates import day_of
from freshrank.errors import DataError
from freshrank.schema import (
    CREATED_AT,
    EVENT_TIMESTAMP,
    ITEM_ID,
    REQUEST_ID,
    TABLES,
    USAGE,
    USER_ID,
    Column,
    Role,
    Schema,
    dump_schema,
)
from freshrank.storage.files import atomic_directory, sha256_of, write_json

log = logging.getLogger(__name__)


def write_dataset(
    out: Path,
    schema: Schema,
    impressions: Frame | Iterable[Frame],
    items: Frame,
    users: Frame,
    source: dict[str, Any],
    allow_unknown_items: bool = False,
    add: bool = False,
    replace_days: bool = False,
) -> Dataset:
    """Validate the three tables and make them the dataset at ``out``, replacing the one that stood there.

    With ``add`` the days of that one which ``impressions`` does not hold stay, as they are, in the new one; a day of
    which it holds fewer rows is refused unless ``replace_days``.

    The tables carry the contract's column names (``Column.source`` is not applied) and more columns than the
    schema's are left out, but for the optional ``usage`` and ``judged_created_at``. The log may be one frame or one
    per file, in any order; only one day of it is held in memory at a time. Text is mapped to codes by the mappings
    already at ``out``, extended. Raises a :class:`DataError` that lists every problem found; whatever fails, the
    previous dataset stays as it was.
    """
    _refuse_foreign(out)
    earlier = existing(out)
    parts = [impressions] if isinstance(impressions, pl.DataFrame | pl.LazyFrame) else impressions
    try:
        with atomic_directory(out) as directory:
            appended_to, mappings = earlier if add else None, Mappings(out / MAPPINGS)
            writer = _Writer(directory, schema, mappings, Findings(), allow_unknown_items, appended_to, replace_days)
            writer.write(parts, items, users, source)
    except (OSError, pl.exceptions.ComputeError) as error:
        if _is_disk_full(error):
            raise DataError(f"{out}: the disk is full; free space and import again. Nothing was changed") from error
        raise
    dataset = Dataset.open(out)
    if earlier:
        _warn_of_losses(earlier, dataset)
    return dataset


def _warn_of_losses(earlier: Dataset, dataset: Dataset) -> None:
    if gone := sorted(set(earlier.days) - set(dataset.days)):
        held = "1 day that was there before is" if len(gone) == 1 else f"{len(gone)} days that were there before are"
        log.warning(
            "%s: %s not in this import (%s .. %s); it replaced the dataset as a whole: import the whole log up "
            "to the newest day to have them back, and single days with --add",
            dataset.path,
            held,
            gone[0],
            gone[-1],
        )
    shrunk = [day for day in earlier.days if day in dataset.days and dataset.rows(day) < earlier.rows(day)]
    for day in shrunk:
        log.warning(
            "%s: %s had %s impressions and has %s now: this import brought the day again, and replaced it",
            dataset.path,
            day,
            f"{earlier.rows(day):,}",
            f"{dataset.rows(day):,}",
        )


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not (out / MANIFEST).exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out}: holds something that is not an imported dataset and would be replaced; "
            "name a new or an empty directory"
        )


def _is_disk_full(error: Exception) -> bool:
    """Polars reports a failed write as ComputeError with the number only in its text."""
    return getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(error)


@dataclass
class _Writer:
    """One import into the empty ``directory``."""

    directory: Path
    schema: Schema
    mappings: Mappings
    findings: Findings
    allow_unknown_items: bool
    earlier: Dataset | None
    """Whose days stay where the log lacks them."""
    replace_days: bool

    def write(self, parts: Iterable[Frame], items: Frame, users: Frame, source: dict[str, Any]) -> None:
        for name in self.mappings.names:
            self.findings.note_coding(name, text=True, where=f"{MAPPINGS}/{name}.parquet of the earlier import")
        if self.earlier:
            refuse_another_log(self.earlier.schema, self.schema, self.earlier.path)
            note_numbers(self.earlier, self.findings)
        entities = {"items": self._checked("items", items, ITEM_ID), "users": self._checked("users", users, USER_ID)}
        files = {f"{table}.parquet": self._write_entity(table, frame) for table, frame in entities.items()}
        days = self._with_earlier_days(self._write_log(parts, entities["items"], entities["users"]))
        self.findings.raise_refusals()
        (self.directory / "schema.yaml").write_text(dump_schema(_without_sources(self.schema)))
        mappings = self.mappings.write(self.directory / MAPPINGS)
        manifest = {
            "source": source,
            "files": files,
            "days": days,
            "mappings": mappings,
            "counts": dict(self.findings.counts),
        }
        write_json(self.directory / MANIFEST, manifest)

    def _checked(self, table: str, frame: Frame, key: str) -> pl.DataFrame:
        columns = self._columns(table, frame.lazy())
        loaded = self._select(frame.lazy(), columns).collect()
        check_rows(loaded, table, columns, self.findings)
        check_unique(loaded, table, [key], self.findings)
        return keys_as_written(loaded, columns)

    def _columns(self, table: str, frame: pl.LazyFrame) -> dict[str, Column]:
        return checked_columns(frame.collect_schema(), table, self.schema, self.findings)

    def _select(self, frame: pl.LazyFrame, columns: dict[str, Column]) -> pl.LazyFrame:
        return frame.select(harmonised(columns, frame.collect_schema()))

    def _write_entity(self, table: str, frame: pl.DataFrame) -> dict[str, Any]:
        key = {"items": ITEM_ID, "users": USER_ID}[table]
        return self._write_table(self.directory / f"{table}.parquet", table, frame, [key])

    def _write_table(self, path: Path, table: str, frame: pl.DataFrame, order: list[str]) -> dict[str, Any]:
        if not self.findings.sound:
            return {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._encoded(frame, table).sort(order).write_parquet(path)
        return {"rows": len(frame), "sha256": sha256_of(path)}

    def _encoded(self, frame: pl.DataFrame, table: str) -> pl.DataFrame:
        columns = {n: c for n, c in declared(self.schema, table).items() if n in frame.columns or n == USAGE}
        if USAGE in columns and USAGE not in frame.columns:
            frame = frame.with_columns(pl.lit(None, pl.String).alias(USAGE))
        typed = frame.select(as_written(name, column, frame[name].dtype) for name, column in columns.items())
        return typed.with_columns(
            self.mappings.encode(mapping_of(name), typed[name])
            for name, column in columns.items()
            if column.role is not Role.META and typed[name].dtype in (pl.String, pl.List(pl.String))
        )

    def _write_log(self, parts: Iterable[Frame], items: pl.DataFrame, users: pl.DataFrame) -> dict[str, Any]:
        staged = self.directory / "staged"
        for number, part in enumerate(parts):
            self._stage(part.lazy(), staged / str(number))
        days = sorted({path.name.removeprefix("day=") for path in staged.glob("*/day=*")})
        if not days and self.findings.sound:
            self.findings.refuse("impressions", "the log is empty", "import a log of at least one impression")
        written = {day: self._write_day(day, staged, items, users) for day in _tracked(days)}
        shutil.rmtree(staged, ignore_errors=True)
        return written

    def _with_earlier_days(self, written: dict[str, Any]) -> dict[str, Any]:
        if not self.earlier or not self.findings.sound:
            return written
        if not self.replace_days:
            refuse_shrunken_days(self.earlier, written, self.findings)
        earlier_days = {day: facts for day, facts in self.earlier.manifest["days"].items() if day not in written}
        files = {day: self.earlier.partition(date.fromisoformat(day)) for day in earlier_days}
        items = pl.read_parquet(self.directory / "items.parquet", columns=[ITEM_ID, CREATED_AT])
        users = pl.read_parquet(self.directory / "users.parquet", columns=[USER_ID])
        check_earlier_days(self.earlier, list(files.values()), items, users, self.allow_unknown_items, self.findings)
        for source in files.values():
            take_over(source, self.directory / source.relative_to(self.earlier.path))
        return dict(sorted((earlier_days | written).items()))

    def _stage(self, part: pl.LazyFrame, directory: Path) -> None:
        """Split one part of the log by day, so that a day can be sorted and checked in memory."""
        columns = self._columns("impressions", part)
        if EVENT_TIMESTAMP in columns:
            day = day_of(pl.col(EVENT_TIMESTAMP), self.schema.utc_offset_hours)
            target = pl.PartitionBy(directory, key={"day": day}, include_key=False)
            self._select(part, columns).sink_parquet(target, mkdir=True)

    def _write_day(self, day: str, staged: Path, items: pl.DataFrame, users: pl.DataFrame) -> dict[str, Any]:
        pieces = [pl.read_parquet(path) for path in sorted(staged.glob(f"*/day={day}/*.parquet"))]
        log = pl.concat(pieces, how="diagonal_relaxed")
        columns = {n: c for n, c in declared(self.schema, "impressions").items() if n in log.columns}
        check_rows(log, "impressions", columns, self.findings)
        log = keys_as_written(log, columns)
        check_unique(log, "impressions", IMPRESSION_KEY, self.findings)
        check_references(log, items, users, self.allow_unknown_items, self.findings)
        path = self.directory / "impressions" / f"date={day}" / "part-0.parquet"
        return self._write_table(path, "impressions", log, [EVENT_TIMESTAMP, USER_ID, ITEM_ID, REQUEST_ID])


def _tracked(days: list[str]) -> Iterable[str]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(days, "importing the log", console=console, transient=True, disable=not console.is_terminal)


def _without_sources(schema: Schema) -> Schema:
    """The written tables carry the contract's names."""

    def renamed(columns: dict[str, Column]) -> dict[str, Column]:
        return {name: column.model_copy(update={"source": None}) for name, column in columns.items()}

    tables = {table: renamed(schema.table(table)) for table in TABLES}
    return schema.model_copy(update=tables)
