"""The data contract: tables, columns, roles, feature groups, defaults. The only place names are spelled.

``schema.yaml`` lists, per table, every column with its role and kind; :meth:`Schema.features` derives from it
every feature of the model. Feast views, the encoder, the Triton inputs and the validation suites are all
generated from that one list.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from freshrank.errors import ConfigError

REQUEST_ID = "request_id"
EVENT_TIMESTAMP = "event_timestamp"
USER_ID = "user_id"
ITEM_ID = "item_id"
QUERY_ITEM_ID = "query_item_id"
CREATED_AT = "created_at"
POSITION = "position"
USAGE = "usage"
JUDGED_CREATED_AT = "judged_created_at"
SNAPSHOT = "snapshot_timestamp"
ITEM_AGE = "item_age_days"
SEQUENCE_ITEMS = "sequence_item_ids"
SEQUENCE_ACTIONS = "sequence_actions"
RESERVED = {
    REQUEST_ID,
    EVENT_TIMESTAMP,
    USER_ID,
    ITEM_ID,
    QUERY_ITEM_ID,
    CREATED_AT,
    POSITION,
    USAGE,
    JUDGED_CREATED_AT,
}
REQUIRED = {
    "impressions": (REQUEST_ID, EVENT_TIMESTAMP, USER_ID, ITEM_ID),
    "items": (ITEM_ID, CREATED_AT),
    "users": (USER_ID,),
}
TABLES = tuple(REQUIRED)


class Role(StrEnum):
    KEY = "key"
    TIME = "time"
    ACTION = "action"
    CONTENT = "content"
    CONTEXT = "context"
    PROFILE = "profile"
    META = "meta"


class Kind(StrEnum):
    CATEGORICAL = "categorical"
    NUMERIC = "numeric"
    MULTI_VALUED = "multi_valued"
    TEXT = "text"
    EMBEDDING = "embedding"
    SEQUENCE = "sequence"


class FeatureGroup(StrEnum):
    HISTORICAL = "historical"
    NON_HISTORICAL = "non_historical"


class Origin(StrEnum):
    """Where the stored value of a feature comes from, which says how long it stands."""

    TABLE = "table"
    """The users and items tables."""
    SNAPSHOT = "snapshot"
    """The daily snapshots, built from the log."""
    HOURLY = "hourly"
    """The hourly counters of fresh items, built from the log (``freshrank/features/hourly.py``)."""


class Entity(StrEnum):
    USER = "user"
    ITEM = "item"
    ROW = "row"
    """One (request, candidate) pair: context, item age, crosses of a user's and an item's features."""


class Usage(StrEnum):
    """What an impression may be used for (optional column ``usage`` of the log; absent or null means all)."""

    ALL = "all"
    HISTORY = "history"
    """Feeds counters and sequences only: backfilled rows without exact times, say."""
    TRAINING = "training"
    """All but judging."""
    EVALUATION = "evaluation"
    """Judged only: withheld from training, calibration and all history."""


IN_HISTORY = (Usage.ALL, Usage.HISTORY, Usage.TRAINING)
IN_TRAINING = (Usage.ALL, Usage.TRAINING)
IN_EVALUATION = (Usage.ALL, Usage.EVALUATION)

Transform = Literal["none", "log1p"]
_ROLES = {
    "impressions": {Role.KEY, Role.TIME, Role.ACTION, Role.CONTEXT, Role.META},
    "items": {Role.KEY, Role.TIME, Role.CONTENT},
    "users": {Role.KEY, Role.PROFILE},
}
_MODELLED = {Role.CONTENT, Role.CONTEXT, Role.PROFILE}


class Column(BaseModel):
    """One column of a table of the contract."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    kind: Kind | None = None
    source: str | None = None
    """Name in the user's own file, when it differs."""
    default: float | None = None
    """Stands in for a missing numeric value; without it the model sees a missing mask and the mean."""
    transform: Transform = "none"
    dim: int | None = None
    """Length of an embedding."""
    max_values: int = 8
    """How many values of a multi-valued or text column are kept, in their order."""
    utility: float = 1.0
    """Weight u of an action in the final score s = sum(u * p) (eq. 12)."""
    description: str = ""

    @model_validator(mode="after")
    def _kind_fits_role(self) -> "Column":
        if self.role in _MODELLED and self.kind is None:
            raise ValueError(f"a column of role '{self.role}' needs a kind: one of {[k.value for k in Kind][:-1]}")
        if self.kind is Kind.EMBEDDING and not self.dim:
            raise ValueError("an embedding column needs 'dim', the length of its vectors")
        if self.kind is Kind.SEQUENCE:
            raise ValueError("kind 'sequence' is built from the log, not read from a table")
        return self


class Feature(BaseModel):
    """One input of the model, as offline store, online store, encoder and report name it."""

    model_config = ConfigDict(frozen=True)

    name: str
    entity: Entity
    group: FeatureGroup
    kind: Kind
    default: float | None = None
    transform: Transform = "none"
    dim: int = 1
    """Length of an embedding, number of kept values of a multi-valued feature, length of a sequence."""
    stored: bool = True
    """False for what is computed at request time: item age, context, crosses."""
    origin: Origin = Origin.TABLE

    @property
    def snapshot(self) -> bool:
        """Whether the daily snapshots hold it."""
        return self.origin is Origin.SNAPSHOT

    @property
    def missing(self) -> float:
        """What a numeric feature holds where there is no value: its default, or NaN for the missing mask."""
        return float("nan") if self.default is None else self.default


class HistoryConfig(BaseModel):
    """Which historical features are built from the log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: tuple[Annotated[int, Field(ge=1, le=366)], ...] = (1, 7, 28)
    """Days per counter window, ascending; the longest is also how far back sequences and affinities look."""
    sequence_length: Annotated[int, Field(ge=1, le=1000)] = 50
    affinity: tuple[str, ...] = ()
    """Categorical or multi-valued content columns for user x category counters (first value counts)."""
    affinity_size: int = 16
    """How many of a user's most seen categories are kept."""
    siblings: tuple[str, ...] = ()
    """Content columns, or pairs joined by "+", whose equal values make items siblings; each item gets their rates.

    Of a multi-valued column the first value counts, of a numeric one its half octave: floor(2 log2(max(x, 1))), which
    depends on no other item. With siblings a snapshot holds the whole catalogue, not only what was seen lately."""
    sibling_smoothing: Annotated[float, Field(ge=0)] = 30
    """Observations of siblings that weigh as much as the rate of all other items."""
    hourly: bool = False
    """Counters of the last 24 full hours for items younger than ``fresh_days``, pushed every hour."""
    hourly_delay_minutes: Annotated[int, Field(ge=0, le=720)] = 10
    """How long after an hour its counters are online: the log must have arrived and the push have ended by then.
    Training reads them that late as well."""

    @model_serializer(mode="wrap")
    def _what_is_switched_on(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A schema without siblings or hourly counters is written, and fingerprinted, as before there were any."""
        tree: dict[str, Any] = handler(self)
        off = {"sibling": not self.siblings, "hourly": not self.hourly}
        return {k: v for k, v in tree.items() if not any(k.startswith(name) for name, is_off in off.items() if is_off)}


class Schema(BaseModel):
    """``schema.yaml``, validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    fresh_days: Annotated[float, Field(gt=0)] = 28
    """Days after creation during which an item, and every impression of it, counts as fresh."""
    utc_offset_hours: Annotated[float, Field(ge=-14, le=14)] = 0
    """When the calendar day of counters and partitions starts, relative to UTC midnight."""
    impressions: dict[str, Column]
    items: dict[str, Column]
    users: dict[str, Column]
    history: HistoryConfig = HistoryConfig()

    @model_validator(mode="after")
    def _complete(self) -> "Schema":
        for table in TABLES:
            self._check_table(table)
        if not self.actions:
            raise ValueError("table 'impressions' has no column of role 'action'; declare at least one 0/1 column")
        self._check_affinity()
        self._check_siblings()
        return self

    def _check_table(self, table: str) -> None:
        columns = self.table(table)
        missing = [name for name in REQUIRED[table] if name not in columns]
        if missing:
            raise ValueError(f"table '{table}' lacks required columns {missing}; it has {sorted(columns)}")
        for name, column in columns.items():
            if column.role not in _ROLES[table]:
                allowed = sorted(role.value for role in _ROLES[table])
                raise ValueError(f"column '{table}.{name}' has role '{column.role}'; expected one of {allowed}")
            if column.role is Role.CONTEXT and column.kind not in (Kind.CATEGORICAL, Kind.NUMERIC):
                raise ValueError(
                    f"column '{table}.{name}' is a context of kind '{column.kind}'; a request can carry "
                    "categorical and numeric context only"
                )
            if name in RESERVED and column.role in _MODELLED | {Role.ACTION}:
                raise ValueError(f"column '{table}.{name}' is a reserved name and cannot have role '{column.role}'")

    def _check_affinity(self) -> None:
        fitting = [n for n, c in self.items.items() if c.kind in (Kind.CATEGORICAL, Kind.MULTI_VALUED)]
        for name in self.history.affinity:
            if name not in fitting:
                raise ValueError(
                    f"history.affinity names '{name}'; expected categorical or multi-valued item columns: {fitting}"
                )

    def _check_siblings(self) -> None:
        kinds = (Kind.CATEGORICAL, Kind.MULTI_VALUED, Kind.NUMERIC)
        fitting = [n for n, c in self.items.items() if c.kind in kinds]
        for entry in self.history.siblings:
            columns = sibling_columns(entry)
            if len(set(columns)) != len(columns) or len(columns) > 2 or not set(columns) <= set(fitting):
                raise ValueError(
                    f"history.siblings names '{entry}'; expected one categorical, multi-valued or numeric "
                    f"item column, or two different ones joined by '+', of {fitting}"
                )
        names = [feature.name for feature in self.features()]
        if doubled := [feature.name for feature in self._siblings() if names.count(feature.name) > 1]:
            raise ValueError(
                f"history.siblings {list(self.history.siblings)} give features of equal names {doubled}; "
                "expected each entry once, and no column of such a name"
            )

    def with_siblings(self, entries: tuple[str, ...]) -> "Schema":
        """This schema with ``entries`` as its only siblings; with none of them, as if it had never had any."""
        smoothing = self.history.sibling_smoothing if entries else HistoryConfig().sibling_smoothing
        history = {"siblings": entries, "sibling_smoothing": smoothing}
        return self.model_copy(update={"history": self.history.model_copy(update=history)})

    def without_siblings(self) -> "Schema":
        return self.with_siblings(())

    def table(self, name: str) -> dict[str, Column]:
        columns: dict[str, Column] = getattr(self, name)
        return columns

    @property
    def actions(self) -> list[str]:
        """Names of the actions, in the order of every [.., A] tensor."""
        return [name for name, column in self.impressions.items() if column.role is Role.ACTION]

    @property
    def utilities(self) -> list[float]:
        return [self.impressions[name].utility for name in self.actions]

    @property
    def has_query(self) -> bool:
        return QUERY_ITEM_ID in self.impressions

    @property
    def lookback_days(self) -> int:
        """How many past days any historical feature can depend on."""
        return max(self.history.windows)

    def features(self) -> list[Feature]:
        """Every feature of the model, in a fixed order."""
        return [
            *self._declared("users", Entity.USER, Role.PROFILE),
            *self._counters(Entity.USER),
            *self._sequences(),
            *self._affinities(),
            *self._declared("items", Entity.ITEM, Role.CONTENT),
            *self._counters(Entity.ITEM),
            *self._hourly_counters(),
            *self._siblings(),
            Feature(
                name=ITEM_AGE,
                entity=Entity.ROW,
                group=FeatureGroup.NON_HISTORICAL,
                kind=Kind.NUMERIC,
                transform="log1p",
                stored=False,
            ),
            *self._declared("impressions", Entity.ROW, Role.CONTEXT, stored=False),
            *self._crosses(),
        ]

    def coded(self) -> dict[str, str]:
        """Historical feature -> the column whose codes it holds, where ids or categories are text."""
        values = {affinity_lists(column, self.actions)[0]: column for column in self.history.affinity}
        return values | {SEQUENCE_ITEMS: ITEM_ID}

    def select(self, entity: Entity, kind: Kind | None = None, stored: bool | None = None) -> list[Feature]:
        """The features of one entity, optionally of one kind, optionally only those (not) in the store."""
        return [
            feature
            for feature in self.features()
            if feature.entity is entity and kind in (None, feature.kind) and stored in (None, feature.stored)
        ]

    def _declared(self, table: str, entity: Entity, role: Role, stored: bool = True) -> list[Feature]:
        return [
            Feature(
                name=name,
                entity=entity,
                group=FeatureGroup.NON_HISTORICAL,
                kind=_stored_kind(column),
                default=column.default,
                transform=column.transform,
                dim=_dim(column),
                stored=stored,
            )
            for name, column in self.table(table).items()
            if column.role is role
        ]

    def _counters(self, entity: Entity) -> list[Feature]:
        counts, rates = [], []
        for window in self.history.windows:
            names = [impressions_of(entity, window), *(f"{entity}_{a}_{window}d" for a in self.actions)]
            counts += [_historical(name, entity, default=0.0, transform="log1p") for name in names]
            rates += [_historical(f"{entity}_{a}_rate_{window}d", entity) for a in self.actions]
        return counts + rates

    def _hourly_counters(self) -> list[Feature]:
        if not self.history.hourly:
            return []
        impressions, positives, rates = hourly_names(self.actions)
        return [*(_hourly(name, "log1p") for name in (impressions, *positives)), *map(_hourly, rates)]

    def _sequences(self) -> list[Feature]:
        length = self.history.sequence_length
        return [
            Feature(
                name=name,
                entity=Entity.USER,
                group=FeatureGroup.HISTORICAL,
                kind=Kind.SEQUENCE,
                dim=length,
                origin=Origin.SNAPSHOT,
            )
            for name in (SEQUENCE_ITEMS, SEQUENCE_ACTIONS)
        ]

    def _affinities(self) -> list[Feature]:
        names = [name for column in self.history.affinity for name in affinity_lists(column, self.actions)]
        return [
            Feature(
                name=name,
                entity=Entity.USER,
                group=FeatureGroup.HISTORICAL,
                kind=Kind.SEQUENCE,
                dim=self.history.affinity_size,
                origin=Origin.SNAPSHOT,
            )
            for name in names
        ]

    def _siblings(self) -> list[Feature]:
        """Not historical: what a new item has too, and what dropping an item's own history leaves it."""
        features = []
        for entry in self.history.siblings:
            impressions, *rates = sibling_names(entry, self.actions)
            features.append(_sibling(impressions, default=0.0, transform="log1p"))
            features += [_sibling(name) for name in rates]
        return features

    def _crosses(self) -> list[Feature]:
        crosses = []
        for column in self.history.affinity:
            impressions, *rates = affinity_crosses(column, self.actions)
            crosses.append(_historical(impressions, Entity.ROW, default=0.0, transform="log1p", stored=False))
            crosses += [_historical(name, Entity.ROW, stored=False) for name in rates]
        return crosses


def impressions_of(entity: Entity, window: int) -> str:
    """Name of the counter of an entity's impressions in the last ``window`` days."""
    return f"{entity}_impressions_{window}d"


def hourly_names(actions: list[str]) -> tuple[str, list[str], list[str]]:
    """Names of a fresh item's hourly counters: impressions, and per action positives and rate, of the last 24 hours."""
    counts = [f"item_{action}_24h" for action in actions]
    return "item_impressions_24h", counts, [f"item_{action}_rate_24h" for action in actions]


def affinity_lists(column: str, actions: list[str]) -> list[str]:
    """Names of the parallel lists a user's affinity to ``column`` is stored as: values, impressions, actions."""
    return [f"affinity_{column}_{part}" for part in ("values", "impressions", *actions)]


def affinity_crosses(column: str, actions: list[str]) -> list[str]:
    """Names of what a user did with a candidate's category: impressions, then a rate per action."""
    return [f"cross_affinity_{column}_{part}" for part in ("impressions", *(f"{action}_rate" for action in actions))]


def sibling_columns(entry: str) -> list[str]:
    """The item columns of one entry of ``history.siblings``."""
    return entry.split("+")


def sibling_names(entry: str, actions: list[str]) -> list[str]:
    """Names of the features of one entry of ``history.siblings``: impressions, then a rate per action."""
    name = "_".join(sibling_columns(entry))
    return [f"sibling_{name}_impressions", *(f"sibling_{name}_{action}_rate" for action in actions)]


def _sibling(name: str, default: float | None = None, transform: Transform = "none") -> Feature:
    return Feature(
        name=name,
        entity=Entity.ITEM,
        group=FeatureGroup.NON_HISTORICAL,
        kind=Kind.NUMERIC,
        default=default,
        transform=transform,
        origin=Origin.SNAPSHOT,
    )


def _historical(
    name: str,
    entity: Entity,
    default: float | None = None,
    transform: Transform = "none",
    stored: bool = True,
) -> Feature:
    origin = Origin.SNAPSHOT if stored else Origin.TABLE
    return Feature(
        name=name,
        entity=entity,
        group=FeatureGroup.HISTORICAL,
        kind=Kind.NUMERIC,
        default=default,
        transform=transform,
        stored=stored,
        origin=origin,
    )


def _hourly(name: str, transform: Transform = "none") -> Feature:
    """Without a default: no impressions and no counters are different things."""
    return Feature(
        name=name,
        entity=Entity.ITEM,
        group=FeatureGroup.HISTORICAL,
        kind=Kind.NUMERIC,
        transform=transform,
        origin=Origin.HOURLY,
    )


def _stored_kind(column: Column) -> Kind:
    assert column.kind is not None
    return Kind.MULTI_VALUED if column.kind is Kind.TEXT else column.kind


def _dim(column: Column) -> int:
    if column.kind in (Kind.MULTI_VALUED, Kind.TEXT):
        return column.max_values
    return column.dim or 1


def load_schema(path: Path) -> Schema:
    """Read ``schema.yaml``; a :class:`ConfigError` names the file, the field, what it held and what was expected."""
    try:
        raw: Any = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; a data directory holds schema.yaml beside its tables") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with 'name', 'impressions', 'items', 'users', got {raw!r:.80}")
    try:
        return Schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    def line(problem: Any) -> str:
        where = ".".join(map(str, problem["loc"])) or "schema"
        received = "" if isinstance(problem["input"], dict) else f" (received {problem['input']!r:.80})"
        return f"{where}: {problem['msg'].removeprefix('Value error, ')}{received}"

    return "; ".join(line(problem) for problem in error.errors())


def dump_schema(schema: Schema) -> str:
    """``schema`` as the YAML :func:`load_schema` reads."""
    text: str = yaml.safe_dump(schema.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    return text
