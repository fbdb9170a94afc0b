"""`freshrank bench tune`: every row's candidates on days before the evaluation days, by one criterion declared here.

The baseline's training settings are chosen first and hold for every row; then each row chooses its own. Every row,
the baseline too, has the same number of trials. A run's tuning rows end the day before its first evaluation day.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from freshrank.bench.paper.evidence_data import Prepared, prepare
from freshrank.bench.paper.pool import Failure, run_all
from freshrank.bench.paper.rows import BASELINE, ORACLE, TUNED, Overrides, Row, chosen, config_of
from freshrank.bench.paper.task import Task, TaskResult, is_done
from freshrank.errors import DataError
from freshrank.evaluation.results import ALL, FRESH, MetricName
from freshrank.storage.files import atomic_write, read_json, write_json

COLUMNS = ("row", "candidate", "seed", "metric", "value")
GUARD = 0.005
"""Overall Hits@3 may be lower than the baseline's by this (relative) without a penalty."""
PENALTY = 100.0
"""Taken from the criterion per unit of relative loss beyond the guard: 0.1% more costs 0.1."""
_JUDGED_ON = ((MetricName.MATCHED_HITS, FRESH), (MetricName.LOG_LOSS, FRESH))
_REPORTED = (*_JUDGED_ON, (MetricName.HITS, FRESH), (MetricName.HITS, ALL))


@dataclass(frozen=True)
class Trial:
    """One candidate of one row, and what it gave by seed."""

    row: str
    number: int
    overrides: Overrides
    results: list[TaskResult]


@dataclass(frozen=True)
class Reference:
    """The untuned baseline, and the untuned oracle where there is one: what candidates are measured from and to."""

    baseline: list[TaskResult]
    oracle: list[TaskResult] | None
    actions: list[str]

    def criterion(self, results: list[TaskResult]) -> float:
        """Mean over actions of the gap closed on exposure-matched fresh Hits@3 and on fresh log loss, less the penalty.

        Without an oracle, or where it is no better than the baseline, the relative improvement takes the place of
        the gap closed. Raw fresh Hits@3 has no part in it: a constant would raise it.
        """
        parts = [self._gained(results, metric, name, action) for metric, name in _JUDGED_ON for action in self.actions]
        ours, base = (self._overall(given) for given in (results, self.baseline))
        return float(np.mean(parts)) - PENALTY * max(0.0, 1 - ours / base - GUARD)

    def _overall(self, results: list[TaskResult]) -> float:
        return float(np.mean([mean_of(results, MetricName.HITS, ALL, action) for action in self.actions]))

    def _gained(self, results: list[TaskResult], metric: MetricName, name: str, action: str) -> float:
        sign = -1 if metric is MetricName.LOG_LOSS else 1
        ours, base = (mean_of(given, metric, name, action) for given in (results, self.baseline))
        distance = abs(base)
        if self.oracle:
            gap = sign * (mean_of(self.oracle, metric, name, action) - base)
            distance = gap if gap > 0 else distance
        return sign * (ours - base) / distance


def mean_of(results: list[TaskResult], metric: str, name: str, action: str) -> float:
    """Mean over seeds; a :class:`DataError` where a seed has no such value: nothing could be compared."""
    values = [result.value(metric, name, action) for result in results]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        raise DataError(
            f"tune: {metric} on {name} rows, '{action}', has no value in the tuning days; tune on more days"
        )
    return float(np.mean(known))


@dataclass(frozen=True)
class TuneOptions:
    seeds: int
    rows: list[str] | None
    jobs: int
    out: Path
    winners: Path = TUNED
    lists: str = "user"


def tune(evidence: Prepared, options: TuneOptions, console: Console) -> list[Failure]:
    """Try every candidate before the evaluation days of ``evidence``; write the trials and the winners."""
    prepared = evidence.before_evaluation()
    prepare(prepared)
    rows = [row for row in chosen(options.rows) if not row.like]
    baseline, references = rows[0], _tasks(prepared, rows[0], {}, options)
    oracle = [_oracle(task, prepared) for task in references] if prepared.oracle else []
    first = {(BASELINE, n): _tasks(prepared, baseline, layer, options) for n, layer in enumerate(baseline.candidates)}
    failures = run_all(_flat([*first.values(), oracle]), options.jobs, console, "tune the baseline")
    reference = _reference(references, oracle)
    trials = _read(first, {BASELINE: baseline})
    base = best(trials, reference).overrides
    second = {
        (row.name, n): _tasks(prepared, row, layer, options, base)
        for row in rows[1:]
        for n, layer in enumerate(row.candidates)
    }
    failures += run_all(_flat(second.values()), options.jobs, console, "tune the rows")
    trials += _read(second, {row.name: row for row in rows})
    write_trials(options.out / f"tuning-{prepared.protocol}.csv", trials, reference)
    _write_winners(options.winners, prepared.protocol, trials, reference)
    return failures


def _tasks(
    prepared: Prepared, row: Row, layer: Overrides, options: TuneOptions, base: Overrides | None = None
) -> list[Task]:
    source = prepared.source
    configs = (
        config_of(row, seed, base or {}, layer, windows=source.windows, lists=options.lists)
        for seed in range(options.seeds)
    )
    note = f" candidate {row.candidates.index(layer)}"
    return [Task(row.name, seed, config, source, note=note) for seed, config in enumerate(configs)]


def _oracle(task: Task, prepared: Prepared) -> Task:
    assert prepared.oracle is not None
    return Task(ORACLE, task.seed, task.config, prepared.oracle)


def _flat(groups: Any) -> list[Task]:
    """By seed first, so that an interrupted run has all candidates of few seeds."""
    return sorted((task for group in groups for task in group), key=lambda task: task.seed)


def _reference(baseline: list[Task], oracle: list[Task]) -> Reference:
    if not all(is_done(task) for task in (*baseline, *oracle)):
        raise DataError(
            "tune: the untuned baseline (or oracle) failed, so no candidate can be scored; see the log (-v)"
        )
    results = [TaskResult.read(task) for task in baseline]
    actions = [entry["action"] for entry in results[0].metrics if (entry["metric"], entry["slice"]) == ("pr_auc", ALL)]
    return Reference(results, [TaskResult.read(task) for task in oracle] or None, actions)


def _read(tasks: dict[tuple[str, int], list[Task]], rows: dict[str, Row]) -> list[Trial]:
    """The trials all of whose seeds are done."""
    return [
        Trial(name, number, rows[name].candidates[number], [TaskResult.read(task) for task in by_seed])
        for (name, number), by_seed in tasks.items()
        if all(is_done(task) for task in by_seed)
    ]


def best(trials: Sequence[Trial], reference: Reference) -> Trial:
    """Highest criterion; the earlier candidate on a tie."""
    return max(trials, key=lambda trial: (reference.criterion(trial.results), -trial.number))


def write_trials(path: Path, trials: Sequence[Trial], reference: Reference) -> None:
    """One line per row, candidate, seed and metric (``metric/slice/action``); ``criterion`` once, without a seed."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for trial in trials:
            for result in trial.results:
                for metric, name in _REPORTED:
                    for action in reference.actions:
                        key = f"{metric}/{name}/{action}"
                        writer.writerow([trial.row, trial.number, result.seed, key, result.value(metric, name, action)])
            writer.writerow([trial.row, trial.number, "", "criterion", reference.criterion(trial.results)])


def _write_winners(path: Path, protocol: str, trials: Sequence[Trial], reference: Reference) -> None:
    known: dict[str, dict[str, Overrides]] = read_json(path) if path.exists() else {}
    by_row = {name: [trial for trial in trials if trial.row == name] for name in dict.fromkeys(t.row for t in trials)}
    winners = {name: best(trials_of_row, reference).overrides for name, trials_of_row in by_row.items()}
    write_json(path, known | {protocol: known.get(protocol, {}) | winners})
