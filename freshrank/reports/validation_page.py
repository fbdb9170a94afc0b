"""The pages of a validation: our own, and Great Expectations' Data Docs beside it, both offline.

VALIDATION/validation.html
VALIDATION/data_docs/index.html, <table>.html
"""

import re
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

from freshrank.config import Severity
from freshrank.storage.files import atomic_directory, write_text
from freshrank.validation.validate import Validation, ValidationReport

PAGE, DOCS = "validation.html", "data_docs/index.html"
_TEMPLATES = Path(__file__).parent / "templates"


def write_pages(inspected: Validation, directory: Path) -> None:
    """``validation.html`` and ``data_docs/`` in ``directory``, each written atomically and linked with the other."""
    write_data_docs(inspected, directory / "data_docs")
    write_validation_page(inspected.report, directory / PAGE, DOCS)


def write_validation_page(report: ValidationReport, path: Path, docs: str | None = None) -> None:
    """One HTML file without outside assets, failures first; ``docs`` is where its link to the Data Docs leads."""
    order = sorted(report.results, key=lambda one: (one.success, one.severity is Severity.WARNING))
    page = _environment().get_template("validation.html.j2")
    cohorts = list(dict.fromkeys(one.table for one in report.coverage))
    text = page.render(
        report=report, results=order, Severity=Severity, docs=docs, cohorts=cohorts, coverage=_coverage(report)
    )
    write_text(path, text)


def _coverage(report: ValidationReport) -> dict[str, dict[str, str]]:
    """Cells by column and cohort."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for one in report.coverage:
        today, before = ("—" if share is None else f"{share:.1%}" for share in (one.share, one.reference))
        cells[one.column][one.table] = f"{today} ({before}) of {one.rows:,}"
    return dict(cells)


def write_data_docs(inspected: Validation, directory: Path) -> None:
    """Great Expectations' page of each table and an index, as a whole or not at all."""
    view = _offline_view()
    files = {table: re.sub(r"[^a-z0-9]+", "_", table.lower()) + ".html" for table in inspected.suites}
    index = _environment().get_template("data_docs_index.html.j2")
    pages = [(table, files[table], suite) for table, suite in inspected.suites.items()]
    with atomic_directory(directory) as temporary:
        for table, suite in inspected.suites.items():
            (temporary / files[table]).write_text(_rendered(view, table, suite), encoding="utf-8")
        text = index.render(report=inspected.report, pages=pages, back=f"../{PAGE}")
        (temporary / "index.html").write_text(text, encoding="utf-8")


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader

    return Environment(autoescape=True, loader=FileSystemLoader(_TEMPLATES), trim_blocks=True, lstrip_blocks=True)


def _rendered(view: Any, table: str, suite: Any) -> str:
    from great_expectations.render.renderer.page_renderer import ValidationResultsPageRenderer

    document = ValidationResultsPageRenderer().render(_readable(suite))
    # Of the overview the statistics alone: its links lead to pages that are not here.
    overview = document.sections[0]
    overview.content_blocks = overview.content_blocks[1:2]
    return str(view.render(document, "data_docs_page.html.j2", table=table))


def _readable(suite: Any) -> Any:
    """A copy with numbers of Python: the renderer takes their text, which of numpy's since 2.0 is no number."""
    copied = deepcopy(suite)
    for outcome in copied.results:
        observed = outcome.result.get("observed_value")
        if hasattr(observed, "item"):
            outcome.result["observed_value"] = observed.item()
    return copied


def _offline_view() -> Any:
    """Great Expectations' own view and blocks in a frame of ours: its own loads styles and scripts from elsewhere."""
    from great_expectations.render.view.view import DefaultJinjaPageView

    return DefaultJinjaPageView(custom_views_directory=str(_TEMPLATES))
