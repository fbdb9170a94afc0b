"""Airflow of our own: isolated, quick the second time, and honest about a DAG run that failed."""

from datetime import date
from pathlib import Path

import pytest

from freshrank.errors import PipelineFailed
from freshrank.orchestration.airflow.home import airflow_environment, check_outcome, reason, run_dag, step_in
from tests.paths import PROJECT_ROOT

pytestmark = pytest.mark.integration

LOG = """\
2024-01-31T00:00:01.000000Z [info     ] [DAG TEST] starting task_id=validate map_index=-1 [dag] loc=dag.py:1501
2024-01-31T00:00:02.000000Z [error    ] Task failed with exception     [task] loc=task_runner.py:1676
Traceback (most recent call last):
  File "steps.py", line 1, in validate
{error}
2024-01-31T00:00:03.000000Z [info     ] ::endgroup:: [task]
DagRun failed
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "airflow.log"


def test_airflow_sees_only_this_project_and_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user's shell says about another Airflow is not inherited."""
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://elsewhere/airflow")
    monkeypatch.setenv("AIRFLOW_CONN_PRODUCTION", "http://elsewhere")
    environment = airflow_environment(tmp_path)
    assert environment["AIRFLOW_HOME"] == str(tmp_path)
    assert Path(environment["AIRFLOW__CORE__DAGS_FOLDER"]).resolve() == PROJECT_ROOT / "dags"
    assert environment["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert not [name for name, value in environment.items() if name.startswith("AIRFLOW") and "elsewhere" in value]


def test_a_dag_run_that_fails_raises_with_the_reason_of_its_task(
    world: Path, home: Path, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real Airflow, prepared from nothing: the day before the run date has no log, and waiting was declined."""
    message = "the run for 2024-01-20 needs the partition of 2024-01-19; the log in .* holds 2024-01-01 .. 2024-01-06"
    with pytest.raises(PipelineFailed, match=message):
        run_dag(date(2024, 1, 20), {"data": str(world), "wait": False}, log)
    assert (home / "airflow" / "airflow.db").exists()
    assert "task wait_for_partition" in capfd.readouterr().err
    assert "DagRun failed" in log.read_text()


def test_a_dag_run_without_any_task_is_no_success(log: Path) -> None:
    """Airflow marks a run dated before the DAG's start_date successful without running a task."""
    log.write_text("DagRun Finished: state=success\n")
    with pytest.raises(PipelineFailed, match="ran no task; is 2022-05-09 before the DAG's start_date"):
        check_outcome(0, date(2022, 5, 9), log)
    log.write_text(LOG)
    check_outcome(0, date(2022, 5, 9), log)


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("2024Z [info] [DAG TEST] starting task_id=materialize map_index=-1 [dag]\n", "task materialize"),
        ("02:51:03.715 - INFO - Executing task \x1b[96m'validate-data'\x1b[0m\n", "  step validate-data"),
        ("02:51:03.715 - INFO - Executing task 'train'\n", "  step train"),
        ("02:51:03.715 - INFO - Task 'train' finished with status SUCCESS\n", None),
    ],
)
def test_progress_names_tasks_and_pipeline_steps(line: str, step: str | None) -> None:
    """Coloured or not; other lines of the log do not move the display."""
    assert step_in(line) == step


@pytest.mark.parametrize(
    "prefix", ["airflow.sdk.exceptions.AirflowFailException: ValidationFailed: ", "freshrank.errors.ValidationFailed: "]
)
def test_the_reason_is_the_error_of_the_task_in_its_own_words(log: Path, prefix: str) -> None:
    """All its lines, and nothing of Airflow's."""
    log.write_text(LOG.format(error=f"{prefix}items: 12 nulls\nexpected none"))
    assert reason(log) == "ValidationFailed: items: 12 nulls\nexpected none"


def test_the_reason_of_a_defect_is_its_traceback(log: Path) -> None:
    """Without the lines Airflow logs around it."""
    log.write_text(LOG.format(error="ZeroDivisionError: division by zero"))
    assert reason(log).splitlines()[0] == "Traceback (most recent call last):"
    assert "endgroup" not in reason(log)
