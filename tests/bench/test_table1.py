"""The whole command on a small world: what it writes, and that nothing is done twice."""

import csv
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from freshrank.bench.paper.evidence_data import Prepared
from freshrank.bench.paper.page import write_page
from freshrank.bench.paper.pool import run_all
from freshrank.bench.paper.rows import BASELINE, BOOST, ORACLE, ROWS, chosen
from freshrank.bench.paper.table import COLUMNS, PaperTable
from freshrank.bench.paper.table1 import Table1Options, table1, tasks_of
from freshrank.bench.paper.task import Task, is_done, measures_of, predictions_of
from freshrank.errors import DataError
from freshrank.evaluation.results import FRESH, MetricName
from freshrank.storage.files import read_json
from tests.bench.conftest import RUN_DATE

pytestmark = pytest.mark.integration

QUIET = Console(quiet=True)
NAME = "table1-simulated"


@pytest.fixture(scope="module")
def written(world: Prepared, home: Path) -> tuple[Prepared, Table1Options]:
    """Two seeds of two rows and the boost; the world is its own oracle."""
    prepared = replace(world, oracle=world.source)
    options = Table1Options(2, ["mixup", BOOST], 1, home / "evidence", timing_repeats=0)
    assert table1(prepared, options, QUIET) == []
    return prepared, options


def lines(options: Table1Options) -> list[dict[str, str]]:
    with (options.out / f"{NAME}.csv").open() as file:
        return list(csv.DictReader(file))


def written_files(home: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (home / "bench").rglob("*") if path.is_file()}


def test_the_csv_holds_every_seed_of_every_row(written: tuple[Prepared, Table1Options]) -> None:
    """Columns row, seed, metric, slice, action, value; every value a number."""
    _, options = written
    rows = lines(options)
    assert tuple(rows[0]) == COLUMNS == ("row", "seed", "metric", "slice", "action", "value")
    seeds = {(line["row"], line["seed"]) for line in rows}
    assert seeds == {(row, seed) for row in (BASELINE, "mixup", BOOST, ORACLE) for seed in "01"}
    for line in rows:
        float(line["value"])
    keys = [tuple(line[name] for name in COLUMNS[:-1]) for line in rows]
    assert len(set(keys)) == len(keys)


def test_the_table_agrees_with_the_seeds_in_the_csv(written: tuple[Prepared, Table1Options]) -> None:
    """A lift is the relative difference of the means of the CSV's values."""
    _, options = written
    table = PaperTable.model_validate(read_json(options.out / f"{NAME}.json"))
    wanted = (MetricName.HITS.value, FRESH, "click")
    means = {}
    for row in (BASELINE, "mixup"):
        values = [
            float(line["value"])
            for line in lines(options)
            if line["row"] == row and (line["metric"], line["slice"], line["action"]) == wanted
        ]
        means[row] = sum(values) / 2
    mixup = table.row("mixup")
    assert mixup is not None
    assert mixup.lift["/".join(wanted)].value == pytest.approx(100 * (means["mixup"] / means[BASELINE] - 1), abs=1e-3)
    assert mixup.parameters_percent == 0


def test_the_boost_moves_fresh_hits_and_learns_nothing(written: tuple[Prepared, Table1Options]) -> None:
    """Its parameters are the baseline's, and so is its ranking within fresh items."""
    _, options = written
    table = PaperTable.model_validate(read_json(options.out / f"{NAME}.json"))
    boost = table.row(BOOST)
    assert boost is not None
    assert boost.boost is not None
    assert boost.parameters_percent == 0
    assert boost.lift[f"{MetricName.HITS}/{FRESH}/click"].value >= 0
    pr_auc = f"{MetricName.PR_AUC}/{FRESH}/click"
    baseline = table.row(BASELINE)
    assert baseline is not None
    assert boost.others[pr_auc].value == pytest.approx(baseline.others[pr_auc].value)


def test_an_oracle_no_better_than_the_baseline_leaves_no_gap(written: tuple[Prepared, Table1Options]) -> None:
    """The world is its own oracle here."""
    table = PaperTable.model_validate(read_json(written[1].out / f"{NAME}.json"))
    assert all(not row.gap for row in table.rows)


def test_page_and_picture_are_written_and_findings_survive(written: tuple[Prepared, Table1Options]) -> None:
    """A protocol has a section, a hand-written file stands at the end as it is, figures are linked."""
    _, options = written
    page = options.out.with_suffix(".md")
    assert (options.out / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")
    assert "findings.md" in page.read_text()
    for name, text in (("findings.md", "## Findings\n\nBy hand.\n"), ("figures.md", "# Figures\n")):
        (options.out / name).write_text(text)
    write_page(options.out)
    text = page.read_text()
    assert text.endswith("## Findings\n\nBy hand.\n")
    assert "(evidence/figures.md)" in text
    assert "## Protocol simulated" in text
    assert "### Lift over the baseline, save" in text
    assert f"](evidence/{NAME}.png)" in text


def test_a_second_call_computes_nothing_and_writes_the_same(
    written: tuple[Prepared, Table1Options], home: Path
) -> None:
    """Neither a training nor a judgement is done again."""
    prepared, options = written
    before, evidence = written_files(home), (options.out / f"{NAME}.json").read_bytes()
    assert table1(prepared, options, QUIET) == []
    assert written_files(home) == before
    assert (options.out / f"{NAME}.json").read_bytes() == evidence


def test_more_seeds_keep_those_that_are_there(written: tuple[Prepared, Table1Options], home: Path) -> None:
    """One more seed of one more row adds its files and touches no other."""
    prepared, options = written
    before = written_files(home)
    tasks = tasks_of(prepared, chosen(["residual"]), {}, replace(options, rows=["residual"], seeds=1))
    assert run_all(tasks["residual"], 1, QUIET, "test") == []
    after = written_files(home)
    assert {path: after[path] for path in before} == before
    assert len(after) > len(before)


def test_a_failing_row_stops_no_other_and_is_named(written: tuple[Prepared, Table1Options], home: Path) -> None:
    """The others are on the page, the exit says so; a failing baseline leaves nothing to compare with."""
    prepared, options = written
    options = replace(options, out=home / "broken", rows=["mixup"])
    good = ROWS["mixup"]
    try:
        # A head count that does not divide the width of the sequence encoder.
        ROWS["mixup"] = replace(good, overrides=good.overrides | {"model": {"sequence_heads": 7}})
        failures = table1(prepared, options, QUIET)
        page = (home / "broken.md").read_text()
    finally:
        ROWS["mixup"] = good
    assert [failure.task.row for failure in failures] == ["mixup", "mixup"]
    assert "**Missing**: mixup" in page
    assert {line["row"] for line in lines(options)} == {BASELINE, ORACLE}


def test_a_failing_baseline_leaves_nothing_to_compare_with(written: tuple[Prepared, Table1Options], home: Path) -> None:
    """The sentence says which seed failed and why."""
    prepared, options = written
    good = ROWS[BASELINE]
    try:
        ROWS[BASELINE] = replace(good, overrides={"model": {"sequence_heads": 7}})
        with pytest.raises(DataError, match="the baseline failed"):
            table1(prepared, replace(options, out=home / "nothing", rows=["mixup"], seeds=1), QUIET)
    finally:
        ROWS[BASELINE] = good


def command(world: Prepared, row: str, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "freshrank",
        "bench",
        "table1",
        "--data",
        str(world.source.path),
        "--date",
        RUN_DATE.isoformat(),
        "--train-days",
        "3",
        "--evaluation-days",
        "1",
        "--rows",
        row,
        "--seeds",
        "4",
        "--jobs",
        "2",
        "--timing-repeats",
        "0",
        "--untuned",
        "--out",
        str(out),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("row, how", [("score-reg", signal.SIGKILL), ("residual", signal.SIGINT)])
def test_stopping_it_loses_at_most_what_was_running(row: str, how: int, world: Prepared, home: Path) -> None:
    """kill -9 or Ctrl-C after a training: the next call does only the others, and no worker outlives the first.

    Workers hold the pipe that is read here: were one left, the loop would not end.
    """
    environment = os.environ | {"FRESHRANK_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command(world, row, home / "stopped"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if f"{row} seed 0" in line:
                process.send_signal(how)
    assert process.returncode != 0
    assert "Traceback" not in said
    tasks = [
        task
        for by_seed in tasks_of(world, chosen([row]), {}, Table1Options(4, [row], 2, home, True)).values()
        for task in by_seed
    ]
    finished = {
        measures_of(task): (measures_of(task) / "metrics.json").stat().st_mtime_ns for task in tasks if is_done(task)
    }
    assert 1 <= len(finished) < len(tasks)
    result = subprocess.run(
        command(world, row, home / "stopped"), env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.count(" seed ") == len(tasks) - len(finished)
    assert {path: (path / "metrics.json").stat().st_mtime_ns for path in finished} == finished
    assert all(is_done(task) for task in tasks)
    assert not list((home / "bench").rglob("*.tmp"))


def test_a_task_of_other_settings_lies_elsewhere(world: Prepared) -> None:
    """The path is the fingerprint of what the result depends on; the label of the row alone is not."""
    tasks = tasks_of(world, chosen(["mixup"]), {}, Table1Options(1, ["mixup"], 1, Path("out")))
    one: Task = tasks["mixup"][0]
    wider = one.config.model_copy(update={"model": one.config.model.model_copy(update={"experts": 5})})
    judged = one.config.model_copy(update={"evaluation": one.config.evaluation.model_copy(update={"k": 5})})
    assert predictions_of(replace(one, config=wider)) != predictions_of(one)
    assert predictions_of(replace(one, config=judged)) == predictions_of(one)
    assert measures_of(replace(one, config=judged)) != measures_of(one)
    assert measures_of(replace(one, note=" shown")) == measures_of(one)
