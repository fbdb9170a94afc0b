"""`freshrank bench validation`: how long a day of a million rows takes to validate, and on which engine.

The tables and expectations are those of :func:`freshrank.validation.validate.inspect_day` for the last day of a
simulated world.
Each engine gets them in turn, several times, loading included; then once more with faults put in, because an engine
that answers quickly and finds nothing is no engine. Import time stands apart: it is paid once a process.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl
from pydantic import BaseModel, Field
from rich.console import Console

from freshrank.bench.measure import environment, machine
from freshrank.datasets.dataset import MANIFEST
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.features.snapshots import build_history
from freshrank.pipeline.run import Run
from freshrank.pipeline.steps import item_history
from freshrank.reports.report import library_versions
from freshrank.reports.style import BLUE, GREY, INK, STYLE, VERMILION
from freshrank.reports.validation_page import write_pages
from freshrank.storage.files import atomic_write, write_json
from freshrank.validation.expectations import Sheet
from freshrank.validation.validate import RESULT_FORMAT, inspect_day, outcomes, quiet_context, run_suites, suite_of

TARGET_SECONDS = 10.0
FORMATS = ("BOOLEAN_ONLY", "SUMMARY", "COMPLETE")
OURS = f"pandas, {RESULT_FORMAT}"
FAULTS = {
    "five rows twice": "no_duplicates",
    "three labels of 7": "click_is_label",
    "two rows without a user": "user_id_present",
    "ten rows of the day before": "inside_the_day",
}
"""What is put in, and the expectation that is to find it."""

Engine = Callable[[Sequence[Sheet]], dict[str, Any]]


class ValidationPlan(BaseModel):
    """What is measured."""

    rows: int = Field(default=1_000_000, ge=1_000)
    """Impressions of each day."""
    trailing_days: int = Field(default=7, ge=1)
    repeats: int = Field(default=3, ge=1)


class EngineResult(BaseModel):
    """One engine on the same tables."""

    seconds: list[float]
    agreeing: int
    """Expectations, of all with the faults put in, whose verdict is that of our engine."""
    errors: int
    """Expectations that could not be evaluated."""
    found: list[str]
    """Of :data:`FAULTS`."""
    shows_values: bool
    """Whether a failure names a few of the values that broke it."""

    @property
    def median(self) -> float:
        return median(self.seconds)


class ValidationBench(BaseModel):
    """The JSON file of a run, e.g. ``docs/bench/validation.json``."""

    plan: ValidationPlan
    machine: dict[str, str]
    versions: dict[str, str]
    import_seconds: float
    """Of Great Expectations, in a process of its own."""
    expectations: int
    tables: dict[str, int]
    """Rows by table."""
    day_seconds: list[float]
    """Reading the day and the days before it, counting, and all expectations on our engine."""
    page_seconds: list[float]
    """Our page and the Data Docs."""
    engines: dict[str, EngineResult]

    @property
    def passed(self) -> bool:
        """A day validates in time, with every fault found."""
        return median(self.day_seconds) <= TARGET_SECONDS and len(self.engines[OURS].found) == len(FAULTS)

    def sentences(self) -> list[str]:
        """What was found, for a person."""
        lines = [
            f"{self.plan.rows:,} rows and {self.plan.trailing_days} days before them, {self.expectations} expectations "
            f"of {len(self.tables)} tables: {median(self.day_seconds):.1f} s (target: {TARGET_SECONDS:g} s), pages "
            f"{median(self.page_seconds):.1f} s; Great Expectations is imported in {self.import_seconds:.1f} s"
        ]
        lines += [
            f"{name}: {one.median:.1f} s ({min(one.seconds):.1f} to {max(one.seconds):.1f}), "
            f"{one.agreeing} of {self.expectations} verdicts as ours, {one.errors} errors, "
            f"{len(one.found)} of {len(FAULTS)} faults found"
            for name, one in self.engines.items()
        ]
        return lines


def validation(home: Path, plan: ValidationPlan, out: Path, console: Console) -> ValidationBench:
    """Measure, write ``out`` (JSON) and the picture beside it.

    The simulated world and a workspace of its own are kept under ``home``.
    """
    console.print("import of Great Expectations ...")
    imported = _import_seconds()
    with environment(HOME=str(home / "workspace")):
        run, history = _world(home, plan, console)
        asked = [sheet for sheet in inspect_day(run.dataset, run.date, history).sheets if sheet.checks]
        day_seconds, page_seconds = _whole_days(run, history, plan, console)
    result = ValidationBench(
        plan=plan,
        machine=machine(),
        versions=library_versions(),
        import_seconds=imported,
        expectations=sum(len(sheet.checks) for sheet in asked),
        tables={sheet.table: len(sheet.frame) for sheet in asked},
        day_seconds=day_seconds,
        page_seconds=page_seconds,
        engines=compare(engines(), asked, plan.repeats, console),
    )
    write_json(out, result.model_dump(mode="json"))
    write_picture(result, out.with_suffix(".png"))
    return result


def _import_seconds() -> float:
    code = "import time; start = time.perf_counter(); import great_expectations; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def _world(home: Path, plan: ValidationPlan, console: Console) -> tuple[Run, pl.DataFrame | None]:
    """The run after the last day of a world of ``plan``, with the snapshots its leak detector reads."""
    world = WorldConfig(
        days=plan.trailing_days + 1,
        impressions_per_day=plan.rows,
        users=max(50, plan.rows // 20),
        items_at_start=max(200, plan.rows // 50),
        new_items_per_day=max(20, plan.rows // 1_000),
    )
    path = home / f"{plan.rows}x{world.days}"
    if not (path / MANIFEST).exists():
        console.print(f"simulating {world.days} days of {plan.rows:,} rows ...")
        simulate(path, world)
    run_date = world.last_day + timedelta(days=1)
    run = Run(path, run_date.isoformat())
    build_history(run.dataset, run.workspace, [world.last_day, run_date])
    return run, item_history(run)


def _whole_days(
    run: Run, history: pl.DataFrame | None, plan: ValidationPlan, console: Console
) -> tuple[list[float], list[float]]:
    days, pages = [], []
    for _ in range(plan.repeats):
        started = time.perf_counter()
        outcome = inspect_day(run.dataset, run.date, history)
        days.append(time.perf_counter() - started)
        with tempfile.TemporaryDirectory() as directory:
            started = time.perf_counter()
            write_pages(outcome, Path(directory))
            pages.append(time.perf_counter() - started)
        console.print(f"a whole day: {days[-1]:.1f} s")
    return days, pages


def engines() -> dict[str, Engine]:
    """Those that can run here: pandas in each result format, SQLite, and Spark where pyspark imports."""
    available: dict[str, Engine] = {
        f"pandas, {result_format}": partial(run_suites, result_format=result_format) for result_format in FORMATS
    }
    available[f"SQLite, {RESULT_FORMAT}"] = _on_sqlite
    with suppress(ImportError):
        import pyspark  # noqa: F401

        available[f"Spark, {RESULT_FORMAT}"] = _on_spark
    return available


def _on_sqlite(asked: Sequence[Sheet]) -> dict[str, Any]:
    """Tables loaded into a file, then queried."""
    from sqlalchemy import create_engine

    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/day.db"
        database = create_engine(url)
        # Great Expectations does not quote names of tables.
        tables = {sheet.table: f"table{place}" for place, sheet in enumerate(asked)}
        for sheet in asked:
            sheet.frame.to_pandas().to_sql(tables[sheet.table], database, index=False)
        database.dispose()
        source = quiet_context().data_sources.add_sqlite("file", connection_string=url)
        return {
            sheet.table: source.add_table_asset(sheet.table, table_name=tables[sheet.table])
            .add_batch_definition_whole_table("whole")
            .get_batch()
            .validate(suite_of(sheet), result_format=RESULT_FORMAT)
            for sheet in asked
        }


def _on_spark(asked: Sequence[Sheet]) -> dict[str, Any]:
    """Tables read from Parquet by a local session, which is kept from one call to the next."""
    from pyspark.sql import SparkSession

    session = SparkSession.builder.master("local[*]").config("spark.ui.enabled", "false").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    with tempfile.TemporaryDirectory() as directory:
        source = quiet_context().data_sources.add_spark("spark")
        validated: dict[str, Any] = {}
        for sheet in asked:
            path = f"{directory}/{len(validated)}.parquet"
            sheet.frame.write_parquet(path)
            batch = (
                source.add_dataframe_asset(sheet.table)
                .add_batch_definition_whole_dataframe("whole")
                .get_batch({"dataframe": session.read.parquet(path)})
            )
            validated[sheet.table] = batch.validate(suite_of(sheet), result_format=RESULT_FORMAT)
    return validated


def compare(
    running: dict[str, Engine], asked: Sequence[Sheet], repeats: int, console: Console
) -> dict[str, EngineResult]:
    """Every engine ``repeats`` times in turn on ``asked``, then once on the same tables with :data:`FAULTS`."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(repeats):
        for name, engine in running.items():
            started = time.perf_counter()
            engine(asked)
            seconds[name].append(time.perf_counter() - started)
            console.print(f"{name}: {seconds[name][-1]:.1f} s")
    faulty = [with_faults(sheet) if sheet.table == "impressions" else sheet for sheet in asked]
    verdicts = {name: _outcomes(faulty, engine(faulty)) for name, engine in running.items()}
    ours = [bool(one.success) for one in verdicts[OURS]]
    checks = [check for sheet in faulty for check in sheet.checks]
    return {
        name: EngineResult(
            seconds=seconds[name],
            agreeing=sum(bool(one.success) == mine for one, mine in zip(answers, ours, strict=True)),
            errors=sum(_failed_to_run(one) for one in answers),
            found=[
                fault
                for fault, wanted in FAULTS.items()
                if any(
                    not one.success and not _failed_to_run(one) and check.name == wanted
                    for one, check in zip(answers, checks, strict=True)
                )
            ],
            shows_values=any(one.result.get("partial_unexpected_list") for one in answers),
        )
        for name, answers in verdicts.items()
    }


def with_faults(sheet: Sheet) -> Sheet:
    """The log with :data:`FAULTS` put in."""
    frame, row = sheet.frame, pl.int_range(pl.len())
    at = pl.col("event_timestamp")
    spoiled = frame.with_columns(
        pl.when(row < 3).then(pl.lit(7)).otherwise(pl.col("click")).cast(frame.schema["click"]).alias("click"),
        pl.when(~row.is_between(3, 4)).then(pl.col("user_id")).alias("user_id"),
        pl.when(row.is_between(5, 14)).then(at - timedelta(days=1)).otherwise(at).alias("event_timestamp"),
    )
    return replace(sheet, frame=pl.concat([spoiled, spoiled.tail(5)]))


def _outcomes(asked: Sequence[Sheet], suites: dict[str, Any]) -> list[Any]:
    return [one for sheet in asked for one in outcomes(sheet, suites[sheet.table])]


def _failed_to_run(outcome: Any) -> bool:
    """Great Expectations keeps the exception of an expectation, or one by metric."""
    info = outcome.exception_info or {}
    parts = [info, *(part for part in info.values() if isinstance(part, dict))]
    return any(part.get("raised_exception") for part in parts)


def write_picture(result: "ValidationBench", path: Path) -> None:
    """A PNG at ``path``: a bar per engine to its median, a dot per run, ours first."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = sorted(result.engines, key=lambda name: (name != OURS, result.engines[name].median))
    with rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(10, 1.6 + 0.55 * len(names)), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(names):
            one = result.engines[name]
            axes.barh(place, one.median, color=BLUE if name == OURS else GREY, height=0.6)
            axes.plot(one.seconds, [place] * len(one.seconds), "o", color=INK, markersize=3)
            text = f"{one.median:.1f} s, {one.agreeing}/{result.expectations} verdicts as ours, {one.errors} errors"
            axes.text(max(one.seconds) * 1.02, place, f"  {text}", va="center", fontsize=8)
        axes.axvline(TARGET_SECONDS, color=VERMILION, linestyle="--", linewidth=1, label=f"target {TARGET_SECONDS:g} s")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(right=1.7 * max(max(one.seconds) for one in result.engines.values()))
        axes.set_xlabel("seconds, loading included")
        axes.set_title(f"{result.plan.rows:,} rows, {result.expectations} expectations of {len(result.tables)} tables")
        axes.legend(loc="lower right")
        figure.savefig(temporary, format="png", dpi=130)
