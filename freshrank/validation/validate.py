"""May this day be trained on? The newest day against its contract and the week before it, with Great Expectations.

What is expected is generated in :mod:`freshrank.validation.expectations`; an expectation that blocks stops the run,
one that warns is written down. Summary results only: they carry a few offending values, not all of them.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, cast

import polars as pl
from pydantic import BaseModel, ConfigDict

from freshrank.config import Severity, ValidationConfig
from freshrank.datasets.checks import IMPRESSION_KEY
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.mappings import Texts
from freshrank.dates import days, midnight
from freshrank.errors import ValidationFailed
from freshrank.schema import EVENT_TIMESTAMP, ITEM_ID, USAGE, Usage
from freshrank.validation.expectations import (
    FRESH,
    UNKNOWN_ITEM,
    Check,
    Coverage,
    Sheet,
    birth_names,
    judged_log,
    number,
    refuse_unknown,
    sheets,
)

RESULT_FORMAT = "SUMMARY"
_MESSAGE_LINES = 8
_EXAMPLES = 5


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
    trailing: tuple[date, ...] = ()
    """The days that made the reference."""
    rows: int = 0
    fresh_rows: int = 0
    results: tuple[ExpectationResult, ...] = ()
    switched_off: tuple[str, ...] = ()
    """Names of the expectations that the configuration leaves out."""
    unasked: tuple[str, ...] = ()
    """Names of the expectations about features that could not be asked, because none are built."""
    coverage: tuple[Coverage, ...] = ()
    """Content by cohort and age, context and labels; not all of it is judged."""
    day_counts: dict[str, int] = {}
    """Of the day's partition: rows that are logged twice, late, not judged."""
    import_counts: dict[str, int] = {}
    """What the import of the whole log mended or let pass."""

    def failures(self, severity: Severity) -> list[ExpectationResult]:
        return [result for result in self.results if result.severity is severity and not result.success]

    @property
    def notes(self) -> list[str]:
        """What was not compared or not asked, a sentence each."""
        alone = "The log holds no earlier day of the trailing week, so nothing was compared."
        unasked = (
            f"{len(self.unasked)} expectations about features were not asked: features of the week before "
            f"{self.day + timedelta(days=1)} are not built; run `freshrank features build` first."
        )
        return [note for note, applies in ((alone, not self.trailing), (unasked, self.unasked)) if applies]

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
        hint = "Fix the day's data and import it again; the served model, if any, keeps serving."
        return "\n".join([head, *lines, hint])


@dataclass(frozen=True)
class Validation:
    """The validation report, with Great Expectations' own results."""

    report: ValidationReport
    suites: dict[str, Any] = field(default_factory=dict)
    """By table the ``ExpectationSuiteValidationResult``; empty where the day cannot be looked at."""
    sheets: list[Sheet] = field(default_factory=list)
    """What was asked of which table."""


def validate_day(
    dataset: Dataset,
    run_date: date,
    item_history: pl.DataFrame | None = None,
    config: ValidationConfig | None = None,
) -> ValidationReport:
    """Validate the day before ``run_date``; the report says what failed, ``raise_if_blocked`` acts on it.

    ``item_history`` holds rows of item snapshots with ``snapshot_timestamp``, the item's ``created_at`` and its
    historical features; an item not yet created at its snapshot must not have any.

    Raises:
        ConfigError: ``config.severity`` names an expectation that this schema does not have.
        DataError: ``item_history`` lacks a column.
    """
    return inspect_day(dataset, run_date, item_history, config).report


def inspect_day(
    dataset: Dataset,
    run_date: date,
    item_history: pl.DataFrame | None = None,
    config: ValidationConfig | None = None,
) -> Validation:
    """:func:`validate_day` with Great Expectations' own results beside the report."""
    config = config or ValidationConfig()
    refuse_unknown(dataset.schema, config)
    day = run_date - timedelta(days=1)
    unusable = _unusable(dataset, day)
    report = ValidationReport(
        dataset=dataset.schema.name,
        day=day,
        day_counts={} if unusable else _day_counts(dataset, day),
        import_counts=dataset.manifest.get("counts", {}),
        switched_off=tuple(name for name, severity in config.severity.items() if severity == "off"),
        unasked=() if item_history is not None else birth_names(dataset.schema),
    )
    log = None if unusable else judged_log(dataset, [day], config).collect()
    if log is None or log.is_empty():
        return Validation(report.model_copy(update={"results": (unusable or _no_rows(day, "0 rows"),)}))
    trailing = _trailing(dataset, day, config)
    asked = sheets(dataset, day, log, judged_log(dataset, trailing, config) if trailing else None, item_history, config)
    suites = run_suites(asked)
    texts = dataset.texts()
    summary = {
        "trailing": tuple(trailing),
        "rows": len(log),
        "fresh_rows": int(log[FRESH].sum()),
        "results": tuple(result for sheet in asked for result in _results(sheet, suites, texts)),
        "coverage": tuple(one for sheet in asked for one in sheet.coverage),
    }
    return Validation(report.model_copy(update=summary), suites, asked)


def run_suites(asked: Sequence[Sheet], result_format: str = RESULT_FORMAT) -> dict[str, Any]:
    """By table what Great Expectations finds, on pandas; a table of which nothing is expected is left out."""
    source = quiet_context().data_sources.add_pandas("memory")
    return {
        sheet.table: source.add_dataframe_asset(sheet.table)
        .add_batch_definition_whole_dataframe("whole")
        .get_batch({"dataframe": sheet.frame.to_pandas()})
        .validate(suite_of(sheet), result_format=result_format)
        for sheet in asked
        if sheet.checks
    }


def quiet_context() -> Any:
    """Great Expectations in memory, without progress bars and chatter."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    _quieten("great_expectations")
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    return context


def suite_of(sheet: Sheet) -> Any:
    """The ``ExpectationSuite`` of a table; each expectation knows its place in ``sheet.checks``."""
    import great_expectations as gx

    built = [_expectation(check, place) for place, check in enumerate(sheet.checks)]
    return gx.ExpectationSuite(name=sheet.table, expectations=built)


def _expectation(check: Check, place: int) -> Any:
    from great_expectations import expectations

    return getattr(expectations, check.expectation)(**check.arguments, meta={"check": place})


def outcomes(sheet: Sheet, suite: Any) -> list[Any]:
    """Great Expectations answers in an order of its own; this is that of ``sheet.checks``."""
    by_place = {one.expectation_config.meta["check"]: one for one in cast(list[Any], suite.results)}
    return [by_place[place] for place in range(len(sheet.checks))]


def _results(sheet: Sheet, suites: dict[str, Any], texts: Texts) -> Iterator[ExpectationResult]:
    if sheet.checks:
        for check, outcome in zip(sheet.checks, outcomes(sheet, suites[sheet.table]), strict=True):
            yield _result(sheet.table, check, outcome, texts)


def _result(table: str, check: Check, outcome: Any, texts: Texts) -> ExpectationResult:
    return ExpectationResult(
        name=check.name,
        table=table,
        column=check.column,
        severity=check.severity,
        success=bool(outcome.success),
        sentence=check.sentence,
        observed=_observed(outcome),
        bound=check.bound,
        examples=_examples(check.column, outcome.result.get("partial_unexpected_list", []), texts),
    )


def _quieten(library: str) -> None:
    """Some of its loggers set a level of their own when they are imported."""
    for name in [library, *logging.root.manager.loggerDict]:
        if name == library or name.startswith(f"{library}."):
            logging.getLogger(name).setLevel(logging.WARNING)


def _observed(outcome: Any) -> str:
    result = outcome.result
    if "observed_value" in result:
        return "no value" if result["observed_value"] is None else number(float(result["observed_value"]))
    if "unexpected_count" in result:
        return f"{result['unexpected_count']:,} of {result['element_count']:,} rows against it"
    return f"an error: {str(outcome.exception_info)[:200]}"


def _examples(column: str | None, values: list[Any], texts: Texts) -> tuple[str, ...]:
    """The first few that are not null and not the same, ids and categories as the log has them."""
    named = ITEM_ID if column == UNKNOWN_ITEM else column
    examples = (_example(named, value, texts) for value in values if value is not None and value == value)
    return tuple(dict.fromkeys(examples))[:_EXAMPLES]


def _example(column: str | None, value: Any, texts: Texts) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_example(name, part, texts)}" for name, part in value.items()) + ")"
    text = texts.decode(column, value)
    return number(text) if isinstance(text, float) else str(text)


def _unusable(dataset: Dataset, day: date) -> ExpectationResult | None:
    """Why the partition of ``day`` cannot be validated at all."""
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
    return ExpectationResult(
        name="day_has_impressions",
        table="impressions",
        column=None,
        severity=Severity.BLOCKING,
        success=False,
        sentence=f"{day} holds impressions to judge and train on",
        observed=observed,
        bound="at least 1 row",
    )


def _lacking_columns(missing: list[str], present: list[str]) -> ExpectationResult:
    return ExpectationResult(
        name="columns_present",
        table="impressions",
        column=", ".join(missing),
        severity=Severity.BLOCKING,
        success=False,
        sentence="every column of schema.yaml is in the log",
        observed=f"only {present}",
        bound="these columns too",
    )


def _day_counts(dataset: Dataset, day: date) -> dict[str, int]:
    """Rows of the day's partition by what is remarkable about them; rows that only feed history count here too."""
    log, at = dataset.impressions([day]), pl.col(EVENT_TIMESTAMP)
    offset = dataset.schema.utc_offset_hours
    usage = pl.col(USAGE) == Usage.HISTORY if USAGE in log.collect_schema() else pl.lit(False)
    counts = {
        "rows in the partition": pl.len(),
        "rows that only feed history (not judged)": usage.sum(),
        "rows that repeat an earlier one": pl.len() - pl.struct(IMPRESSION_KEY).n_unique(),
        "late rows (of an earlier day)": (at < midnight(day, offset)).sum(),
        "early rows (of a later day)": (at >= midnight(day + timedelta(days=1), offset)).sum(),
    }
    row = log.select(value.alias(name) for name, value in counts.items()).collect().row(0, named=True)
    imported = dataset.manifest["days"][day.isoformat()].get("rows", 0)
    return {"rows that the import wrote": imported} | {name: int(value or 0) for name, value in row.items()}


def _trailing(dataset: Dataset, day: date, config: ValidationConfig) -> list[date]:
    """The days before ``day`` that have something to compare with."""
    wanted = set(days(day - timedelta(days=config.trailing_days), day - timedelta(days=1))) & set(dataset.days)
    if not wanted:
        return []
    return judged_log(dataset, sorted(wanted), config).select("day").unique().collect()["day"].sort().to_list()
