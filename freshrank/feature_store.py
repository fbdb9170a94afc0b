"""Feast, generated from the schema: one definition of every stored feature for training and for serving.

Offline reads are point-in-time joins; online reads give the same columns and dtypes. What is not known is null,
whatever the reason: unknown id, no snapshot, a value missing in the table.
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from freshrank.clock import midnight
from freshrank.datasets.contract import Dataset
from freshrank.history import CREATED, KEYS
from freshrank.schema import CREATED_AT, EVENT_TIMESTAMP, ITEM_ID, SNAPSHOT, Entity, Feature, Group, Kind, Schema
from freshrank.settings import settings
from freshrank.storage import atomic_write
from freshrank.workspace import Workspace

SERVICE = "ranking"
VIEWS = {
    (Entity.USER, Group.NON_HISTORICAL): "user_profile",
    (Entity.USER, Group.HISTORICAL): "user_history",
    (Entity.ITEM, Group.NON_HISTORICAL): "item_content",
    (Entity.ITEM, Group.HISTORICAL): "item_history",
}
CREATED_AT_US = "created_at_us"
"""Creation time as int64 microseconds since 1970, so that the online store can give an item's age."""
ALWAYS = datetime(1970, 1, 2, tzinfo=UTC)
"""Profiles carry no time of their own: they count as known from the start."""
SNAPSHOT_LIFE = timedelta(days=1) - timedelta(microseconds=1)
"""A snapshot stands for its day alone; a day without one reads as missing, not as the day before."""
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


def definitions(schema: Schema, workspace: Workspace, dataset_path: Path) -> list[Any]:
    """Entities, sources, views and the ``ranking`` service, as Feast objects for ``apply``."""
    import feast

    entities = {
        entity: feast.Entity(name=entity.value, join_keys=[key], value_type=feast.ValueType.INT64)
        for entity, key in KEYS.items()
    }
    views = [_view(schema, workspace, entities[entity], entity, group) for entity, group in VIEWS]
    views = [view for view in views if view is not None]
    service = feast.FeatureService(name=SERVICE, features=views)
    return [*entities.values(), *[view.batch_source for view in views], *views, service]


def view_features(schema: Schema, entity: Entity, group: Group) -> list[Feature]:
    return [f for f in schema.select(entity, stored=True) if f.group is group]


def _view(schema: Schema, workspace: Workspace, feast_entity: Any, entity: Entity, group: Group) -> Any:
    import feast

    historical = group is Group.HISTORICAL
    fields = [feast.Field(name=f.name, dtype=_feast_type(f.kind)) for f in view_features(schema, entity, group)]
    if (entity, group) == (Entity.ITEM, Group.NON_HISTORICAL):
        fields.append(feast.Field(name=CREATED_AT_US, dtype=feast.types.Int64))
    if not fields:
        return None
    name = VIEWS[entity, group]
    path = workspace.features / entity / "*" / "*.parquet" if historical else static_path(workspace, entity)
    source = feast.FileSource(
        name=f"{name}_source",
        path=str(path),
        timestamp_field=SNAPSHOT if historical else EVENT_TIMESTAMP,
        created_timestamp_column=CREATED if historical else "",
    )
    ttl = SNAPSHOT_LIFE if historical else timedelta(0)
    key = feast.Field(name=KEYS[entity], dtype=feast.types.Int64)
    return feast.FeatureView(name=name, entities=[feast_entity], schema=[key, *fields], source=source, ttl=ttl)


def _feast_type(kind: Kind) -> Any:
    from feast.types import Array, Float32, Int64

    types = {
        Kind.CATEGORICAL: Int64,
        Kind.NUMERIC: Float32,
        Kind.EMBEDDING: Array(Float32),
        Kind.MULTI_VALUED: Array(Int64),
        Kind.SEQUENCE: Array(Int64),
    }
    return types[kind]


def static_path(workspace: Workspace, entity: Entity) -> Path:
    """The items or users table in the shape Feast reads."""
    return workspace.features / "static" / f"{entity}.parquet"
