"""The expectations for a day, generated from the :class:`~freshrank.schema.Schema`: tables, and checks of each.

A table can be in order while its new items are not, so the fresh cohort is looked at by itself: its share of the
log, its positives, the coverage of its content, bucket of age by bucket, and its history, which must be empty before
it was born. Nothing in the contract says when a label arrived. Its delay is judged by what a label join that ran too
early leaves: labels that are null more often than in the week before, and positives missing from the last hours of the
day though not from the hours before.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from difflib import get_close_matches
from math import sqrt
from typing import Any

import polars as pl
from pydantic import BaseModel, ConfigDict

from freshrank.config import Severity, ValidationConfig, age_names
from freshrank.datasets.checks import IMPRESSION_KEY
from freshrank.datasets.dataset import Dataset
from freshrank.dates import midnight
from freshrank.errors import ConfigError, DataError
from freshrank.schema import (
    CREATED_AT,
    EVENT_TIMESTAMP,
    ITEM_AGE,
    ITEM_ID,
    JUDGED_CREATED_AT,
    REQUIRED,
    SNAPSHOT,
    USAGE,
    Entity,
    FeatureGroup,
    Kind,
    Role,
    Schema,
    Usage,
)

FRESH, LATE = "fresh", "late"
_BUCKET = "age_bucket"
_LOG, _WARM_ITEMS = "impressions", "warm items"
UNKNOWN_ITEM = "unknown_item"
"""The id of an item that the items table lacks, as text: with nulls a number would become a float."""
_COVERED = {"items": (Role.CONTENT,), "impressions": (Role.CONTEXT, Role.ACTION)}
_ONE_DAY = timedelta(days=1)
_STANDARD_ERRORS = 3.0
"""A share or a rate of few rows falls by chance: what lies within this many standard errors breaks no bound."""
_RARE = 1e-3
"""Chance at which a share of few rows counts as fallen: of a binomial, once in a thousand days."""
_FEWEST = 5
"""A single new item that lacks a value other items always have must not block a day."""


@dataclass(frozen=True)
class Check:
    """One expectation to be: the class of Great Expectations, its arguments, and the words for it."""

    name: str
    severity: Severity
    sentence: str
    bound: str
    expectation: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def column(self) -> str | None:
        return self.arguments.get("column")


class Coverage(BaseModel):
    """How much of a column is filled."""

    model_config = ConfigDict(frozen=True)

    table: str
    column: str
    rows: int
    share: float | None
    """Of the rows; None where there is none."""
    reference_rows: int
    reference: float | None
    """The trailing week's."""


@dataclass(frozen=True)
class Sheet:
    """A table, what is expected of it, and what is filled of it."""

    table: str
    frame: pl.DataFrame
    checks: list[Check]
    coverage: tuple[Coverage, ...] = ()


def judged_log(dataset: Dataset, wanted: list[date], config: ValidationConfig) -> pl.LazyFrame:
    """The log of ``wanted`` days but for rows that only feed history, with what the checks look at: each item's age,
    its bucket, ``fresh``, and ``late`` for the last hours of the day."""
    schema, born = dataset.schema, pl.col(JUDGED_CREATED_AT).alias("born")
    births = dataset.births().lazy().select(ITEM_ID, CREATED_AT, born, pl.lit(True).alias("known"))
    log = dataset.impressions(wanted)
    if USAGE in log.collect_schema():
        log = log.filter(pl.col(USAGE).fill_null(Usage.ALL) != Usage.HISTORY)
    age, at = (pl.col(EVENT_TIMESTAMP) - pl.col("born")) / _ONE_DAY, pl.col(EVENT_TIMESTAMP)
    late_from = timedelta(hours=24 - config.late_hours - schema.utc_offset_hours)
    start = pl.col("day").cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    return log.join(births, on=ITEM_ID, how="left").with_columns(
        ((at - pl.col(CREATED_AT)) / _ONE_DAY).alias(ITEM_AGE),
        pl.when(pl.col("known").is_null()).then(pl.col(ITEM_ID).cast(pl.String)).alias(UNKNOWN_ITEM),
        age.is_between(0, schema.fresh_days, "left").fill_null(False).alias(FRESH),
        sum([age >= edge for edge in config.age_buckets], pl.lit(0)).alias(_BUCKET),
        (at >= start + late_from).alias(LATE),
    )


def sheets(
    dataset: Dataset,
    day: date,
    log: pl.DataFrame,
    week: pl.LazyFrame | None,
    item_history: pl.DataFrame | None,
    config: ValidationConfig,
) -> list[Sheet]:
    """Every table with what is expected of it; ``log`` and ``week`` are :func:`judged_log` of the day and before it.

    Raises:
        DataError: ``item_history`` lacks a column.
    """
    schema = dataset.schema
    every = [
        _log_sheet(schema, day, log, week, config),
        *_item_sheets(dataset, log.lazy(), week, config),
        *([] if item_history is None else [_birth_sheet(schema, item_history)]),
    ]
    return [replace(sheet, checks=_configured(sheet.checks, config)) for sheet in every]


def names(schema: Schema) -> list[str]:
    """Of the expectations whose severity can be set, each once."""
    config, day = ValidationConfig(), date(2000, 1, 1)
    rates: dict[str, float | None] = dict.fromkeys(["volume", FRESH, *schema.actions], 1.0)
    checks = [
        *_contract_checks(schema, day, config),
        *_positive_checks(schema, config),
        *_trailing_checks(schema, rates, config),
        *_birth_checks(schema),
    ]
    covered = [_covered(name) for table in _COVERED for name in _columns(schema, table)]
    late = [_like_the_week(_of_late(action)) for action in schema.actions]
    return list(dict.fromkeys([*(check.name for check in checks), *late, *covered]))


def refuse_unknown(schema: Schema, config: ValidationConfig) -> None:
    """:class:`ConfigError` where ``config.severity`` names an expectation that this schema does not have."""
    known = names(schema)
    if unknown := [name for name in config.severity if name not in known]:
        near = [match for name in unknown for match in get_close_matches(name, known, n=1)]
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ConfigError(f"validation.severity: received {unknown}{meant}, expected names of {known}")


def _configured(checks: Iterable[Check], config: ValidationConfig) -> list[Check]:
    chosen = [(check, config.severity.get(check.name, check.severity)) for check in checks]
    return [replace(check, severity=severity) for check, severity in chosen if severity != "off"]


def _of_fresh(action: str) -> str:
    return f"{action} on fresh items"


def _of_late(action: str) -> str:
    return f"late_{action}"


def _like_the_week(name: str) -> str:
    return f"{name}_like_trailing_week"


def _covered(column: str) -> str:
    return f"{column}_covered"


def _log_sheet(
    schema: Schema, day: date, log: pl.DataFrame, week: pl.LazyFrame | None, config: ValidationConfig
) -> Sheet:
    checks, coverage = [*_contract_checks(schema, day, config), *_positive_checks(schema, config)], []
    if week is not None:
        before = week.select(*_summary(schema), *_late_summary(schema)).collect().row(0, named=True)
        coverage = _coverage(_LOG, *(_filled(schema, "impressions", part) for part in (log.lazy(), week)))
        checks += _trailing_checks(schema, before, config)
        checks += _late_checks(schema, log.select(_late_summary(schema)).row(0, named=True), before, config)
        checks += coverage_checks(coverage, config)
    parts = {_of_fresh: FRESH, _of_late: LATE}
    labels = [pl.when(mask).then(name).alias(of(name)) for of, mask in parts.items() for name in schema.actions]
    columns = dict.fromkeys([*REQUIRED["impressions"], *_columns(schema, "impressions"), ITEM_AGE, FRESH, UNKNOWN_ITEM])
    return Sheet(_LOG, log.select(*columns, *labels), checks, tuple(coverage))


def _contract_checks(schema: Schema, day: date, config: ValidationConfig) -> Iterator[Check]:
    block = Severity.BLOCKING
    for name in REQUIRED["impressions"]:
        yield Check(
            f"{name}_present",
            block,
            f"no impression lacks its {name}",
            "no null",
            "ExpectColumnValuesToNotBeNull",
            {"column": name},
        )
    for name in schema.actions:
        yield Check(
            f"{name}_is_label",
            block,
            f"label {name} is 0, 1 or null (not observed)",
            "0 or 1",
            "ExpectColumnValuesToBeInSet",
            {"column": name, "value_set": [0, 1]},
        )
    yield Check(
        "no_duplicates",
        block,
        "no impression is logged twice",
        f"one row per ({', '.join(IMPRESSION_KEY)})",
        "ExpectCompoundColumnsToBeUnique",
        {"column_list": IMPRESSION_KEY},
    )
    start, end = (midnight(border, schema.utc_offset_hours) for border in (day, day + _ONE_DAY))
    yield Check(
        "inside_the_day",
        block,
        f"every impression happened on {day}",
        f"{start} up to {end}",
        "ExpectColumnValuesToBeBetween",
        {"column": EVENT_TIMESTAMP, "min_value": start, "max_value": end, "strict_max": True},
    )
    yield Check(
        "born_before_shown",
        block,
        "no item is shown before it was created",
        f"{ITEM_AGE} of 0 or more",
        "ExpectColumnValuesToBeBetween",
        {"column": ITEM_AGE, "min_value": 0.0},
    )
    yield Check(
        "items_known",
        Severity.WARNING,
        "shown items are in the items table",
        f"at least {config.min_known_items:.1%} of rows",
        "ExpectColumnValuesToBeNull",
        {"column": UNKNOWN_ITEM, "mostly": config.min_known_items},
    )


def _positive_checks(schema: Schema, config: ValidationConfig) -> Iterator[Check]:
    bound, least = f"at least {config.min_positives:,}", {"min_value": config.min_positives}
    for name in schema.actions:
        yield Check(
            f"{name}_has_positives",
            Severity.BLOCKING,
            f"somebody did {name}",
            bound,
            "ExpectColumnSumToBeBetween",
            {"column": name, **least},
        )
        yield Check(
            f"{name}_has_fresh_positives",
            Severity.WARNING,
            f"somebody did {name} on a fresh item",
            bound,
            "ExpectColumnSumToBeBetween",
            {"column": _of_fresh(name), **least},
        )


def _summary(schema: Schema) -> list[pl.Expr]:
    """Of a log: impressions per day, share of fresh rows, positive rate per action."""
    return [
        (pl.len() / pl.col("day").n_unique()).alias("volume"),
        pl.col(FRESH).mean(),
        *(pl.col(name).cast(pl.Float64).mean() for name in schema.actions),
    ]


def _tiers(config: ValidationConfig) -> tuple[tuple[Severity, float], tuple[Severity, float]]:
    return (Severity.BLOCKING, config.block_factor), (Severity.WARNING, config.warn_factor)


def _trailing_checks(schema: Schema, week: dict[str, float | None], config: ValidationConfig) -> Iterator[Check]:
    """The day against ``week``, the :func:`_summary` of the days before it."""
    words = {"volume": "the number of impressions", FRESH: "the share of fresh impressions"}
    for name in ["volume", FRESH, *schema.actions]:
        reference = week[name]
        if not reference:
            continue
        what = words.get(name, f"the positive rate of {name}")
        sentence = f"{what} is like the trailing week's {number(reference)}"
        target: dict[str, Any] = {} if name == "volume" else {"column": name}
        kind = "ExpectTableRowCountToBeBetween" if name == "volume" else "ExpectColumnMeanToBeBetween"
        for severity, factor in _tiers(config):
            low, high = reference / factor, reference * factor
            limits: dict[str, Any] = {"min_value": low, "max_value": high}
            bound = f"{number(low)} .. {number(high)} (a factor of {factor:g})"
            if name == FRESH and severity is Severity.BLOCKING:
                limits, bound = {"min_value": low}, f"at least {number(low)} (a factor of {factor:g})"
            if name == "volume":
                limits = {key: round(value) for key, value in limits.items()}
            yield Check(_like_the_week(name), severity, sentence, bound, kind, {**target, **limits})


def _late_summary(schema: Schema) -> list[pl.Expr]:
    """Of a log: labels observed (``<action>_late_rows``, ``_early_rows``) and their positive rate (``_late``,
    ``_early``) in the last hours of the day and before them."""
    return [
        expression
        for name in schema.actions
        for part, mask in (("late", pl.col(LATE)), ("early", ~pl.col(LATE)))
        for labels in [pl.col(name).filter(mask).cast(pl.Float64)]
        for expression in (labels.count().alias(f"{name}_{part}_rows"), labels.mean().alias(f"{name}_{part}"))
    ]


def _late_checks(
    schema: Schema, today: dict[str, Any], week: dict[str, Any], config: ValidationConfig
) -> Iterator[Check]:
    """Compares the last hours with the other hours of the day, as in the trailing week, so that a slow day is not
    taken for late labels.
    """
    for name in schema.actions:
        early, before, usual = today[f"{name}_early"], week[f"{name}_early"], week[f"{name}_late"]
        if not (early and before and usual and today[f"{name}_late_rows"]):
            continue
        expected = min(1.0, early * usual / before)
        shares = [
            (expected, today[f"{name}_late_rows"]),
            (early, today[f"{name}_early_rows"]),
            (usual, week[f"{name}_late_rows"]),
            (before, week[f"{name}_early_rows"]),
        ]
        chance = _STANDARD_ERRORS * expected * sqrt(sum((1 - share) / (share * rows) for share, rows in shares))
        hours = f"the last {config.late_hours:g} hours"
        sentence = (
            f"the positive rate of {name} in {hours} is like the {number(expected)} that the day's other hours "
            "and the trailing week let expect (if not, labels were joined too early)"
        )
        for severity, factor in _tiers(config):
            low = min(expected / factor, expected - chance)
            if low > 0:
                yield Check(
                    _like_the_week(_of_late(name)),
                    severity,
                    sentence,
                    f"at least {number(low)}",
                    "ExpectColumnMeanToBeBetween",
                    {"column": _of_late(name), "min_value": low},
                )


def _columns(schema: Schema, table: str) -> list[str]:
    return [name for name, column in schema.table(table).items() if column.role in _COVERED[table]]


def _item_sheets(
    dataset: Dataset, log: pl.LazyFrame, week: pl.LazyFrame | None, config: ValidationConfig
) -> Iterator[Sheet]:
    """Content of the items shown today, fresh and warm apart and by age."""
    if week is None or not _columns(dataset.schema, "items"):
        return
    items = _filled(dataset.schema, "items", dataset.items().lazy(), ITEM_ID).collect().lazy()
    shown = [one.select(ITEM_ID, FRESH, _BUCKET).unique().collect().lazy() for one in (log, week)]
    for cohort, mask in _cohorts(config).items():
        today, before = (
            items.join(one.filter(mask).select(ITEM_ID).unique(), on=ITEM_ID).drop(ITEM_ID) for one in shown
        )
        coverage = _coverage(cohort, today, before)
        yield Sheet(cohort, today.collect(), list(coverage_checks(coverage, config)), tuple(coverage))


def _cohorts(config: ValidationConfig) -> dict[str, pl.Expr]:
    """Which items are looked at together; one that grew older during the day is in two buckets."""
    ages = {
        f"items {name} days old": pl.col(_BUCKET) == place for place, name in enumerate(age_names(config.age_buckets))
    }
    return {"fresh items": pl.col(FRESH), _WARM_ITEMS: ~pl.col(FRESH)} | ages


def _filled(schema: Schema, table: str, frame: pl.LazyFrame, *keys: str) -> pl.LazyFrame:
    """``keys``, and of every column that coverage is about 1 where a value is there, null where it is missing or an
    empty list."""

    def present(name: str) -> pl.Expr:
        lists = schema.table(table)[name].kind in (Kind.MULTI_VALUED, Kind.TEXT, Kind.EMBEDDING)
        there = pl.col(name).list.len() > 0 if lists else pl.col(name).is_not_null()
        return pl.when(there).then(1.0).alias(name)

    return frame.select(*keys, *(present(name) for name in _columns(schema, table)))


def _coverage(table: str, today: pl.LazyFrame, before: pl.LazyFrame) -> list[Coverage]:
    """The day beside the week before, column by column."""
    counts, reference = (
        frame.select(pl.len().alias(""), pl.all().count()).collect().row(0, named=True) for frame in (today, before)
    )
    rows, week_rows = counts.pop(""), reference[""]
    return [
        Coverage(
            table=table,
            column=column,
            rows=rows,
            reference_rows=week_rows,
            share=filled / rows if rows else None,
            reference=reference[column] / week_rows if week_rows else None,
        )
        for column, filled in counts.items()
    ]


def coverage_checks(coverage: Iterable[Coverage], config: ValidationConfig) -> Iterator[Check]:
    """Of what has a reference of rows enough to tell."""
    for one in coverage:
        if one.reference is not None and one.rows >= _FEWEST and one.reference_rows >= config.min_cohort:
            yield from _filled_checks(one, one.reference, config)


def _least(one: Coverage, usual: float, config: ValidationConfig) -> float:
    """Share of filled values below which chance alone does not bring a column that is filled as ``usual``."""
    if one.rows >= config.min_cohort:
        return usual - _STANDARD_ERRORS * sqrt(usual * (1 - usual) / one.rows)
    from scipy.stats import binom

    # A reference that lacks no value says no more than that few are lacking: a value more of either kind.
    share = (usual * one.reference_rows + 1) / (one.reference_rows + 2)
    return float(binom.ppf(_RARE, one.rows, share)) / one.rows


def _filled_checks(one: Coverage, usual: float, config: ValidationConfig) -> Iterator[Check]:
    where = f"{one.column} of {one.table}"
    kind = "ExpectColumnProportionOfNonNullValuesToBeBetween"
    if not usual and one.table in (_LOG, _WARM_ITEMS):
        # The items table is replaced as a whole: a column it lost is lost for the week before as well.
        yield Check(
            _covered(one.column),
            Severity.WARNING,
            f"{where} holds values at all",
            "more than 0",
            kind,
            {"column": one.column, "min_value": 0.0, "strict_min": True},
        )
    sentence = f"{where} is filled as in the trailing week ({usual:.1%})"
    least = _least(one, usual, config)
    tiers = (Severity.BLOCKING, config.block_coverage), (Severity.WARNING, config.warn_coverage)
    for severity, share in tiers:
        low = min(share * usual, least)
        if low > 0:
            yield Check(
                _covered(one.column),
                severity,
                sentence,
                f"at least {low:.1%}",
                kind,
                {"column": one.column, "min_value": low},
            )


def _birth_checks(schema: Schema) -> list[Check]:
    features = schema.select(Entity.ITEM, Kind.NUMERIC, stored=True)
    sentence = "an item has no history at or before its creation"
    return [
        Check(
            f"{feature.name}_empty_before_birth",
            Severity.BLOCKING,
            sentence,
            "0 or null",
            "ExpectColumnValuesToBeBetween",
            {"column": feature.name, "min_value": 0.0, "max_value": 0.0},
        )
        for feature in features
        if feature.group is FeatureGroup.HISTORICAL and feature.snapshot
    ]


def birth_names(schema: Schema) -> tuple[str, ...]:
    """Of the expectations that need an ``item_history``."""
    return tuple(check.name for check in _birth_checks(schema))


def _birth_sheet(schema: Schema, history: pl.DataFrame) -> Sheet:
    """A leak shows as history of an item that did not exist at the snapshot's instant."""
    checks = _birth_checks(schema)
    columns = [str(check.column) for check in checks]
    missing = [name for name in (ITEM_ID, SNAPSHOT, CREATED_AT, *columns) if name not in history.columns]
    if missing:
        raise DataError(
            f"item_history: columns {missing} are missing, received {history.columns}; pass the rows of "
            f"item snapshots joined with items.{CREATED_AT}"
        )
    unborn = history.filter(pl.col(CREATED_AT) >= pl.col(SNAPSHOT)).select(pl.col(columns).cast(pl.Float64))
    return Sheet("item_history", unborn, checks)


def number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
