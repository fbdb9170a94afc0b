"""The report of a run: one offline HTML file, and a table on the terminal. The verdict comes first."""

import json
from base64 import b64encode
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freshrank.evaluation.gate import Decision, Verdict
from freshrank.evaluation.results import (
    ALL,
    FRESH,
    WARM,
    Comparison,
    Difference,
    Evaluation,
    Interval,
    Metric,
    MetricName,
    Threshold,
    Weighting,
)
from freshrank.reports.figures import pictures, row_name
from freshrank.storage.files import write_text

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
HEADLINES = {
    Decision.BLESSED: "Blessed: the challenger may serve",
    Decision.REJECTED: "Rejected: what serves keeps serving",
    Decision.NOT_ENOUGH_EVIDENCE: "Not enough evidence: what serves keeps serving",
}
MARKS = {True: ("✓", "passes"), False: ("✗", "fails"), None: ("?", "open")}
_COLOURS = {Decision.BLESSED: "green", Decision.REJECTED: "red", Decision.NOT_ENOUGH_EVIDENCE: "yellow"}
_LIBRARIES = (
    "freshrank",
    "torch",
    "numpy",
    "polars",
    "duckdb",
    "feast",
    "kfp",
    "apache-airflow",
    "onnxruntime",
    "scikit-learn",
    "great-expectations",
)
_ROW_METRICS = (
    (MetricName.LOG_LOSS, "log loss"),
    (MetricName.PR_AUC, "PR-AUC"),
    (MetricName.AUC, "AUC"),
    (MetricName.ECE, "calibration error (ECE)"),
    (MetricName.CALIBRATION_RATIO, "prediction / observed rate"),
)
_CLOCK_METRICS = (MetricName.HITS, MetricName.LOG_LOSS, MetricName.PR_AUC, MetricName.AUC, MetricName.CALIBRATION_RATIO)
_CLOCKS = (("", "items"), ("age:", "days since creation"), ("exposures:", "impressions since birth"))


class ReportInput(BaseModel):
    """Everything the page shows."""

    dataset: str
    run_date: date
    recipe: str
    verdict: Verdict
    comparison: Comparison
    challenger: Evaluation
    baseline: Evaluation
    baseline_name: str
    """What the challenger was compared with: ``version 4 of 2026-01-06``, ``popularity (nothing served before)``."""
    parameters: int | None = None
    parameter_increase: float | None = None
    """Share, 0.05 = 5%, against the same model without the techniques."""
    training_curve: list[tuple[int, float]] = []
    """(step, loss)."""
    data_facts: dict[str, str | int | float] = {}
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    fingerprints: dict[str, str] = {}
    validation_page: str | None = None
    """Link to the data validation page, relative to the report."""
    data_docs: str | None = None
    """Link to Great Expectations' Data Docs of the day."""


class RunSummary(BaseModel):
    """How a day ended, in the few lines a terminal shows."""

    dataset: str
    run_date: date
    recipe: str = ""
    verdict: Verdict
    comparison: Comparison
    baseline_name: str
    parameter_increase: float | None = None
    served_version: int | None = None
    """What serves after the run; None while nothing does."""
    served_run_date: date | None = None
    deployed: bool = False
    """Whether this run put it there."""
    report: Path | None = None

    @property
    def serving(self) -> str:
        """What serves, and why that is not this run's model where it was blessed."""
        if self.served_version is None:
            return "nothing yet"
        served = f"version {self.served_version}"
        if self.deployed:
            return f"{served} (put there by this run)"
        if self.served_run_date is not None and self.served_run_date > self.run_date:
            return f"{served} of {self.served_run_date} (a later day than this run's, so it stays)"
        return served


def library_versions() -> dict[str, str]:
    """Installed versions of what a model's numbers depend on."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def write_report(path: Path, report: ReportInput) -> None:
    """Render ``report`` to one self-contained HTML file, atomically; equal input gives equal bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATE.parent)
    environment = Environment(
        autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(data_uri=_data_uri, interval=_interval, number=_number, short=_short, signed=_signed)
    page = environment.get_template(TEMPLATE.name).render(
        report=report,
        headline=HEADLINES[report.verdict.verdict],
        marks=MARKS,
        pictures=pictures(report.comparison, report.challenger, report.baseline, report.training_curve),
        differences=[(row_name(row, report.comparison.k), row) for row in report.comparison.rows],
        row_metrics=_row_metrics(report),
        clock_tables=_clock_tables(report),
        thresholds=[(row, _threshold_rows(row)) for row in report.comparison.thresholds],
        row_name=row_name,
        config=json.dumps(report.config, indent=2, sort_keys=True, default=str),
        names=MetricName,
        ALL=ALL,
    )
    write_text(path, page)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()


def _interval(value: Interval | None, sign: str = "") -> str:
    return "—" if value is None else f"{value.value:{sign}.4f} ({value.low:{sign}.4f} to {value.high:{sign}.4f})"


def _signed(value: Interval | None) -> str:
    return _interval(value, "+")


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:,.4f}"


def _short(value: float | None) -> str:
    return "—" if value is None else f"{value:,.3f}"


def _row_metrics(report: ReportInput) -> list[dict[str, Any]]:
    return [
        {
            "action": action,
            "label": label,
            "cells": [
                evaluation.get(metric, name, action)
                for name in (FRESH, WARM)
                for evaluation in (report.baseline, report.challenger)
            ],
        }
        for action in report.challenger.utilities
        for metric, label in _ROW_METRICS
    ]


def _clock_tables(report: ReportInput) -> list[dict[str, Any]]:
    """Per action, per clock, per bucket: the metrics of both models, per impression and per item."""
    return [
        {"action": action, "clocks": [(label, _clock_rows(report, action, prefix)) for prefix, label in _CLOCKS]}
        for action in report.challenger.utilities
    ]


def _clock_rows(report: ReportInput, action: str, prefix: str) -> list[dict[str, Any]]:
    names = [n for n in report.challenger.slices if (n.startswith(prefix) if prefix else ":" not in n)]
    return [
        {
            "name": name.removeprefix(prefix),
            "support": report.challenger.get(MetricName.LOG_LOSS, name, action).support,
            "cells": [_both(report, metric, name, action, by) for metric in _CLOCK_METRICS for by in Weighting],
        }
        for name in names
    ]


def _both(report: ReportInput, metric: MetricName, name: str, action: str, by: Weighting) -> tuple[Metric, Metric]:
    return report.challenger.get(metric, name, action, by), report.baseline.get(metric, name, action, by)


def _threshold_rows(threshold: Threshold) -> list[Difference]:
    """The averages of Hits@k and the log loss of every action; Hits@k per action is in ``comparison.json`` only."""
    return [row for row in threshold.differences if row.action is None or row.metric is MetricName.LOG_LOSS]


def _headline_rows(comparison: Comparison) -> list[tuple[str, Difference]]:
    wanted = ((FRESH, MetricName.HITS), (FRESH, MetricName.MATCHED_HITS), (ALL, MetricName.HITS))
    rows = [comparison.get(metric, slice) for slice, metric in wanted]
    return [(row_name(row, comparison.k), row) for row in rows]


def print_summary(summary: RunSummary, console: Console | None = None) -> None:
    """Verdict, what stood in its way, Hits@k of both models, what serves, where the report is."""
    console = console or Console()
    decision = summary.verdict.verdict
    console.print()
    console.print(Text(HEADLINES[decision], style=f"bold {_COLOURS[decision]}"))
    console.print(_unmet_checks(summary.verdict))
    console.print(_table(summary))
    for label, value in _facts(summary):
        console.print(Text(f"{label:<11} {value}"), soft_wrap=True)


def _unmet_checks(verdict: Verdict) -> Table:
    grid = Table.grid(padding=(0, 1))
    for reason in verdict.unmet_checks:
        mark, word = MARKS[reason.passed]
        grid.add_row(f" {mark}", word, Text(reason.sentence))
    passed = len(verdict.reasons) - len(verdict.unmet_checks)
    grid.add_row(f" {MARKS[True][0]}", "passes", Text(f"{passed} of {len(verdict.reasons)} checks."))
    return grid


def _table(summary: RunSummary) -> Table:
    table = Table(
        "",
        "baseline",
        "challenger",
        "difference",
        "lists",
        box=SIMPLE_HEAD,
        title=Text(f"{summary.dataset} {summary.run_date}, {summary.comparison.confidence:.0%} intervals"),
        title_justify="left",
        padding=(0, 1),
    )
    for name, row in _headline_rows(summary.comparison):
        values = [f"{interval.value:.4f}" if interval else "—" for interval in (row.baseline, row.challenger)]
        table.add_row(name, *values, _signed(row.difference), f"{row.lists:,}")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    return table


def _facts(summary: RunSummary) -> list[tuple[str, str]]:
    increase = summary.parameter_increase
    return [
        ("baseline", summary.baseline_name),
        ("parameters", "unknown" if increase is None else f"{increase:+.2%} against the model without techniques"),
        ("serving", summary.serving),
        ("report", str(summary.report or "none")),
    ]
