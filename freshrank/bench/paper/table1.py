"""`freshrank bench table1`: every row of the paper's table 1 on one ranker, with seeds, intervals and references."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from freshrank.bench.paper import lifts
from freshrank.bench.paper.costs import Cost, costs
from freshrank.bench.paper.evidence_data import Prepared, load_evidence, prepare
from freshrank.bench.paper.lifts import Estimate
from freshrank.bench.paper.pool import Failure, run_all
from freshrank.bench.paper.rows import (
    BASELINE,
    BOOSTED,
    LABELS,
    ORACLE,
    Row,
    chosen,
    config_of,
    layers_of,
    tuned,
    tuned_under,
)
from freshrank.bench.paper.table import COLUMNS, GAPS, LIFTED, OTHERS, PaperTable, TableRow, better
from freshrank.bench.paper.task import Task, TaskResult, boosted, is_done, predictions_of
from freshrank.errors import DataError
from freshrank.evaluation.results import ALL, FRESH, MetricName
from freshrank.storage.files import atomic_write, write_json


@dataclass(frozen=True)
class Table1Options:
    seeds: int
    rows: list[str] | None
    jobs: int
    out: Path
    untuned: bool = False
    timing_repeats: int = 3
    lists: str = "user"


def table1(prepared: Prepared, options: Table1Options, console: Console) -> list[Failure]:
    """Train and judge what is missing, then write CSV, JSON, picture and page; what failed comes back.

    Raises:
        DataError: the baseline failed, so there is nothing to compare with.
    """
    from freshrank.bench.paper.forest_plot import write_picture
    from freshrank.bench.paper.page import write_page

    prepare(prepared)
    winners = {} if options.untuned else tuned(prepared.protocol)
    rows = chosen(options.rows)
    tasks = tasks_of(prepared, rows, winners, options)
    trained = [task for by_seed in tasks.values() for task in by_seed if not task.boosted]
    trained.sort(key=lambda task: task.seed)
    failures = run_all(trained, options.jobs, console, "table 1")
    boosts = [task for by_seed in tasks.values() for task in by_seed if task.boosted and predictions_of(task).is_dir()]
    failures += run_all(boosts, options.jobs, console, "constant boost")
    results = {name: [TaskResult.read(task) for task in by_seed if is_done(task)] for name, by_seed in tasks.items()}
    write_csv(options.out / f"table1-{prepared.protocol}.csv", results)
    spent = _costs(tasks, options.timing_repeats, console)
    settings = tuned_under(prepared.protocol) if winners else None
    table = assembled(prepared, rows, tasks, results, failures, spent, settings)
    write_json(options.out / f"table1-{prepared.protocol}.json", table.model_dump(mode="json"))
    write_picture(table, options.out / f"table1-{prepared.protocol}.png")
    write_page(options.out)
    return failures


def tasks_of(
    prepared: Prepared, rows: Sequence[Row], winners: dict[str, Any], options: Table1Options
) -> dict[str, list[Task]]:
    """Row name -> its tasks by seed: the rows, the boosted baseline, and the baseline on the oracle's rows."""

    def task(row: Row, seed: int, name: str | None = None) -> Task:
        source = prepared.oracle if name == ORACLE and prepared.oracle else prepared.source
        config = config_of(row, seed, *layers_of(row, winners), windows=source.windows, lists=options.lists)
        return Task(name or row.name, seed, config, source)

    seeds, baseline = range(options.seeds), rows[0]
    tasks = {row.name: [task(row, seed) for seed in seeds] for row in rows}
    for name, moved in BOOSTED.items():
        if name in tasks and (options.rows is None or moved in options.rows):
            tasks[moved] = [boosted(one) for one in tasks[name]]
    if prepared.oracle:
        tasks[ORACLE] = [task(baseline, seed, ORACLE) for seed in seeds]
    return tasks


def _costs(tasks: dict[str, list[Task]], repeats: int, console: Console) -> dict[str, Cost]:
    timed = {
        name: by_seed[0]
        for name, by_seed in tasks.items()
        if name not in LABELS and all(is_done(task) for task in by_seed)
    }
    return costs(timed, tasks[BASELINE][0], repeats, console) if BASELINE in timed else {}


def write_csv(path: Path, results: dict[str, list[TaskResult]]) -> None:
    """One line per row, seed, metric, slice and action; an action of '' is the average weighted by utility."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_lines(results))


def _lines(results: dict[str, list[TaskResult]]) -> Iterator[tuple[str, int, str, str, str, float]]:
    for name, by_seed in results.items():
        for result in by_seed:
            for entry in result.metrics:
                yield name, result.seed, entry["metric"], entry["slice"], entry["action"], entry["value"]
            yield name, result.seed, "parameters", "", "", result.parameters
            if result.boost:
                yield name, result.seed, "boost", FRESH, "", result.boost


def assembled(
    prepared: Prepared,
    rows: Sequence[Row],
    tasks: dict[str, list[Task]],
    results: dict[str, list[TaskResult]],
    failures: Sequence[Failure],
    spent: dict[str, Cost],
    tuned: str | None,
) -> PaperTable:
    """The table of the rows that have all their seeds."""
    whole = {name: by_seed for name, by_seed in results.items() if len(by_seed) == len(tasks[name])}
    if BASELINE not in whole:
        reasons = "; ".join(f"seed {f.task.seed}: {f.reason}" for f in failures if f.task.row == BASELINE)
        raise DataError(f"table 1: the baseline failed ({reasons}), so no row can be compared; see the log (-v)")
    evidence = load_evidence(prepared.source)
    sums, counts = lifts.stacked([[(r.rows, r.sums, r.counts) for r in by_seed] for by_seed in whole.values()])
    rates = lifts.rates(list(whole), sums, counts)
    actions = evidence.schema.actions
    labels = {row.name: row.label for row in rows} | LABELS
    lines = [_line(name, labels[name], tasks[name][0], whole, rates, actions, spent) for name in _ordered(whole, rows)]
    split = prepared.source.split
    parts = {part: getattr(split, part) for part in ("train", "calibration", "evaluation")}
    return PaperTable(
        protocol=prepared.protocol,
        seeds=rates.seeds,
        actions=actions,
        judged_rows=len(evidence.evaluation.rows),
        lists=int(counts[:, len(actions) : 2 * len(actions)].any(axis=1).sum()),
        days={
            name: " .. ".join(dict.fromkeys(str(day) for day in (part[0], part[-1]))) for name, part in parts.items()
        },
        tuned=tuned,
        noise=spent.get(BASELINE),
        rows=_with_corrections(lines),
        failed={name: _why(name, failures) for name in tasks if name not in whole},
    )


def _ordered(whole: dict[str, list[TaskResult]], rows: Sequence[Row]) -> list[str]:
    order = [name for row in rows for name in (row.name, BOOSTED.get(row.name)) if name] + [ORACLE]
    return [name for name in order if name in whole]


def _why(name: str, failures: Sequence[Failure]) -> str:
    reasons = [f.reason for f in failures if f.task.name == name]
    return reasons[0] if reasons else "the row it rests on failed"


def _line(
    name: str,
    label: str,
    task: Task,
    whole: dict[str, list[TaskResult]],
    rates: lifts.Rates,
    actions: list[str],
    spent: dict[str, Cost],
) -> TableRow:
    ours, base = whole[name], whole[BASELINE]
    columns = {
        f"{measure}/{action}": number * len(actions) + place
        for number, measure in enumerate(LIFTED)
        for place, action in enumerate(actions)
    }
    columns = {key: column for key, column in columns.items() if np.isfinite(rates.observed[:, column]).all()}
    values = {key: float(rates.observed[rates.row(name), column]) for key, column in columns.items()}
    share = [r.value(MetricName.FRESH_SHARE_TOP, ALL, "") for r in ours]
    values |= {"fresh_share": float(np.mean([s for s in share if s is not None]))} if any(share) else {}
    lift = {key: rates.lift(name, BASELINE, column) for key, column in columns.items() if name != BASELINE}
    gap = {}
    if ORACLE in whole and name not in (BASELINE, ORACLE):
        gaps = {
            key: rates.gap_closed(name, BASELINE, ORACLE, column, better(key))
            for key, column in columns.items()
            if key.rpartition("/")[0] in GAPS
        }
        gap = {key: estimate for key, estimate in gaps.items() if estimate}
    return TableRow(
        name=name,
        label=label,
        settings=task.config.model_dump(mode="json", include={"techniques", "training", "model"}),
        parameters=ours[0].parameters,
        parameters_percent=100 * (ours[0].parameters / base[0].parameters - 1),
        cost=spent.get(name),
        boost=float(np.mean([r.boost for r in ours]))
        if name in BOOSTED.values() or any(r.boost for r in ours)
        else None,
        values=values,
        lift=lift,
        gap=gap,
        others=_others(ours, base, actions),
    )


def _others(ours: list[TaskResult], base: list[TaskResult], actions: list[str]) -> dict[str, Estimate]:
    estimates = {
        f"{metric}/{name}/{action}": lifts.paired(
            [r.value(metric, name, action) for r in ours], [r.value(metric, name, action) for r in base]
        )
        for metric, name in OTHERS
        for action in actions
    }
    return {key: estimate for key, estimate in estimates.items() if estimate}


def _with_corrections(lines: list[TableRow]) -> list[TableRow]:
    """Holm over the rows, column by column; the baseline and the oracle are not among the tested."""
    tested = [line for line in lines if line.name not in (BASELINE, ORACLE)]
    for kind in ("lift", "others"):
        for key in dict.fromkeys(key for line in tested for key in getattr(line, kind)):
            corrected = lifts.corrected([getattr(line, kind).get(key) for line in tested])
            for line, estimate in zip(tested, corrected, strict=True):
                if estimate:
                    getattr(line, kind)[key] = estimate
    return lines
