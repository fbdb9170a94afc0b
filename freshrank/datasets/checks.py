"""Checks of the data contract: what a table must hold before it is written, and the form it is written in.

Violations are collected, so that one refused import lists all of them; what is repaired or tolerated is counted.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from freshrank.datasets.mappings import mapping_of
from freshrank.errors import DataError
from freshrank.schema import (
    CREATED_AT,
    EVENT_TIMESTAMP,
    ITEM_ID,
    JUDGED_CREATED_AT,
    REQUEST_ID,
    REQUIRED,
    USAGE,
    USER_ID,
    Column,
    Kind,
    Role,
    Schema,
    Usage,
)

UTC_TIMESTAMP = pl.Datetime("us", "UTC")
IMPRESSION_KEY = [REQUEST_ID, USER_ID, ITEM_ID, EVENT_TIMESTAMP]
_EXAMPLES = 3
_OPTIONAL = {
    "impressions": {USAGE: Column(role=Role.META)},
    "items": {JUDGED_CREATED_AT: Column(role=Role.TIME)},
    "users": {},
}
_BY_ROLE = {
    Role.KEY: ("integer", "text"),
    Role.TIME: ("timestamp",),
    Role.ACTION: ("integer", "boolean", "float"),
}
_BY_KIND = {
    Kind.CATEGORICAL: ("integer", "text", "boolean", "float"),
    Kind.NUMERIC: ("float", "integer", "boolean"),
    Kind.MULTI_VALUED: ("list of text", "list of integer", "text", "list of null"),
    Kind.TEXT: ("text", "list of text", "list of integer", "list of null"),
    Kind.EMBEDDING: ("list of float", "list of integer", "list of null"),
}


@dataclass
class _Violation:
    rows: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """Violations and counts of an import so far, over all tables, files and days."""

    counts: Counter[str] = field(default_factory=Counter)
    _violations: dict[tuple[str, str, str], _Violation] = field(default_factory=dict)
    _text: dict[str, tuple[bool, str]] = field(default_factory=dict)

    def refuse(self, where: str, violation: str, hint: str, offending: pl.Series | None = None) -> None:
        """Record a violation in the column ``where``; a repeated one only adds its offending values."""
        recorded = self._violations.setdefault((where, violation, hint), _Violation())
        if offending is not None:
            recorded.rows += len(offending)
            shown = [_shown(value) for value in offending.head(_EXAMPLES).to_list()]
            recorded.examples = list(dict.fromkeys(recorded.examples + shown))[:_EXAMPLES]

    def refuse_rows(self, where: str, violation: str, hint: str, offending: pl.Series) -> None:
        if len(offending):
            self.refuse(where, violation, hint, offending)

    def count(self, what: str, rows: int) -> None:
        if rows:
            self.counts[what] += rows

    def note_coding(self, mapping: str, text: bool, where: str) -> None:
        """Refuse values of one mapping that are text in one place and numbers in another."""
        earlier, first = self._text.setdefault(mapping, (text, where))
        if earlier != text:
            kinds = ("numbers", "text")
            self.refuse(
                where,
                f"holds {kinds[text]}, but {first} holds {kinds[earlier]}",
                "store them alike in all tables and files, or import into another directory",
            )

    @property
    def sound(self) -> bool:
        return not self._violations

    def raise_refusals(self) -> None:
        """Raise one :class:`DataError` that lists every problem noted, a line each."""
        if not self.sound:
            lines = [_line(*key, rows) for key, rows in self._violations.items()]
            raise DataError("\n  ".join([f"the data breaks the contract in {len(lines)} way(s):", *lines]))


def _shown(value: Any) -> str:
    """A struct is shown with its field names, so that a row can be identified by its keys."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={'null' if part is None else part}" for name, part in value.items())
    return str(value)


def _line(where: str, violation: str, hint: str, recorded: _Violation) -> str:
    rows = f"{recorded.rows} row(s), e.g. {', '.join(recorded.examples)}: " if recorded.rows else ""
    return f"{where}: {rows}{violation}; {hint}"


def declared(schema: Schema, table: str) -> dict[str, Column]:
    """Columns of ``table`` that are read when present: the schema's and the contract's optional ones."""
    own = schema.table(table)
    return own | {name: column for name, column in _OPTIONAL[table].items() if name not in own}


def checked_columns(present: pl.Schema, table: str, schema: Schema, findings: Findings) -> dict[str, Column]:
    """The declared columns that are there with a type that can be read; refuses the others."""
    sound = {}
    for name, column in declared(schema, table).items():
        if name in present:
            if _check_type(f"{table}.{name}", name, column, present[name], findings):
                sound[name] = column
        elif name in schema.table(table) and name != USAGE:
            findings.refuse(
                f"{table}.{name}",
                f"the column is missing; the table has {sorted(present.names())}",
                "add it, or name the one it is kept in as its 'source' in schema.yaml",
            )
    return sound


def _check_type(where: str, name: str, column: Column, dtype: pl.DataType, findings: Findings) -> bool:
    accepted, family = _accepted(name, column), _family(dtype)
    if family == "null" or not accepted or family in accepted:
        if _is_coded(column) and "null" not in family:
            findings.note_coding(mapping_of(name), "text" in family, where)
        return True
    mend = "cast the column, or correct its role or kind in schema.yaml"
    if family == "timestamp without zone":
        mend = "attach the zone the clock showed, e.g. polars `.dt.replace_time_zone('UTC')`"
    findings.refuse(where, f"the type is {family} ({dtype}), expected {' or '.join(accepted)}", mend)
    return False


def _accepted(name: str, column: Column) -> tuple[str, ...]:
    if name == USAGE:
        return ("text",)
    return _BY_KIND[column.kind] if column.kind else _BY_ROLE.get(column.role, ())


def _is_coded(column: Column) -> bool:
    return column.role is Role.KEY or column.kind in (Kind.CATEGORICAL, Kind.MULTI_VALUED)


def _family(dtype: pl.DataType) -> str:
    if isinstance(dtype, pl.List | pl.Array):
        return f"list of {_family(dtype.inner)}"  # type: ignore[arg-type]
    if isinstance(dtype, pl.Datetime):
        return "timestamp" if dtype.time_zone else "timestamp without zone"
    if isinstance(dtype, pl.String | pl.Categorical | pl.Enum):
        return "text"
    if dtype.is_integer():
        return "integer"
    return "float" if dtype.is_numeric() else str(dtype).lower()


def harmonised(columns: dict[str, Column], present: pl.Schema) -> list[pl.Expr]:
    """Select ``columns`` so that files of the same log can be stacked: one clock, plain text, lists for arrays."""
    return [_harmonised(name, column, present[name]) for name, column in columns.items()]


def _harmonised(name: str, column: Column, dtype: pl.DataType) -> pl.Expr:
    value = pl.col(name)
    if column.role is Role.TIME:
        utc = value if dtype == pl.Null else value.dt.convert_time_zone("UTC")
        return utc.cast(UTC_TIMESTAMP)
    if isinstance(dtype, pl.Categorical | pl.Enum):
        return value.cast(pl.String)
    return value.arr.to_list() if isinstance(dtype, pl.Array) else value


def check_rows(frame: pl.DataFrame, table: str, columns: dict[str, Column], findings: Findings) -> None:
    """Refuse null keys and times and values outside their column's domain; ``frame`` is :func:`harmonised`."""
    for name, column in columns.items():
        where, values = f"{table}.{name}", frame[name]
        if name in REQUIRED[table]:
            findings.refuse_rows(
                where, "the key is null", "drop these rows or fill the key", _rows_of(frame, values.is_null(), table)
            )
        if values.dtype != pl.Null:
            _check_domain(where, name, column, values, findings)


def _rows_of(frame: pl.DataFrame, mask: pl.Series, table: str) -> pl.Series:
    """Struct of the keys of each row: a null value alone would say nothing about which row it is."""
    keys = [name for name in REQUIRED[table] if name in frame.columns]
    return frame.filter(mask).select(pl.struct(keys)).to_series()


def _check_domain(where: str, name: str, column: Column, values: pl.Series, findings: Findings) -> None:
    if name == USAGE:
        known = [usage.value for usage in Usage]
        findings.refuse_rows(
            where,
            "the usage is unknown",
            f"use one of {known} or null",
            values.filter(values.is_not_null() & ~values.is_in(known)),
        )
    elif column.role is Role.ACTION:
        _check_labels(where, values, findings)
    elif column.kind is Kind.NUMERIC:
        _check_finite(where, values, findings)
    elif column.kind is Kind.EMBEDDING:
        _check_vectors(where, column, values, findings)
    elif column.kind is Kind.CATEGORICAL or column.role is Role.KEY:
        _check_codes(where, values, findings)


def _check_labels(where: str, values: pl.Series, findings: Findings) -> None:
    labels = _count_nan(where, values.cast(pl.Float64), findings)
    findings.refuse_rows(
        where,
        "the label is outside {0, 1, null}",
        "store 1 for the action, 0 for none, null for not observed",
        values.filter(labels.is_not_null() & ~labels.is_in([0.0, 1.0])),
    )


def _count_nan(where: str, values: pl.Series, findings: Findings) -> pl.Series:
    findings.count(f"{where}: NaN read as null", int(values.is_nan().sum()))
    return values.fill_nan(None)


def _check_finite(where: str, values: pl.Series, findings: Findings) -> None:
    single = _count_nan(where, values.cast(pl.Float32), findings)
    findings.refuse_rows(
        where,
        "the value is infinite as float32",
        "replace it by null or a finite number",
        values.filter(single.is_infinite().fill_null(value=False)),
    )


def _check_vectors(where: str, column: Column, values: pl.Series, findings: Findings) -> None:
    lengths = values.list.len()
    findings.refuse_rows(
        where,
        f"the vector's length is not dim = {column.dim}",
        "correct dim in schema.yaml, or the vectors; null stands for none",
        lengths.filter(lengths != column.dim),
    )
    elements = values.list.eval(pl.element().cast(pl.Float32))
    infinite = elements.list.eval(pl.element().is_infinite()).list.any().fill_null(value=False)
    findings.refuse_rows(
        where,
        "the vector holds an infinite element",
        "replace the vector by null",
        values.filter(infinite).cast(pl.List(pl.String)).list.head(4).list.join(", "),
    )
    findings.count(f"{where}: vectors with NaN read as null", int(_holds_nan(elements).sum()))


def _holds_nan(vectors: pl.Series) -> pl.Series:
    return vectors.list.eval(pl.element().is_nan()).list.any().fill_null(value=False)


def _check_codes(where: str, values: pl.Series, findings: Findings) -> None:
    if values.dtype.is_float():
        values = _count_nan(where, values, findings)
        findings.refuse_rows(
            where,
            "the value is not a whole number",
            "declare the column numeric, or round it",
            values.filter(values.is_not_null() & (values != values.round())),
        )
    elif values.dtype.is_integer():
        lost = values.is_not_null() & values.cast(pl.Int64, strict=False).is_null()
        findings.refuse_rows(where, "the value does not fit into int64", "store it as text", values.filter(lost))


def check_unique(frame: pl.DataFrame, table: str, key: list[str], findings: Findings) -> None:
    """Refuse rows whose ``key`` (any columns of ``frame``) stands in an earlier row too."""
    if all(name in frame.columns for name in key):
        # Structs, not pl.format: that panics on one text column of which the filter left some chunks empty (2.1).
        repeated = frame.filter(~pl.struct(key).is_first_distinct())
        findings.refuse_rows(
            f"{table}.{'+'.join(key)}",
            "the key is repeated",
            "keep one row per key",
            repeated.select(pl.struct(key)).to_series(),
        )


def check_references(
    log: pl.DataFrame, items: pl.DataFrame, users: pl.DataFrame, allow_unknown_items: bool, findings: Findings
) -> None:
    """Check the log against the items and users it refers to; unknown users are allowed, and counted."""
    where = f"impressions.{ITEM_ID}"
    if _comparable(log, items, ITEM_ID):
        unknown = log.join(items, on=ITEM_ID, how="anti")[ITEM_ID].drop_nulls()
        if allow_unknown_items:
            findings.count("impressions of items absent from items", len(unknown))
        else:
            findings.refuse_rows(
                where,
                "the item is absent from items",
                "add it to items, drop these rows, or import with --allow-unknown-items",
                unknown,
            )
        if CREATED_AT in items.columns:
            _check_creation(log, items, findings)
    if _comparable(log, users, USER_ID):
        findings.count("impressions of users absent from users", len(log.join(users, on=USER_ID, how="anti")))


def _comparable(left: pl.DataFrame, right: pl.DataFrame, key: str) -> bool:
    return key in left.columns and key in right.columns and left[key].dtype == right[key].dtype


def _check_creation(log: pl.DataFrame, items: pl.DataFrame, findings: Findings) -> None:
    created = items.select(ITEM_ID, CREATED_AT).unique(ITEM_ID, keep="first")
    early = log.join(created, on=ITEM_ID).filter(pl.col(EVENT_TIMESTAMP) < pl.col(CREATED_AT))
    shown = pl.struct(ITEM_ID, EVENT_TIMESTAMP, CREATED_AT)
    findings.refuse_rows(
        f"impressions.{EVENT_TIMESTAMP}",
        "the impression precedes its item's created_at",
        "correct created_at, or drop these rows",
        early.select(shown).to_series(),
    )


def keys_as_written(frame: pl.DataFrame, columns: dict[str, Column]) -> pl.DataFrame:
    """``frame`` with integer keys as int64, so that tables can be joined; text stays text."""
    keys = [n for n, c in columns.items() if c.role is Role.KEY and frame[n].dtype.is_integer()]
    return frame.with_columns(pl.col(keys).cast(pl.Int64, strict=False))


def as_written(name: str, column: Column, dtype: pl.DataType) -> pl.Expr:
    """A checked column in the type it is written in; text that is mapped to codes is still text."""
    value = pl.col(name)
    if name == USAGE:
        return value.cast(pl.String).fill_null(Usage.ALL.value)
    if name == REQUEST_ID and dtype == pl.String:
        return value.map_batches(_digests, return_dtype=pl.Int64)
    if column.role is Role.ACTION:
        return _without_nan(value, dtype).cast(pl.Int8)
    if column.kind is Kind.NUMERIC:
        return value.cast(pl.Float32).fill_nan(None)
    if column.kind in (Kind.MULTI_VALUED, Kind.TEXT, Kind.EMBEDDING):
        return _as_written_list(value, column, dtype)
    return _as_written_code(value, column, dtype)


def _as_written_list(value: pl.Expr, column: Column, dtype: pl.DataType) -> pl.Expr:
    if column.kind is Kind.EMBEDDING:
        vectors = value.cast(pl.List(pl.Float32))
        incomplete = vectors.list.eval(pl.element().is_nan() | pl.element().is_null()).list.any()
        return pl.when(~incomplete).then(vectors).alias(value.meta.output_name())
    if column.kind is Kind.TEXT and dtype == pl.String:
        value = value.str.to_lowercase().str.extract_all(r"\w+")
    elif dtype == pl.String:
        value = value.str.extract_all(r"[^,|]+").list.eval(pl.element().str.strip_chars())
    elif dtype != pl.List(pl.String):
        value = value.cast(pl.List(pl.Int64))
    return value.list.drop_nulls().list.head(column.max_values)


def _as_written_code(value: pl.Expr, column: Column, dtype: pl.DataType) -> pl.Expr:
    if column.kind is Kind.CATEGORICAL or column.role is Role.KEY or dtype.is_integer():
        return value if dtype == pl.String else _without_nan(value, dtype).cast(pl.Int64)
    return value


def _without_nan(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    return value.fill_nan(None) if dtype.is_float() else value


def _digests(values: pl.Series) -> pl.Series:
    """63 bits of each text's BLAKE2b digest: stable without a mapping as long as the log."""
    unique = values.drop_nulls().unique()
    codes = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1 for text in unique]
    return values.replace_strict(unique, codes, default=None, return_dtype=pl.Int64)
