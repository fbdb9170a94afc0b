"""The report and the terminal summary: whole, offline, the verdict first, and nothing invented where data lacks."""

import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from freshrank.config import EvaluationConfig, GateConfig, RunConfig
from freshrank.evaluation.evaluate import compare, evaluate
from freshrank.evaluation.gate import Decision, judge
from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.evaluation.results import MetricName
from freshrank.evaluation.threshold_sweep import with_thresholds
from freshrank.evaluation.warm_up_curve import with_warm_up
from freshrank.reports.report import (
    ReportInput,
    RunSummary,
    library_versions,
    print_summary,
    write_report,
)
from tests.judging import logit, schema_of, with_logits, world

pytestmark = pytest.mark.integration

SCHEMA = schema_of()
CONFIG = EvaluationConfig(bootstrap=100)
CHALLENGER = world(lists=300)
NOISE = np.random.default_rng(0).normal(size=CHALLENGER.labels.shape)
CHAMPION = with_logits(CHALLENGER, logit(CHALLENGER.probabilities) + NOISE, SCHEMA.utilities)


def report_of(challenger: JudgedRows = CHALLENGER, champion: JudgedRows = CHAMPION) -> ReportInput:
    comparison = compare(challenger, champion, SCHEMA, CONFIG)
    comparison = with_thresholds(comparison, challenger, champion, SCHEMA, CONFIG)
    evaluation, baseline = (
        with_warm_up(evaluate(judged, SCHEMA, CONFIG), judged, SCHEMA, CONFIG) for judged in (challenger, champion)
    )
    return ReportInput(
        dataset="tiny",
        run_date=date(2026, 1, 7),
        recipe="warmer-for-less",
        verdict=judge(comparison, evaluation, GateConfig(), 0.0496),
        comparison=comparison,
        challenger=evaluation,
        baseline=baseline,
        baseline_name="version 4 of 2026-01-06",
        parameters=546_000,
        parameter_increase=0.0496,
        training_curve=[(step, 0.7 / (1 + step / 50)) for step in range(0, 500, 5)],
        data_facts={"training rows": 132_151, "fresh share of training": 0.005, "days": "2025-12-10 .. 2026-01-04"},
        config=RunConfig().model_dump(mode="json"),
        versions=library_versions(),
        fingerprints={"data": "0123456789abcdef", "model": "fedcba9876543210"},
        validation_page="validation.html",
    )


class _Page(HTMLParser):
    """What the tests ask of a page: references, alternative texts, whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.alts: list[str | None] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.references += [value for key in ("src", "href") if (value := named.get(key))]
        if tag == "img":
            self.alts.append(named.get("alt"))
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, report_of())
    return path.read_text()


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    """All pictures are inline; the one link leads to the validation page beside it."""
    outside = [reference for reference in _Page(page).references if not reference.startswith("data:image/svg+xml")]
    assert outside == ["validation.html"]
    assert not re.search(r"<script|@import|url\(", page)


def test_the_markup_is_balanced_and_every_picture_has_words(page: str) -> None:
    """Screen readers get the numbers of each of the eight pictures: the warm-up has one per action."""
    parsed = _Page(page)
    assert parsed.open == []
    assert len(parsed.alts) == 8
    assert all(alt and re.search(r"\d", alt) and "nan" not in alt for alt in parsed.alts)


def test_the_verdict_comes_before_any_table(page: str) -> None:
    """Then Hits@3, then the checks."""
    places = [
        page.index(text) for text in ("Blessed: the challenger may serve", "<h2>Hits@3", "Every check", "Pictures")
    ]
    assert places == sorted(places)


def test_every_reason_and_every_difference_is_on_the_page(page: str) -> None:
    """Nothing that led to the verdict is left out."""
    report = report_of()
    text = page.replace("&#39;", "'").replace("&gt;", ">")
    assert all(reason.sentence in text for reason in report.verdict.reasons)
    assert all(f"{row.difference.value:+.4f}" in page for row in report.comparison.rows if row.difference)


def test_every_bucket_is_given_per_impression_and_per_item(page: str) -> None:
    """A table per action; the numbers stand side by side."""
    section = page[page.index("per impression and per item</h2>") : page.index("<h2>Pictures")]
    assert [re.sub(r"\s+", "", name) for name in re.findall(r"<summary>(.*?)</summary>", section)] == ["click", "save"]
    evaluation = report_of().challenger
    for row in evaluation.metrics:
        if row.action and row.metric in (MetricName.HITS, MetricName.LOG_LOSS, MetricName.AUC):
            assert f">{row.value:,.3f}<small>" in section


def test_every_threshold_of_fresh_is_on_the_page(page: str) -> None:
    """Half, the schema's own, and double, each with its differences."""
    places = [page.index(f"younger than {days} days") for days in ("3.5", "7", "14")]
    assert places == sorted(places)
    for threshold in report_of().comparison.thresholds:
        for row in (threshold.get(MetricName.MATCHED_HITS), threshold.get(MetricName.LOG_LOSS, "save")):
            assert row.difference is not None
            assert f"{row.difference.value:+.4f} ({row.difference.low:+.4f}" in page


def test_the_warm_up_names_the_bucket_from_which_an_item_is_warm(page: str) -> None:
    """For the curves whose buckets can be compared."""
    curves = [c for c in report_of().challenger.warm_up if c.metric is MetricName.AUC]
    assert len(curves) == 2
    assert all(f"AUC challenger {c.warm_from}, baseline" in page for c in curves)


def test_the_same_input_gives_the_same_bytes(page: str, tmp_path: Path) -> None:
    """A re-run of a day writes the very same file."""
    write_report(tmp_path / "again.html", report_of())
    assert (tmp_path / "again.html").read_text() == page


def test_names_from_the_data_are_escaped(tmp_path: Path) -> None:
    """A dataset called <b> is text."""
    write_report(tmp_path / "r.html", report_of().model_copy(update={"dataset": "<b>bold"}))
    assert "<b>bold" not in (tmp_path / "r.html").read_text()


def _lacking(what: str) -> ReportInput:
    if what == "finite predictions":
        return report_of(replace(CHALLENGER, probabilities=np.full_like(CHALLENGER.probabilities, np.nan)))
    old = replace(CHALLENGER, age_days=CHALLENGER.age_days + 100)
    empty = JudgedRows(**{name: value[:0] for name, value in vars(CHALLENGER).items()})
    return report_of(old, old) if what == "fresh items" else report_of(empty, empty)


@pytest.mark.parametrize("what", ["finite predictions", "fresh items", "rows"])
def test_a_day_that_lacks_data_still_gets_its_page(what: str, tmp_path: Path) -> None:
    """It says what is missing; no value is made up."""
    report = _lacking(what)
    write_report(tmp_path / "r.html", report)
    text = (tmp_path / "r.html").read_text()
    assert report.verdict.verdict is not Decision.BLESSED
    assert ">nan<" not in text
    assert "None" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)
    assert _Page(text).open == []


def summary_of(report: ReportInput) -> RunSummary:
    return RunSummary(
        dataset=report.dataset,
        run_date=report.run_date,
        recipe=report.recipe,
        verdict=report.verdict,
        comparison=report.comparison,
        baseline_name=report.baseline_name,
        parameter_increase=report.parameter_increase,
        served_version=5,
        deployed=True,
        report=Path("runs/report.html"),
    )


def test_the_terminal_shows_verdict_hits_parameters_version_and_report() -> None:
    """In 100 columns."""
    console = Console(width=100, record=True, file=StringIO())
    print_summary(summary_of(report_of()), console)
    text = console.export_text()
    wanted = ("Blessed", "fresh Hits@3", "all Hits@3", "+4.96%", "version 5", "runs/report.html")
    assert all(part in text for part in wanted), text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "version 5 (put there by this run)"),
        ({"deployed": False}, "version 5"),
        ({"deployed": False, "served_version": None}, "nothing yet"),
        (
            {"deployed": False, "served_run_date": date(2026, 1, 9)},
            "version 5 of 2026-01-09 (a later day than this run's, so it stays)",
        ),
        ({"deployed": False, "served_run_date": date(2026, 1, 6)}, "version 5"),
    ],
)
def test_what_serves_is_told_with_the_reason_why_it_stays(change: dict[str, Any], sentence: str) -> None:
    """The run is of 2026-01-07."""
    assert summary_of(report_of()).model_copy(update=change).serving == sentence


def test_the_terminal_names_what_stood_in_the_way() -> None:
    """The sentences of the checks that did not pass, and only those."""
    inverted = with_logits(CHALLENGER, -logit(CHALLENGER.probabilities), SCHEMA.utilities)
    rejected = report_of(inverted)
    console = Console(width=400, record=True, file=StringIO())
    print_summary(summary_of(rejected), console)
    lines = [line.strip() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == "Rejected: what serves keeps serving"
    told = [line.split(maxsplit=2)[2] for line in lines[1:] if line[0] in "✗?"]
    assert told == [r.sentence for r in rejected.verdict.unmet_checks]
