"""The local runner: real subprocesses, a log that is kept, and a failure that says which step and why."""

from datetime import date
from pathlib import Path

import pytest

from freshrank.components import build
from freshrank.errors import PipelineFailed
from freshrank.orchestration.kubeflow.local import KEPT_RUNS, LOG, TAIL_LINES, explain, run_pipeline
from freshrank.recipes import recipe

pytestmark = pytest.mark.integration

WITHOUT_YESTERDAY = date(2024, 1, 20)

STEP_LOG = """\
12:00:00.000 - INFO - Executing task 'validate-data'
    all is well
12:00:01.000 - INFO - Task 'validate-data' finished with status SUCCESS
12:00:01.000 - INFO - Executing task 'train'
    step=train state=started
    Traceback (most recent call last):
      File "steps.py", line 1, in train
    {error}
    expected at least 4

12:00:02.000 - ERROR - Task 'train' finished with status FAILURE
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / LOG


def test_a_step_that_fails_is_named_with_its_own_error(
    world: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Validation refuses a day without a log; no step after it starts, and its text reaches the caller whole."""
    with pytest.raises(PipelineFailed, match=r"step 'validate-data' failed\nValidationFailed: (.|\n)*2024-01-19"):
        run_pipeline(build, world, WITHOUT_YESTERDAY, recipe())
    (log,) = (home / "kfp").glob(f"*/{LOG}")
    assert "Executing task 'train'" not in log.read_text()
    assert "Executing task" in capfd.readouterr().out, "the steps' output is streamed as well"


def test_only_the_latest_runs_are_kept(world: Path, home: Path) -> None:
    """The disk does not fill; the run in hand is among those kept."""
    for number in range(KEPT_RUNS + 2):
        (home / "kfp" / f"2024010{number}T000000.000000-for-2024-01-01").mkdir(parents=True)
    with pytest.raises(PipelineFailed):
        run_pipeline(build, world, WITHOUT_YESTERDAY, recipe())
    runs = sorted(path.name for path in (home / "kfp").iterdir())
    assert len(runs) == KEPT_RUNS
    assert runs[-1].endswith(f"-for-{WITHOUT_YESTERDAY}")


def test_the_reason_is_the_steps_own_error_without_its_traceback(log: Path) -> None:
    """What a person must mend, in the words of the step."""
    log.write_text(STEP_LOG.format(error="freshrank.errors.DataError: items: 3 rows"))
    assert explain(log) == f"step 'train' failed\nDataError: items: 3 rows\nexpected at least 4\nThe whole log: {log}"


def test_an_error_of_another_kind_is_shown_with_the_end_of_the_log(log: Path) -> None:
    """A defect is shown with its traceback."""
    log.write_text(STEP_LOG.format(error="ZeroDivisionError: division by zero"))
    text = explain(log)
    assert text.startswith("step 'train' failed\n")
    assert "Traceback (most recent call last):" in text
    assert "all is well" not in text, "that was another step"


def test_the_end_of_the_log_fits_on_a_screen(log: Path) -> None:
    """Kubeflow prints every input of a step as JSON before it starts."""
    log.write_text(STEP_LOG.format(error="\n".join(["noise"] * 500)))
    assert len(explain(log).splitlines()) == TAIL_LINES + 2


def test_a_failure_before_the_first_step_points_to_the_log(log: Path) -> None:
    """There is no step to name."""
    log.write_text("")
    assert str(log) in explain(log)
