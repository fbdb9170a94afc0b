"""Where the expressions of features run: DuckDB on one machine, Spark beyond it. Both get the same ibis expressions."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from freshrank.errors import ConfigError
from freshrank.settings import settings

if TYPE_CHECKING:
    import ibis.expr.types

    Table: TypeAlias = ibis.expr.types.Table
else:
    Table: TypeAlias = Any

_CODEC = "zstd"


class Engine(ABC):
    """Reads Parquet files and writes what is made of them; ``connection`` is ibis'."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @abstractmethod
    def read(self, paths: Sequence[Path]) -> Table:
        """The rows of ``paths``, files of the same columns."""

    def view(self, name: str, table: Table) -> Table:
        """``table`` under a name, in place of what had it: a query of views is compiled once and run for every day."""
        return self._connection.create_view(name, table, overwrite=True)

    def compile(self, table: Table) -> str:
        """``table`` as SQL."""
        return str(self._connection.compile(table))

    @abstractmethod
    def write(self, query: str, path: Path) -> None:
        """What ``query`` gives, in its order, as one Parquet file."""


@contextmanager
def open_engine() -> Iterator[Engine]:
    """The engine that ``FRESHRANK_FEATURES_ENGINE`` names.

    Raises:
        ConfigError: it is Spark, and pyspark is not installed.
    """
    with _duckdb() if settings().features_engine == "duckdb" else _spark() as engine:
        yield engine


class DuckDB(Engine):
    """In this process, on its cores; what does not fit ``FRESHRANK_FEATURES_MEMORY_GIB`` goes to disk."""

    def read(self, paths: Sequence[Path]) -> Table:
        return self._connection.read_parquet([str(path) for path in paths], hive_partitioning=False)

    def write(self, query: str, path: Path) -> None:
        name = str(path).replace("'", "''")
        self._connection.raw_sql(f"COPY ({query}) TO '{name}' (FORMAT parquet, COMPRESSION {_CODEC})")


@contextmanager
def _duckdb() -> Iterator[DuckDB]:
    import ibis

    limit = settings().features_memory_gib
    connection = ibis.duckdb.connect(**({"memory_limit": f"{limit}GiB"} if limit else {}))
    try:
        yield DuckDB(connection)
    finally:
        connection.disconnect()


class Spark(Engine):
    """A Spark session: the one that is there, else a local one."""

    def __init__(self, session: Any, connection: Any) -> None:
        super().__init__(connection)
        self._session = session

    def read(self, paths: Sequence[Path]) -> Table:
        import ibis

        name = ibis.util.gen_name("freshrank")
        self._session.read.parquet(*map(str, paths)).createOrReplaceTempView(name)
        return self._connection.table(name)

    def write(self, query: str, path: Path) -> None:
        directory = path.with_name(f"{path.name}.spark")
        frame = self._session.sql(query)
        frame.coalesce(1).write.mode("overwrite").parquet(str(directory), compression=_CODEC)
        [part] = directory.glob("part-*.parquet")
        part.replace(path)
        shutil.rmtree(directory)


@contextmanager
def _spark() -> Iterator[Spark]:
    import ibis

    try:
        from pyspark.sql import SparkSession
    except ModuleNotFoundError:
        raise ConfigError(
            "FRESHRANK_FEATURES_ENGINE: received spark, but pyspark is not installed; run "
            "`pip install 'freshrank[spark]'` (it needs Java 17), or choose duckdb"
        ) from None
    # Only a JVM that is started here listens there; name another address where executors must reach it.
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    builder = SparkSession.builder.appName("freshrank").config("spark.ui.enabled", "false")
    session = SparkSession.getActiveSession() or builder.getOrCreate()
    for name, value in _SPARK.items():
        session.conf.set(name, value)
    yield Spark(session, ibis.pyspark.connect(session))


_SPARK = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.ansi.enabled": "false",
}
"""What makes Spark's numbers and files those of DuckDB: timestamps are UTC microseconds, 0 / 0 is null."""
