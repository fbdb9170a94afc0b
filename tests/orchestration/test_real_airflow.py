"""A whole Airflow (scheduler, API server, DAG processor, triggerer) waits for a run, is restarted, kills its task."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from freshrank.pipeline.run import Run
from freshrank.storage.files import write_json
from tests.orchestration.kfp_server import KfpServer
from tests.paths import PROJECT_ROOT

pytestmark = pytest.mark.slow

PATIENCE = 240
TASK = "/api/v2/dags/one_run/dagRuns/{run}/taskInstances/train_ranker"
DAG = """
from airflow.sdk import DAG
from freshrank.components import build
from freshrank.orchestration.airflow.operator import KubeflowPipelineOperator
with DAG("one_run", schedule=None, is_paused_upon_creation=False):
    KubeflowPipelineOperator(
        task_id="train_ranker", build=build, data={data!r}, run_date="2024-01-07", poll_seconds=0.5
    )
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def until(reached: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.2)


class Airflow:
    """Its processes on loopback, in a home of its own."""

    def __init__(self, home: Path, settings: dict[str, str]) -> None:
        self.home = home
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")} | {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "2",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{self.port}/execution/",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": self.port,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": free_port(),
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": free_port(),
            "PYTHONPATH": str(PROJECT_ROOT),
            **settings,
        }

    def start(self, name: str) -> None:
        with (self.home / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "airflow", name],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        os.killpg(process.pid, how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        url = f"http://127.0.0.1:{self.port}"
        with urlopen(f"{url}/auth/token", timeout=30) as answer:
            token = json.load(answer)["access_token"]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        payload = None if body is None else json.dumps(body).encode()
        with urlopen(Request(url + path, payload, headers, method=method), timeout=30) as answer:
            return json.load(answer)

    def answers(self, path: str) -> bool:
        try:
            self.ask("GET", path)
        except OSError:
            return False
        return True

    def trigger(self, run: str) -> None:
        self.ask("POST", "/api/v2/dags/one_run/dagRuns", {"dag_run_id": run, "logical_date": None})

    def state(self, run: str) -> Any:
        return self.ask("GET", TASK.format(run=run))["state"]


@pytest.fixture
def airflow(kfp: KfpServer, world: Path, tmp_path: Path) -> Iterator[Airflow]:
    home = tmp_path / "airflow"
    (home / "dags").mkdir(parents=True)
    (home / "dags" / "one_run.py").write_text(DAG.format(data=str(world)))
    cluster = {"FRESHRANK_RUNNER": "cluster", "FRESHRANK_CLUSTER_IMAGE": "registry.example/freshrank:2"}
    running = Airflow(home, cluster)
    subprocess.run(
        [sys.executable, "-m", "airflow", "db", "migrate"], env=running.environment, check=True, capture_output=True
    )
    try:
        for name in ("api-server", "dag-processor", "scheduler", "triggerer"):
            running.start(name)
        until(lambda: running.answers("/api/v2/dags/one_run"), "the DAG is read")
        yield running
    finally:
        for name in list(running.processes):
            running.stop(name)


def test_a_run_survives_the_triggerer_and_ends_with_its_task(airflow: Airflow, kfp: KfpServer, world: Path) -> None:
    """Stopped and killed triggerers leave it alone; a task marked failed or cleared cancels it, once."""
    airflow.trigger("first")
    polls = "GET .*/runs/run-0"
    until(lambda: kfp.count(polls) >= 2, "the triggerer polls")
    assert airflow.state("first") == "deferred"
    links = airflow.ask("GET", TASK.format(run="first") + "/links")["extra_links"]
    assert links == {"Kubeflow run": f"{kfp.url}/#/runs/details/run-0"}

    for how in (signal.SIGTERM, signal.SIGKILL):
        airflow.stop("triggerer", how)
        before = kfp.count(polls)
        airflow.start("triggerer")
        until(lambda before=before: kfp.count(polls) >= before + 2, "the next triggerer polls")
        assert kfp.terminated == []

    airflow.ask("PATCH", TASK.format(run="first"), {"new_state": "failed"})
    until(lambda: kfp.terminated, "the run is cancelled")
    assert kfp.terminated == ["run-0"]

    airflow.trigger("second")
    until(lambda: kfp.count("GET .*/runs/run-1"), "a new run is looked after")
    clear = {"dag_run_id": "second", "task_ids": ["train_ranker"], "only_failed": False, "dry_run": False}
    airflow.ask("POST", "/api/v2/dags/one_run/clearTaskInstances", clear)
    until(lambda: kfp.count("GET .*/runs/run-2"), "the cleared task's new run is looked after")
    assert kfp.terminated == ["run-0", "run-1"]

    folder = Path(airflow.environment["FRESHRANK_HOME"]) / Run(world, "2024-01-07").directory.relative_to(
        Path(os.environ["FRESHRANK_HOME"]).resolve()
    )
    write_json(folder / "run.json", {"verdict": "rejected", "served_version": None, "deployed": False})
    write_json(folder / "verdict.json", {"reasons": []})
    kfp.runs[2].state = "SUCCEEDED"
    until(lambda: airflow.state("second") == "success", "the task comes back with the outcome")
