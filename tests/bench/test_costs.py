"""Costs are ratios to the baseline, measured once and kept."""

from pathlib import Path

import pytest
from rich.console import Console

from freshrank.bench.paper.costs import ROWS, _FirstSteps, costs
from freshrank.bench.paper.evidence_data import Prepared, load_evidence
from freshrank.bench.paper.pool import run_all
from freshrank.bench.paper.rows import BASELINE, chosen
from freshrank.bench.paper.table1 import Table1Options, tasks_of
from freshrank.config import ModelConfig, RunConfig

pytestmark = pytest.mark.integration

QUIET = Console(quiet=True)


def test_only_the_first_rows_of_an_epoch_are_timed(world: Prepared) -> None:
    """As many rows whatever the batch size; the length that batch size and learning rate follow is the whole one."""
    whole = load_evidence(world.source).encoded(RunConfig(model=ModelConfig(min_count=3))).train.data
    few = _FirstSteps(whole)
    for size in (512, 1000):
        timed = sum(len(rows) for rows in few.batches(size))
        assert timed == min(len(whole), -(-ROWS // size) * size)
    assert len(few) == len(whole)


@pytest.mark.slow
def test_a_row_is_timed_once_against_the_baseline(world: Prepared, home: Path) -> None:
    """The second call reads what the first one measured."""
    tasks = {
        name: by_seed[0]
        for name, by_seed in tasks_of(world, chosen(["residual"]), {}, Table1Options(1, ["residual"], 1, home)).items()
    }
    assert run_all(list(tasks.values()), 1, QUIET, "test") == []
    assert costs(tasks, tasks[BASELINE], 0, QUIET) == {}
    first = costs(tasks, tasks[BASELINE], 1, QUIET)
    assert set(first) == {BASELINE, "residual"}
    assert all(-100 < value < 1000 for cost in first.values() for value in (cost.training, cost.latency))
    assert costs(tasks, tasks[BASELINE], 1, QUIET) == first
