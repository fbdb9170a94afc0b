"""Any log kept as Parquet: a directory with schema.yaml and the three tables."""

import logging
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from freshrank.datasets.checks import declared
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.writer import write_dataset
from freshrank.errors import ConfigError, DataError
from freshrank.schema import TABLES, Schema, load_schema

log = logging.getLogger(__name__)


def import_parquet(
    src: Path, out: Path, allow_unknown_items: bool = False, add: bool = False, replace_days: bool = False
) -> Dataset:
    """Import ``src``: schema.yaml and, per table, ``<table>.parquet`` or a directory ``<table>/`` of Parquet files.

    Directories may be nested (``date=2022-05-08/...``); a row's day is that of its event_timestamp, whatever the
    directory is called. With ``add`` the days at ``out`` that ``src`` does not hold stay, and one of which it
    holds fewer rows is refused unless ``replace_days``. ``Column.source`` names a
    column in these files where it differs from the contract's. Raises a :class:`DataError` that lists every problem,
    and names the file where one cannot be read.
    """
    if out.resolve() == src.resolve():
        raise ConfigError(f"--out: received {out}, the directory that is read; name another one")
    schema = load_schema(src / "schema.yaml")
    files = {table: _files(src, table) for table in TABLES}
    items, users = (pl.concat(_renamed(files[t], schema, t), how="vertical_relaxed") for t in ("items", "users"))
    impressions = _renamed(files["impressions"], schema, "impressions")
    source = {"adapter": "parquet", "files": {table: len(paths) for table, paths in files.items()}}
    try:
        dataset = write_dataset(out, schema, impressions, items, users, source, allow_unknown_items, add, replace_days)
    except pl.exceptions.PolarsError as error:
        _blame(files)
        raise DataError(f"{src}: cannot be imported: {error}") from error
    for table, paths in files.items():
        if unread := _undeclared(paths, schema, table):
            log.warning("%s: columns %s are not declared in schema.yaml and are left out", table, unread)
    return dataset


def _undeclared(paths: list[Path], schema: Schema, table: str) -> list[str]:
    columns = schema.table(table)
    read = {*declared(schema, table), *(column.source for column in columns.values())}
    return sorted({name for path in paths for name in pl.read_parquet_schema(path)} - read)


def _files(src: Path, table: str) -> list[Path]:
    single, directory = src / f"{table}.parquet", src / table
    paths = [single] if single.is_file() else sorted(directory.rglob("*.parquet"))
    if not paths:
        raise DataError(
            f"{src}: no table '{table}'; expected {single.name} or Parquet files under {table}/, "
            f"found {sorted(path.name for path in src.glob('*'))}"
        )
    return paths


def _renamed(paths: list[Path], schema: Schema, table: str) -> Iterator[pl.LazyFrame]:
    sources = {column.source: name for name, column in schema.table(table).items() if column.source}
    for path in paths:
        frame = pl.scan_parquet(path, hive_partitioning=False)
        present = _columns(path, frame)
        _check_sources(path, sources, present)
        overwritten = [name for source, name in sources.items() if name in present and name != source]
        yield frame.drop(overwritten).rename(sources)


def _columns(path: Path, frame: pl.LazyFrame) -> list[str]:
    try:
        return frame.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from error


def _check_sources(path: Path, sources: dict[str, str], present: list[str]) -> None:
    absent = sorted(set(sources) - set(present))
    if absent:
        raise DataError(
            f"{path}: schema.yaml names source column(s) {absent} that are not there; "
            f"the file has {sorted(present)}; correct 'source' in schema.yaml, or add the column(s) to "
            "the file"
        )


def _blame(files: dict[str, list[Path]]) -> None:
    """Find the file whose pages cannot be decoded: only its footer was read so far."""
    for path in (path for paths in files.values() for path in paths):
        try:
            pl.scan_parquet(path, hive_partitioning=False).select(pl.all().null_count()).collect(engine="streaming")
        except pl.exceptions.PolarsError as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file ({error}); write or copy it again")
