"""An Airflow of its own under the workspace, and one run of the DAG in it."""

import json
import os
import re
import subprocess
import sys
from datetime import date
from importlib.resources import files
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from freshrank.errors import PipelineFailed
from freshrank.settings import settings
from freshrank.storage.files import atomic_write

DAG_ID = "daily_retraining"
TAIL_LINES = 25

_TASK = re.compile(r"\[DAG TEST\] starting task_id=(\w+)")
_STEP = re.compile(r"Executing task \S*?'([\w-]+)'")
_ERROR = re.compile(r"^\S*(?:AirflowFailException: |freshrank\.errors\.)(?=\w+: )")
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\dT")


def airflow_environment(home: Path) -> dict[str, str]:
    """Environment in which every ``airflow`` command works on ``home`` alone: SQLite, our DAGs only, loopback."""
    own = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(files("freshrank.dags")),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        # A coloured log is for eyes; this one is read by the progress display first.
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        "FRESHRANK_HOME": str(settings().home),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
    return inherited | own


def airflow_command(*arguments: str) -> list[str]:
    """The Airflow of this interpreter, whatever is on PATH."""
    return [sys.executable, "-m", "airflow", *arguments]


def prepare_home() -> Path:
    """Airflow's home with a migrated database; only the first call does work."""
    home = settings().home / "airflow"
    migrated = home / "migrated"
    if not migrated.exists():
        home.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            airflow_command("db", "migrate"),
            env=airflow_environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if result.returncode:
            raise PipelineFailed(f"airflow db migrate failed in {home}:\n{_tail(result.stdout.splitlines())}")
        with atomic_write(migrated) as temporary:
            temporary.touch()
    return home


def run_dag(run_date: date, conf: dict[str, Any], log: Path) -> None:
    """Run ``daily_retraining`` for ``run_date`` in this machine's own Airflow, with a spinner that names the step.

    ``conf`` are the DAG's params; all output goes to ``log``. Raises PipelineFailed with what failed and why.
    """
    from rich.console import Console

    console = Console(stderr=True, log_path=False)
    with console.status("preparing Airflow") as status:
        home = prepare_home()
        command = airflow_command("dags", "test", DAG_ID, run_date.isoformat(), "-c", json.dumps(conf))
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            log.open("w") as copy,
            subprocess.Popen(
                command, env=airflow_environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                copy.write(line)
                if step := step_in(line):
                    status.update(step)
                    console.log(step)
    check_outcome(process.returncode, run_date, log)


def check_outcome(returncode: int, run_date: date, log: Path) -> None:
    """PipelineFailed unless the run succeeded and did anything at all: Airflow calls a run without tasks a success."""
    if returncode:
        raise PipelineFailed(f"the DAG run for {run_date} failed\n{reason(log)}\nThe whole log: {log}")
    if not _TASK.search(log.read_text()):
        raise PipelineFailed(
            f"the DAG run for {run_date} ran no task; is {run_date} before the DAG's start_date? {log}"
        )


def step_in(line: str) -> str | None:
    """The task, or the pipeline's step, that begins with this line of the log."""
    if task := _TASK.search(line):
        return f"task {task[1]}"
    if step := _STEP.search(line):
        return f"  step {step[1]}"
    return None


def reason(log: Path) -> str:
    """The last error that is freshrank's own, in its own words, else the end of the last traceback."""
    lines = log.read_text().splitlines()
    errors = [index for index, line in enumerate(lines) if _ERROR.search(line)]
    if not errors:
        return _tail([line for line in lines if not _LOG_LINE.search(line)])
    text = takewhile(lambda line: not _LOG_LINE.search(line), lines[errors[-1] :])
    return _ERROR.sub("", "\n".join(islice(text, TAIL_LINES)))


def _tail(lines: list[str]) -> str:
    return "\n".join(lines[-TAIL_LINES:])
