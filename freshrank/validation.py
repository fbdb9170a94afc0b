"""May this day be trained on? The newest day against its contract and the week before it, with Great Expectations.

A table can be in order while its new items are not, so the fresh cohort is looked at by itself: its share of the
log, its positives, the coverage of its content, and its history, which must be empty before it was born.
Every expectation is generated from the :class:`~freshrank.schema.Schema`; one that blocks stops the run, one that
warns is written down. Summary results only: they carry a few offending values, not all of them.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from freshrank.clock import days, midnight
from freshrank.datasets.contract import Dataset
from freshrank.errors import DataError, ValidationFailed
from freshrank.schema import (
    CREATED_AT,
    EVENT_TIMESTAMP,
    ITEM_AGE,
    ITEM_ID,
    JUDGED_CREATED_AT,
    REQUEST_ID,
    REQUIRED,
    SNAPSHOT,
    USAGE,
    USER_ID,
    Entity,
    Group,
    Kind,
    Role,
    Schema,
    Usage,
)
from freshrank.storage import atomic_write

FRESH = "fresh"
WARM = "warm"
_KNOWN_ITEM = "known_item"
_MESSAGE_LINES = 8
_EXAMPLES = 5


class Severity(StrEnum):
    BLOCKING = "blocking"
    WARNING = "warning"


class ValidationBounds(BaseModel):
    """How far a day may stray. Factors bound a day's value by ``reference / factor .. reference * factor``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trailing_days: Annotated[int, Field(ge=1)] = 7
    """Days before the validated one that make the reference; those the log lacks are left out."""
    warn_factor: Annotated[float, Field(gt=1)] = 2.0
    block_factor: Annotated[float, Field(gt=1)] = 5.0
    """For volume and positive rates; for the share of fresh items downwards only, as a launch may well raise it."""
    warn_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9
    block_coverage: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of filled values, as a part of the reference's share."""
    min_cohort: Annotated[int, Field(ge=1)] = 20
    """Coverage is not judged on fewer rows than this."""
    min_positives: Annotated[int, Field(ge=1)] = 1
    min_known_items: Annotated[float, Field(gt=0, le=1)] = 0.99


class ExpectationResult(BaseModel):
    """One expectation and what was seen."""

    model_config = ConfigDict(frozen=True)

    name: str
    table: str
    column: str | None
    severity: Severity
    success: bool
    sentence: str
    """The expectation in words."""
    observed: str
    bound: str
    examples: tuple[str, ...] = ()
    """A few of the values that broke it."""

    def __str__(self) -> str:
        where = f"{self.table}.{self.column}" if self.column else self.table
        examples = f"; e.g. {', '.join(self.examples)}" if self.examples else ""
        return f"{where}: {self.sentence}; observed {self.observed}, expected {self.bound}{examples}"


class ValidationReport(BaseModel):
    """Everything that was expected of one day."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    day: date
    trailing: tuple[date, ...]
    """The days that made the reference."""
    rows: int
    fresh_rows: int
    results: tuple[ExpectationResult, ...]

    def failures(self, severity: Severity) -> list[ExpectationResult]:
        return [result for result in self.results if result.severity is severity and not result.success]

    @property
    def passed(self) -> bool:
        """No blocking expectation failed; warnings do not count."""
        return not self.failures(Severity.BLOCKING)

    def raise_if_blocked(self) -> None:
        """:class:`ValidationFailed` with one screen of text, unless the day :attr:`passed`."""
        if not self.passed:
            raise ValidationFailed(self._message())

    def _message(self) -> str:
        blocking, warnings = self.failures(Severity.BLOCKING), self.failures(Severity.WARNING)
        head = (
            f"{self.dataset}: {self.day} must not be trained on: {len(blocking)} of {len(self.results)} expectations "
            f"failed and block ({len(warnings)} more warn; {self.rows:,} rows were read)"
        )
        lines = [f"  - {result}" for result in blocking[:_MESSAGE_LINES]]
        if len(blocking) > _MESSAGE_LINES:
            lines.append(f"  … and {len(blocking) - _MESSAGE_LINES} more; the validation page lists them all")
        mend = "Mend the day's data and import it again; what serves, if anything, keeps serving."
        return "\n".join([head, *lines, mend])


def validate_day(
    dataset: Dataset,
    run_date: date,
    item_history: pl.DataFrame | None = None,
    bounds: ValidationBounds | None = None,
) -> ValidationReport:
    """Validate the day before ``run_date``; the report says what failed, ``raise_if_blocked`` acts on it.

    ``item_history`` holds rows of item snapshots with ``snapshot_timestamp``, the item's ``created_at`` and its
    historical features; an item not yet created at its snapshot must not have any.
    """
    bounds = bounds or ValidationBounds()
    day = run_date - timedelta(days=1)
    blank = ValidationReport(dataset=dataset.schema.name, day=day, trailing=(), rows=0, fresh_rows=0, results=())
    unusable = _unusable(dataset, day)
    if unusable is not None:
        return blank.model_copy(update={"results": (unusable,)})
    log = _log(dataset, [day]).collect()
    if log.is_empty():
        return blank.model_copy(update={"results": (_no_rows(day, "0 rows"),)})
    trailing = _trailing(dataset, day, bounds)
    week = _log(dataset, trailing) if trailing else None
    sheets = [
        _log_sheet(dataset, day, log, week, bounds),
        *_cohort_sheets(dataset, log, week, bounds),
        *([] if item_history is None else [_birth_sheet(dataset.schema, item_history)]),
    ]
    results = tuple(result for sheet in sheets for result in sheet.run())
    counts = {"rows": len(log), "fresh_rows": int(log[FRESH].sum())}
    return blank.model_copy(update={"trailing": tuple(trailing), "results": results, **counts})


@dataclass(frozen=True)
class _Check:
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


@dataclass(frozen=True)
class _Sheet:
    """A table and what is expected of it."""

    table: str
    frame: pl.DataFrame
    checks: list[_Check]

    def run(self) -> list[ExpectationResult]:
        import great_expectations as gx
        from great_expectations import expectations
        from great_expectations.data_context.types.base import ProgressBarsConfig

        _quieten("great_expectations")
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
        asset = context.data_sources.add_pandas("memory").add_dataframe_asset(self.table)
        batch = asset.add_batch_definition_whole_dataframe("whole").get_batch({"dataframe": self.frame.to_pandas()})
        built = [
            getattr(expectations, check.expectation)(**check.arguments, meta={"check": number})
            for number, check in enumerate(self.checks)
        ]
        outcome = batch.validate(gx.ExpectationSuite(name=self.table, expectations=built), result_format="SUMMARY")
        # Great Expectations answers in an order of its own.
        by_number = {one.expectation_config.meta["check"]: one for one in cast(list[Any], outcome.results)}
        return [self._result(check, by_number[number]) for number, check in enumerate(self.checks)]

    def _result(self, check: _Check, outcome: Any) -> ExpectationResult:
        return ExpectationResult(
            name=check.name,
            table=self.table,
            column=check.column,
            severity=check.severity,
            success=bool(outcome.success),
            sentence=check.sentence,
            observed=_observed(outcome),
            bound=check.bound,
            examples=_examples(outcome.result.get("partial_unexpected_list", [])),
        )


def _quieten(library: str) -> None:
    """Some of its loggers set a level of their own when they are imported."""
    for name in [library, *logging.root.manager.loggerDict]:
        if name == library or name.startswith(f"{library}."):
            logging.getLogger(name).setLevel(logging.WARNING)


def _observed(outcome: Any) -> str:
    result = outcome.result
    if "observed_value" in result:
        return "no value" if result["observed_value"] is None else _number(float(result["observed_value"]))
    if "unexpected_count" in result:
        return f"{result['unexpected_count']:,} of {result['element_count']:,} rows against it"
    return f"an error: {str(outcome.exception_info)[:200]}"


def _examples(values: list[Any]) -> tuple[str, ...]:
    """The first few that are not null and not the same."""
    return tuple(dict.fromkeys(_example(value) for value in values if value is not None))[:_EXAMPLES]


def _example(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_example(part)}" for name, part in value.items()) + ")"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _unusable(dataset: Dataset, day: date) -> ExpectationResult | None:
    """Why the partition of ``day`` cannot even be looked at."""
    if day not in dataset.days or not dataset.partition(day).exists():
        span = f"{dataset.days[0]} .. {dataset.days[-1]}" if dataset.days else "no day at all"
        return _no_rows(day, f"no partition; the log holds {span}")
    try:
        present = pl.read_parquet_schema(dataset.partition(day))
    except (pl.exceptions.PolarsError, OSError) as error:
        return _no_rows(day, f"a file that is not Parquet ({str(error).splitlines()[0]})")
    missing = [name for name in dataset.schema.impressions if name not in present]
    return _lacking_columns(missing, list(present)) if missing else None


def _no_rows(day: date, observed: str) -> ExpectationResult:
    return ExpectationResult(name="day_has_impressions", table="impressions", column=None, severity=Severity.BLOCKING,
                             success=False, sentence=f"{day} holds impressions to judge and train on",
                             observed=observed, bound="at least 1 row")  # fmt: skip


def _lacking_columns(missing: list[str], present: list[str]) -> ExpectationResult:
    return ExpectationResult(name="columns_present", table="impressions", column=", ".join(missing),
                             severity=Severity.BLOCKING, success=False,
                             sentence="every column of schema.yaml is in the log", observed=f"only {present}",
                             bound="these columns too")  # fmt: skip


def _trailing(dataset: Dataset, day: date, bounds: ValidationBounds) -> list[date]:
    """The days before ``day`` that have something to compare with."""
    wanted = set(days(day - timedelta(days=bounds.trailing_days), day - timedelta(days=1))) & set(dataset.days)
    return _log(dataset, sorted(wanted)).select("day").unique().collect()["day"].sort().to_list() if wanted else []


def _log(dataset: Dataset, wanted: list[date]) -> pl.LazyFrame:
    """The log of ``wanted`` days with each item's age and ``fresh``; rows that only feed history are left out."""
    items = dataset.items().lazy()
    born = pl.coalesce(pl.col(name) for name in (JUDGED_CREATED_AT, CREATED_AT) if name in items.collect_schema())
    births = items.select(ITEM_ID, CREATED_AT, born.alias("born"), pl.lit(1.0).alias(_KNOWN_ITEM))
    fresh_for = timedelta(days=dataset.schema.fresh_days)
    day = timedelta(days=1)
    log = dataset.impressions(wanted)
    if USAGE in log.collect_schema():
        log = log.filter(pl.col(USAGE).fill_null(Usage.ALL) != Usage.HISTORY)
    return log.join(births, on=ITEM_ID, how="left").with_columns(
        ((pl.col(EVENT_TIMESTAMP) - pl.col(CREATED_AT)) / day).alias(ITEM_AGE),
        (pl.col(EVENT_TIMESTAMP) - pl.col("born"))
        .is_between(timedelta(0), fresh_for, "left")
        .fill_null(False)
        .alias(FRESH),
    )


def _log_sheet(
    dataset: Dataset, day: date, log: pl.DataFrame, week: pl.LazyFrame | None, bounds: ValidationBounds
) -> _Sheet:
    schema = dataset.schema
    checks = [*_contract_checks(schema, day, bounds), *_positive_checks(schema, bounds)]
    if week is not None:
        checks += _trailing_checks(schema, week.select(_summary(schema)).collect().row(0, named=True), bounds)
    fresh_labels = [(pl.col(name) * pl.col(FRESH)).alias(_of_fresh(name)) for name in schema.actions]
    columns = [*REQUIRED["impressions"], *schema.actions, ITEM_AGE, FRESH, _KNOWN_ITEM]
    return _Sheet("impressions", log.select(*columns, *fresh_labels), checks)


def _of_fresh(action: str) -> str:
    return f"{action} on fresh items"


def _contract_checks(schema: Schema, day: date, bounds: ValidationBounds) -> Iterator[_Check]:
    block = Severity.BLOCKING
    for name in REQUIRED["impressions"]:
        yield _Check(f"{name}_present", block, f"no impression lacks its {name}", "no null",
                     "ExpectColumnValuesToNotBeNull", {"column": name})  # fmt: skip
    for name in schema.actions:
        yield _Check(f"{name}_is_label", block, f"label {name} is 0, 1 or null (not observed)", "0 or 1",
                     "ExpectColumnValuesToBeInSet", {"column": name, "value_set": [0, 1]})  # fmt: skip
    key = [REQUEST_ID, USER_ID, ITEM_ID, EVENT_TIMESTAMP]
    yield _Check("no_duplicates", block, "no impression is logged twice", f"one row per ({', '.join(key)})",
                 "ExpectCompoundColumnsToBeUnique", {"column_list": key})  # fmt: skip
    start, end = (midnight(border, schema.utc_offset_hours) for border in (day, day + timedelta(days=1)))
    yield _Check("inside_the_day", block, f"every impression happened on {day}", f"{start} up to {end}",
                 "ExpectColumnValuesToBeBetween",
                 {"column": EVENT_TIMESTAMP, "min_value": start, "max_value": end, "strict_max": True})  # fmt: skip
    yield _Check("born_before_shown", block, "no item is shown before it was created", f"{ITEM_AGE} of 0 or more",
                 "ExpectColumnValuesToBeBetween", {"column": ITEM_AGE, "min_value": 0.0})  # fmt: skip
    yield _Check("items_known", Severity.WARNING, "shown items are in the items table",
                 f"at least {bounds.min_known_items:.1%} of rows", "ExpectColumnValuesToNotBeNull",
                 {"column": _KNOWN_ITEM, "mostly": bounds.min_known_items})  # fmt: skip


def _positive_checks(schema: Schema, bounds: ValidationBounds) -> Iterator[_Check]:
    bound, least = f"at least {bounds.min_positives:,}", {"min_value": bounds.min_positives}
    for name in schema.actions:
        yield _Check(f"{name}_has_positives", Severity.BLOCKING, f"somebody did {name}", bound,
                     "ExpectColumnSumToBeBetween", {"column": name, **least})  # fmt: skip
        yield _Check(f"{name}_has_fresh_positives", Severity.WARNING, f"somebody did {name} on a fresh item", bound,
                     "ExpectColumnSumToBeBetween", {"column": _of_fresh(name), **least})  # fmt: skip


def _summary(schema: Schema) -> list[pl.Expr]:
    """Of a log: impressions per day, share of fresh rows, positive rate per action."""
    return [
        (pl.len() / pl.col("day").n_unique()).alias("volume"),
        pl.col(FRESH).mean(),
        *(pl.col(name).cast(pl.Float64).mean() for name in schema.actions),
    ]


def _trailing_checks(schema: Schema, week: dict[str, float | None], bounds: ValidationBounds) -> Iterator[_Check]:
    """The day against ``week``, the :func:`_summary` of the days before it."""
    words = {"volume": "the number of impressions", FRESH: "the share of fresh impressions"}
    for name in ["volume", FRESH, *schema.actions]:
        reference = week[name]
        if not reference:
            continue
        what = words.get(name, f"the positive rate of {name}")
        sentence = f"{what} is like the trailing week's {_number(reference)}"
        target: dict[str, Any] = {} if name == "volume" else {"column": name}
        kind = "ExpectTableRowCountToBeBetween" if name == "volume" else "ExpectColumnMeanToBeBetween"
        for severity, factor in ((Severity.BLOCKING, bounds.block_factor), (Severity.WARNING, bounds.warn_factor)):
            low, high = reference / factor, reference * factor
            limits: dict[str, Any] = {"min_value": low, "max_value": high}
            bound = f"{_number(low)} .. {_number(high)} (a factor of {factor:g})"
            if name == FRESH and severity is Severity.BLOCKING:
                limits, bound = {"min_value": low}, f"at least {_number(low)} (a factor of {factor:g})"
            if name == "volume":
                limits = {key: round(value) for key, value in limits.items()}
            yield _Check(f"{name}_like_trailing_week", severity, sentence, bound, kind, {**target, **limits})


def _cohort_sheets(
    dataset: Dataset, log: pl.DataFrame, week: pl.LazyFrame | None, bounds: ValidationBounds
) -> Iterator[_Sheet]:
    """Content of the items shown today, fresh and warm apart, and today's context columns."""
    if week is None:
        return
    schema, items = dataset.schema, dataset.items().lazy()
    for cohort, is_fresh in ((FRESH, True), (WARM, False)):
        today, before = (
            _filled(schema, "items", Role.CONTENT, items.join(shown.filter(pl.col(FRESH) == is_fresh), on=ITEM_ID))
            for shown in (one.select(ITEM_ID, FRESH).unique() for one in (log.lazy(), week))
        )
        yield from _coverage_sheet(f"{cohort} items", today, before, bounds)
    today, before = (_filled(schema, "impressions", Role.CONTEXT, one) for one in (log.lazy(), week))
    yield from _coverage_sheet("impressions", today, before, bounds)


def _filled(schema: Schema, table: str, role: Role, frame: pl.LazyFrame) -> pl.LazyFrame:
    """The columns of ``role``: 1 where a value is there, null where it is missing or an empty list."""

    def present(name: str) -> pl.Expr:
        lists = schema.table(table)[name].kind in (Kind.MULTI_VALUED, Kind.TEXT, Kind.EMBEDDING)
        there = pl.col(name).list.len() > 0 if lists else pl.col(name).is_not_null()
        return pl.when(there).then(1.0).alias(name)

    return frame.select(present(name) for name, column in schema.table(table).items() if column.role is role)


def _coverage_sheet(
    table: str, today: pl.LazyFrame, before: pl.LazyFrame, bounds: ValidationBounds
) -> Iterator[_Sheet]:
    """``today`` against the coverage ``before``, column by column; nothing where either has too few rows to tell."""
    frame, (filled,) = today.collect(), before.select(pl.len().alias(""), pl.all().count()).collect().to_dicts()
    rows = filled.pop("")
    if min(len(frame), rows) < bounds.min_cohort:
        return
    checks = [
        _Check(f"{name}_covered", severity, f"{name} of {table} is filled as in the trailing week ({count / rows:.1%})",
               f"at least {share * count / rows:.1%}", "ExpectColumnProportionOfNonNullValuesToBeBetween",
               {"column": name, "min_value": share * count / rows})
        for name, count in filled.items()
        if count
        for severity, share in ((Severity.BLOCKING, bounds.block_coverage), (Severity.WARNING, bounds.warn_coverage))
    ]  # fmt: skip
    if checks:
        yield _Sheet(table, frame, checks)


def _birth_sheet(schema: Schema, history: pl.DataFrame) -> _Sheet:
    """A leak shows as history of an item that did not exist at the snapshot's instant."""
    names = [
        feature.name
        for feature in schema.select(Entity.ITEM, Kind.NUMERIC, stored=True)
        if feature.group is Group.HISTORICAL and feature.snapshot
    ]
    missing = [name for name in (ITEM_ID, SNAPSHOT, CREATED_AT, *names) if name not in history.columns]
    if missing:
        raise DataError(f"item_history: columns {missing} are missing, received {history.columns}; pass the rows of "
                        f"item snapshots joined with items.{CREATED_AT}")  # fmt: skip
    unborn = history.filter(pl.col(CREATED_AT) >= pl.col(SNAPSHOT)).select(pl.col(names).cast(pl.Float64))
    checks = [
        _Check(f"{name}_empty_before_birth", Severity.BLOCKING, "an item has no history at or before its creation",
               "0 or null", "ExpectColumnValuesToBeBetween", {"column": name, "min_value": 0.0, "max_value": 0.0})
        for name in names
    ]  # fmt: skip
    return _Sheet("item_history", unborn, checks)


def write_validation_page(report: ValidationReport, path: Path) -> None:
    """One HTML file without outside assets, failures first; written atomically."""
    from jinja2 import Environment

    order = sorted(report.results, key=lambda one: (one.success, one.severity is Severity.WARNING))
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    with atomic_write(path) as temporary:
        temporary.write_text(template.render(report=report, results=order, Severity=Severity), encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data validation {{ report.dataset }} {{ report.day }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .25rem }
.verdict { padding: .75rem 1rem; border-left: .4rem solid #0072b2; background: #eef5fa }
.verdict.blocked { border-color: #b33c00; background: #fdf1ea }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #ddd }
td.state { white-space: nowrap; font-weight: 600 }
.blocking .state { color: #b33c00 } .warning .state { color: #7a5c00 } .passed .state { color: #00593f }
code { font-size: .85em }
@media print { body { margin: 0; max-width: none } }
</style>
</head>
<body>
<h1>Data validation: {{ report.dataset }}, {{ report.day }}</h1>
<p class="verdict {{ '' if report.passed else 'blocked' }}">
{% if report.passed %}
<strong>Passed.</strong> This day may be trained on.
{% else %}
<strong>Blocked.</strong> This day must not be trained on; what serves, if anything, keeps serving.
{% endif %}
{{ report.failures(Severity.BLOCKING) | length }} blocking and {{ report.failures(Severity.WARNING) | length }} warning
failures among {{ results | length }} expectations.
</p>
<p>{{ "{:,}".format(report.rows) }} impressions, {{ "{:,}".format(report.fresh_rows) }} of them of fresh items.
{% if report.trailing %}
Compared with {{ report.trailing | length }} days, {{ report.trailing[0] }} to {{ report.trailing[-1] }}.
{% else %}
The log holds no earlier day of the trailing week, so nothing was compared.
{% endif %}
</p>
<table>
<thead><tr><th>Result</th><th>Expectation</th><th>Where</th><th>Observed</th><th>Expected</th></tr></thead>
<tbody>
{% for one in results %}
<tr class="{{ 'passed' if one.success else one.severity.value }}">
<td class="state">
{{ "✓ passed" if one.success else ("✗ blocks" if one.severity == Severity.BLOCKING else "! warns") }}
</td>
<td>{{ one.sentence }}</td>
<td><code>{{ one.table }}{{ "." ~ one.column if one.column else "" }}</code></td>
<td>{{ one.observed }}{% if one.examples %}<br>e.g. <code>{{ one.examples | join(", ") }}</code>{% endif %}</td>
<td>{{ one.bound }}</td>
</tr>
{% endfor %}
</tbody>
</table>
</body>
</html>
"""
