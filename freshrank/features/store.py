"""Feast, generated from the schema: one definition of every stored feature for training and for serving.

Offline reads are point-in-time joins that see a row from its ``created_timestamp`` on; online reads give the same
columns and dtypes. Missing values are null, whatever the reason: unknown id, no snapshot, no value in the table.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from io import StringIO
from pathlib import Path
from time import monotonic
from typing import Any

import polars as pl
import yaml

from freshrank.datasets.dataset import Dataset
from freshrank.dates import midnight
from freshrank.errors import ConfigError, MissingArtifact, ServingError
from freshrank.features.daily_aggregates import KEYS
from freshrank.features.hourly import delay, hour_counters, hourly_folder, life, require_log
from freshrank.features.snapshots import CREATED, require_history
from freshrank.schema import CREATED_AT, EVENT_TIMESTAMP, SNAPSHOT, Entity, Feature, Kind, Origin, Schema
from freshrank.settings import redis_host, settings
from freshrank.storage.files import atomic_write, read_json, write_json, write_text
from freshrank.storage.workspace import Workspace

log = logging.getLogger(__name__)

SERVICE = "ranking"
"""Holds every stored feature; a model that was put in service has one of what it reads (:func:`model_service`)."""
VIEWS = {
    (Entity.USER, Origin.TABLE): "user_profile",
    (Entity.USER, Origin.SNAPSHOT): "user_history",
    (Entity.ITEM, Origin.TABLE): "item_content",
    (Entity.ITEM, Origin.SNAPSHOT): "item_history",
    (Entity.ITEM, Origin.HOURLY): "item_hourly",
}
"""By entity and ``Feature.origin``."""
PUSH_SOURCE = "item_hourly_push"
CREATED_AT_US = "created_at_us"
"""Creation time as int64 microseconds since 1970, so that the online store can give an item's age."""
ALWAYS = datetime(1970, 1, 2, tzinfo=UTC)
"""Profiles carry no time of their own: they count as known from the start."""
SNAPSHOT_LIFE = timedelta(days=1) - timedelta(microseconds=1)
"""A snapshot is valid on its day only; a day without one reads as missing, not as the day before."""
_REGISTRY_SECONDS = 60
"""How long an open store may serve its cached copy of the registry."""
_REDIS_LIMITS = "socket_connect_timeout=5,socket_timeout=15"
"""Seconds, since Feast's client would wait for ever for a Redis that hangs; it tries four times.

Those in ``FRESHRANK_REDIS_URL`` come later and win; requests have a far shorter limit of their own
(``FRESHRANK_ONLINE_TIMEOUT_SECONDS``)."""
_ROW = "freshrank_row"
_DTYPES: dict[Kind, pl.DataType] = {
    Kind.CATEGORICAL: pl.Int64(),
    Kind.NUMERIC: pl.Float32(),
    Kind.MULTI_VALUED: pl.List(pl.Int64()),
    Kind.SEQUENCE: pl.List(pl.Int64()),
    Kind.EMBEDDING: pl.List(pl.Float32()),
}


def stored_schema(schema: Schema, entity: Entity) -> dict[str, pl.DataType]:
    """Columns and dtypes of every read of ``entity``: its key, then its stored features in Schema order."""
    return {KEYS[entity]: pl.Int64()} | {f.name: _DTYPES[f.kind] for f in schema.select(entity, stored=True)}


def _read_schema(schema: Schema, entity: Entity) -> dict[str, pl.DataType]:
    extra = {CREATED_AT_US: pl.Int64()} if entity is Entity.ITEM else {}
    return stored_schema(schema, entity) | extra


def definitions(schema: Schema, workspace: Workspace) -> list[Any]:
    """Entities, sources, views and the ``ranking`` service, as Feast objects for ``apply``."""
    import feast

    entities = {
        entity: feast.Entity(name=entity.value, join_keys=[key], value_type=feast.ValueType.INT64)
        for entity, key in KEYS.items()
    }
    views = [
        _view(schema, workspace, entities[entity], entity, origin)
        for entity, origin in VIEWS
        if view_columns(schema, entity, origin)
    ]
    service = feast.FeatureService(name=SERVICE, features=views)
    sources = [source for view in views for source in (view.batch_source, view.stream_source) if source]
    return [*entities.values(), *sources, *views, service]


def model_service(version: int) -> str:
    """Name of the service of one version of the model."""
    return f"{SERVICE}_{version}"


def view_features(schema: Schema, entity: Entity, origin: Origin) -> list[Feature]:
    return [feature for feature in schema.select(entity, stored=True) if feature.origin is origin]


def view_columns(schema: Schema, entity: Entity, origin: Origin) -> dict[str, pl.DataType]:
    """What a view holds beside its key; empty where the schema has nothing for it."""
    columns = {feature.name: _DTYPES[feature.kind] for feature in view_features(schema, entity, origin)}
    carries_birth = (entity, origin) == (Entity.ITEM, Origin.TABLE)
    return columns | ({CREATED_AT_US: pl.Int64()} if carries_birth else {})


def _view(schema: Schema, workspace: Workspace, owner: Any, entity: Entity, origin: Origin) -> Any:
    import feast

    name, dated = VIEWS[entity, origin], origin is not Origin.TABLE
    columns = {KEYS[entity]: pl.Int64()} | view_columns(schema, entity, origin)
    source = feast.FileSource(
        name=f"{name}_source",
        path=str(_source_path(workspace, entity, origin).absolute()),
        timestamp_field=SNAPSHOT if dated else EVENT_TIMESTAMP,
        created_timestamp_column=CREATED if dated else "",
    )
    return feast.FeatureView(
        name=name,
        entities=[owner],
        schema=[feast.Field(name=column, dtype=_feast_type(dtype)) for column, dtype in columns.items()],
        source=feast.PushSource(name=PUSH_SOURCE, batch_source=source) if origin is Origin.HOURLY else source,
        ttl=_lives(schema)[origin],
    )


def _source_path(workspace: Workspace, entity: Entity, origin: Origin) -> Path:
    if origin is Origin.TABLE:
        return static_path(workspace, entity)
    folder = workspace.features / entity if origin is Origin.SNAPSHOT else hourly_folder(workspace)
    return folder / "*" / "*.parquet"


def _lives(schema: Schema) -> dict[Origin, timedelta]:
    """How long a row is valid; zero means for ever, and Feast counts the last instant as valid."""
    hourly = life(schema) - timedelta(microseconds=1)
    return {Origin.TABLE: timedelta(0), Origin.SNAPSHOT: SNAPSHOT_LIFE, Origin.HOURLY: hourly}


def _feast_type(dtype: pl.DataType) -> Any:
    from feast.types import Array, Float32, Int64

    inner = dtype.inner if isinstance(dtype, pl.List) else dtype
    scalar = Int64 if inner == pl.Int64 else Float32
    return Array(scalar) if isinstance(dtype, pl.List) else scalar


def static_path(workspace: Workspace, entity: Entity) -> Path:
    """The items or users table in the shape Feast reads."""
    return workspace.features / "static" / f"{entity}.parquet"


def write_static_tables(dataset: Dataset, workspace: Workspace) -> None:
    """Write the items and users tables with the columns, dtypes and timestamp the views declare."""
    tables = {Entity.USER: dataset.users(), Entity.ITEM: dataset.items()}
    for entity, table in tables.items():
        features = view_features(dataset.schema, entity, Origin.TABLE)
        columns = [pl.col(KEYS[entity]).cast(pl.Int64), *map(_stored_column, features)]
        columns += _timestamps(entity)
        with atomic_write(static_path(workspace, entity)) as temporary:
            table.select(columns).write_parquet(temporary)


def _stored_column(feature: Feature) -> pl.Expr:
    column = pl.col(feature.name).cast(_DTYPES[feature.kind])
    return column.list.head(feature.dim) if feature.kind is Kind.MULTI_VALUED else column


def _timestamps(entity: Entity) -> list[pl.Expr]:
    utc = pl.Datetime("us", "UTC")
    if entity is Entity.USER:
        return [pl.lit(ALWAYS, dtype=utc).alias(EVENT_TIMESTAMP)]
    created = pl.col(CREATED_AT).cast(utc)
    return [created.alias(EVENT_TIMESTAMP), created.dt.epoch("us").alias(CREATED_AT_US)]


class FeatureStore:
    """One dataset's features. Reading online needs what :meth:`apply` and :meth:`materialize` wrote, nothing else."""

    def __init__(self, dataset: Dataset, workspace: Workspace) -> None:
        self.dataset = dataset
        self.schema: Schema = dataset.schema
        self.workspace = workspace
        self._read_at = float("-inf")
        self._instants: dict[str, datetime | None] = {}

    @cached_property
    def _feast(self) -> Any:
        import feast

        self.workspace.feast.mkdir(parents=True, exist_ok=True)
        secret = settings().redis_url.get_secret_value()
        return feast.FeatureStore(config=feast.RepoConfig(**_config(self.schema, self.workspace, secret)))

    @contextmanager
    def _session(self) -> Iterator[Any]:
        """Feast on a DuckDB connection of its own, without its prints (stdout is our caller's) and deprecations."""
        import ibis

        store = self._feast
        before = ibis.options.default_backend
        connection = ibis.duckdb.connect()
        ibis.set_backend(connection)
        try:
            with redirect_stdout(StringIO()), warnings.catch_warnings(), _answering():
                warnings.simplefilter("ignore", DeprecationWarning)
                yield store
        finally:
            ibis.options.default_backend = before
            connection.disconnect()

    def apply(self) -> None:
        """Register the views and write the tables they read; repeating it changes nothing."""
        write_static_tables(self.dataset, self.workspace)
        write_feast_yaml(self.schema, self.workspace)
        with self._session() as store:
            store.apply(definitions(self.schema, self.workspace))

    def materialize(self, run_date: date) -> datetime | None:
        """Put into the online store what is known when ``run_date`` begins, and the content of items born on it.

        Histories are the snapshots of ``run_date``. A new item's content is pushed when it is born; here, where
        the table holds the whole day already, that means items created before the day's end.
        Repeating a day gives the same store. The store never moves back in time, so that a backfill cannot harm the
        served model: a
        ``run_date`` earlier than the one it holds changes nothing and is logged; the instant of the later state that
        stays is returned, None where ``run_date`` was put in.
        """
        require_history(self.dataset, self.workspace, [run_date])
        start, end = (midnight(day, self.schema.utc_offset_hours) for day in (run_date, run_date + timedelta(days=1)))
        held = max(filter(None, self._history_instants(0).values()), default=start)
        if held > start:
            log.warning(
                "online store: holds the state of %s and stays; received the earlier %s; to go back, remove %s "
                "and what the store holds",
                held,
                start,
                self.workspace.feast,
            )
            return held
        with self._session() as store:
            for (_, origin), view in self._views().items():
                if origin is not Origin.HOURLY:
                    span = (start, start) if origin is Origin.SNAPSHOT else (ALWAYS, end - timedelta(microseconds=1))
                    store.materialize(*span, feature_views=[view])
        self._read_at = float("-inf")
        return None

    def push_hourly(self, hour: datetime) -> int:
        """Put the counters of ``hour`` (a full hour, UTC) into the online store; how many items have a row.

        Repeating it gives the same store. It never goes back: an hour earlier than the one that was pushed last changes
        nothing and is logged.

        Raises:
            ConfigError: the schema asks for no hourly counters, or ``hour`` is none.
            DataError: the log does not reach the hour before ``hour``.
        """
        _check_hour(self.schema, hour)
        require_log(self.dataset, hour)
        pushed = self.workspace.feast / "pushed.json"
        if pushed.exists() and (held := datetime.fromisoformat(read_json(pushed))) > hour:
            log.warning(
                "hourly counters: the online store holds those of %s and keeps them; received the earlier %s",
                held,
                hour,
            )
            return 0
        rows = hour_counters(self.dataset, [hour])
        if len(rows):
            with self._session() as store:
                store.push(PUSH_SOURCE, rows.to_pandas(), allow_registry_cache=False)
        write_json(pushed, hour.isoformat())
        return len(rows)

    def register_model(self, version: int, schema: Schema) -> None:
        """Register the service of a version of the model, with what its ``schema`` reads and nothing else."""
        import feast

        with self._session() as store:
            read = {view: list(columns) for key, view in VIEWS.items() if (columns := view_columns(schema, *key))}
            parts = [store.get_feature_view(view)[columns] for view, columns in read.items()]
            store.apply(feast.FeatureService(name=model_service(version), features=parts))

    def _history_instants(self, seconds: float = _REGISTRY_SECONDS) -> dict[str, datetime | None]:
        """Per view of histories the instant its online rows stand for, at most ``seconds`` old."""
        if monotonic() - self._read_at > seconds:
            self._feast.refresh_registry()
            views = [view for (_, origin), view in self._views().items() if origin is Origin.SNAPSHOT]
            self._instants = {view: self._feast.get_feature_view(view).most_recent_end_time for view in views}
            self._read_at = monotonic()
        return self._instants

    def held_seconds(self) -> dict[str, float]:
        """Per view of histories the instant its online rows stand for, in seconds since 1970, as the registry has it
        now; a view that holds nothing is not there."""
        return {view: at.timestamp() for view, at in self._history_instants(0).items() if at}

    def _views(self) -> dict[tuple[Entity, Origin], str]:
        return {key: view for key, view in VIEWS.items() if view_columns(self.schema, *key)}

    def _references(self, entity: Entity) -> list[str]:
        return [
            f"{view}:{name}"
            for (owner, origin), view in self._views().items()
            if owner is entity
            for name in view_columns(self.schema, entity, origin)
        ]

    def offline_users(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Features of ``frame[user_id, event_timestamp]`` as known at each row's instant, in the frame's row order."""
        return self._offline(Entity.USER, frame)

    def offline_items(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Features of ``frame[item_id, event_timestamp]`` as known at each row's instant, in the frame's row order."""
        return self._offline(Entity.ITEM, frame)

    def _offline(self, entity: Entity, frame: pl.DataFrame) -> pl.DataFrame:
        columns = _read_schema(self.schema, entity)
        if frame.is_empty():
            return pl.DataFrame(schema=columns)
        keys = frame.select(KEYS[entity], EVENT_TIMESTAMP).with_row_index(_ROW).to_pandas()
        # Feast reads the snapshots of all days as one table.
        with self.workspace.in_use(), self._session() as store:
            # Without it Feast reads a row from its event time on, however late it was written.
            job = store.get_historical_features(
                entity_df=keys, features=self._references(entity), filter_by_created_timestamp=True
            )
            joined = pl.DataFrame(job.to_arrow())
        # DuckDB returns the rows in any order.
        return joined.sort(_ROW).select(pl.col(name).cast(dtype) for name, dtype in columns.items())

    def online_users(self, ids: Sequence[int]) -> pl.DataFrame:
        """One row per id, in their order, with the columns and dtypes of :meth:`offline_users`.

        Raises:
            MissingArtifact: :meth:`apply` has never run.
        """
        return self._online(Entity.USER, ids)

    def online_items(self, ids: Sequence[int], at: datetime | None = None) -> pl.DataFrame:
        """One row per id, in their order, with the columns and dtypes of :meth:`offline_items`.

        Hourly counters are null unless they stand at ``at``; default: now.

        Raises:
            MissingArtifact: :meth:`apply` has never run.
        """
        return self._online(Entity.ITEM, ids, at)

    def _online(self, entity: Entity, ids: Sequence[int], at: datetime | None = None) -> pl.DataFrame:
        key, columns = KEYS[entity], _read_schema(self.schema, entity)
        if len(ids) == 0:
            return pl.DataFrame(schema=columns)
        read: dict[str, pl.Series] = {}
        with self._registered(), _answering():
            for (owner, origin), view in self._views().items():
                if owner is entity:
                    span = self._span(view, origin, at or datetime.now(UTC))
                    read |= self._online_view(view, view_columns(self.schema, entity, origin), key, ids, span)
        return pl.DataFrame([pl.Series(key, ids, dtype=pl.Int64()), *(read[name] for name in columns if name != key)])

    @contextmanager
    def _registered(self) -> Iterator[None]:
        from feast.errors import FeatureViewNotFoundException

        try:
            yield
        except FeatureViewNotFoundException as problem:
            raise MissingArtifact(
                f"online store: no features of '{self.schema.name}' are registered in {self.workspace.feast}; run "
                "`freshrank features build` first"
            ) from problem

    def _span(self, view: str, origin: Origin, at: datetime) -> tuple[float, float] | None:
        """From when to when (seconds since 1970) a row must be to stand at ``at``; None where none can."""
        if origin is Origin.HOURLY:
            oldest = at - life(self.schema) + timedelta(microseconds=1)
            return oldest.timestamp(), (at - delay(self.schema)).timestamp()
        held = self._history_instants()[view] if origin is Origin.SNAPSHOT else ALWAYS
        return (held.timestamp(), float("inf")) if held else None

    def _online_view(
        self, view: str, columns: dict[str, pl.DataType], key: str, ids: Sequence[int], span: tuple[float, float] | None
    ) -> dict[str, pl.Series]:
        if span is None:
            return {name: pl.Series(name, [None] * len(ids), dtype=dtype) for name, dtype in columns.items()}
        features = [f"{view}:{name}" for name in columns]
        response = self._feast.get_online_features(features=features, entity_rows={key: list(ids)}).proto
        results = dict(zip(response.metadata.feature_names.val, response.results, strict=True))
        return {name: _series(name, dtype, results[name], span) for name, dtype in columns.items()}


@contextmanager
def _answering() -> Iterator[None]:
    """What the online store's client raises becomes a ServingError that says where it was, without the password."""
    if settings().online_store == "sqlite":
        yield
        return
    from redis.exceptions import RedisError

    try:
        yield
    except RedisError as problem:
        raise ServingError(
            f"online store: Redis at {redis_host(settings().redis_url)} failed with '{problem}'; expected one that "
            "takes features; see that it runs, has memory left, and that host and password in FRESHRANK_REDIS_URL are "
            "right, then repeat the step"
        ) from problem


def _check_hour(schema: Schema, hour: datetime) -> None:
    if not schema.history.hourly:
        raise ConfigError(
            f"history.hourly: received false in the schema '{schema.name}', expected true where hourly counters are "
            "pushed; set it in schema.yaml and import again"
        )
    if hour.utcoffset() != timedelta(0) or hour != hour.replace(minute=0, second=0, microsecond=0):
        raise ConfigError(f"hour: received {hour}, expected a full hour in UTC, e.g. 2024-01-31T13:00:00+00:00")


def _series(name: str, dtype: pl.DataType, result: Any, span: tuple[float, float]) -> pl.Series:
    """A row outside ``span`` reads as missing: its entity is in no snapshot any more, or its hour is over."""
    field, (oldest, newest) = _VALUE_FIELDS[dtype], span
    read = [
        getattr(value, field) if oldest <= at.seconds <= newest and value.WhichOneof("val") else None
        for value, at in zip(result.values, result.event_timestamps, strict=True)
    ]
    if isinstance(dtype, pl.List):
        read = [None if value is None else list(value.val) for value in read]
    return pl.Series(name, read, dtype=dtype)


_VALUE_FIELDS: dict[pl.DataType, str] = {
    pl.Int64(): "int64_val",
    pl.Float32(): "float_val",
    pl.List(pl.Int64()): "int64_list_val",
    pl.List(pl.Float32()): "float_list_val",
}


def write_feast_yaml(schema: Schema, workspace: Workspace) -> None:
    """The configuration for Feast's own command line; a password stays in its environment variable."""
    config = yaml.safe_dump(_config(schema, workspace, "${FRESHRANK_REDIS_URL}"), sort_keys=False)
    write_text(workspace.feast / "feature_store.yaml", config)


def _config(schema: Schema, workspace: Workspace, redis_url: str) -> dict[str, Any]:
    return {
        "project": schema.name,
        "provider": "local",
        # SQL, because Feast's registry file is rewritten in place: a reader or a kill could meet half of it.
        "registry": {
            "registry_type": "sql",
            "path": f"sqlite:///{workspace.feast.absolute()}/registry.db",
            "cache_ttl_seconds": _REGISTRY_SECONDS,
            "serve_features_while_materializing": True,
        },
        "offline_store": {"type": "duckdb"},
        "online_store": _online_store(workspace, redis_url),
        "materialization": {"online_write_batch_size": 5000},
        "data_quality_monitoring": {"auto_baseline": False},
        "entity_key_serialization_version": 3,
    }


def _online_store(workspace: Workspace, redis_url: str) -> dict[str, Any]:
    if settings().online_store == "redis":
        # Rows are always newer than what is there, so Redis need not compare: one round trip instead of two.
        return {"type": "redis", "connection_string": f"{_REDIS_LIMITS},{redis_url}", "skip_dedup": True}
    return {"type": "sqlite", "path": str(workspace.feast.absolute() / "online.db")}
