"""The operator waits without a worker, cancels what nobody waits for any more, and leaves what somebody does."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.jobs.triggerer_job_runner import _USER_ACTION_CANCEL_MSG, TriggerRunner
from airflow.sdk import DAG
from airflow.sdk.api.datamodels._generated import TaskInstance
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from airflow.sdk.execution_time.comms import TaskStatesResult
from airflow.sdk.execution_time.supervisor import set_supervisor_comms
from airflow.serialization.serialized_objects import DagSerialization

from freshrank.components import build
from freshrank.errors import ClusterUnreachable
from freshrank.orchestration.airflow.operator import KubeflowPipelineOperator, RunLink
from freshrank.orchestration.airflow.trigger import RunTrigger
from freshrank.orchestration.kubeflow import submit
from freshrank.pipeline.run import Run
from freshrank.storage.files import write_json
from tests.orchestration.kfp_server import Fault, KfpServer, api

pytestmark = pytest.mark.integration

DATE = "2024-01-07"


class Pushed(dict[str, Any]):
    """What a task's instance was given for XCom."""

    def xcom_push(self, key: str, value: Any) -> None:
        self[key] = value


@pytest.fixture
def on_cluster(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> KfpServer:
    monkeypatch.setenv("FRESHRANK_RUNNER", "cluster")
    monkeypatch.setenv("FRESHRANK_CLUSTER_IMAGE", "registry.example/freshrank:2")
    return kfp


@pytest.fixture
def submitted(
    on_cluster: KfpServer, prepared: submit.Submission, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., submit.Submission]:
    """Compiling takes seconds and is tested elsewhere: here it is done once."""
    monkeypatch.setattr(submit, "prepare", lambda *_: prepared)
    return submit.start


def operator(world: Path, **changes: Any) -> KubeflowPipelineOperator:
    return KubeflowPipelineOperator(
        task_id="train_ranker", build=build, data=str(world), run_date=DATE, poll_seconds=0.01, **changes
    )


def deferred(task: KubeflowPipelineOperator, pushed: Pushed) -> TaskDeferred:
    with pytest.raises(TaskDeferred) as deferral:
        task.execute({"ti": pushed})  # type: ignore[typeddict-item]
    return deferral.value


def event_of(trigger: Any) -> dict[str, Any]:
    """The trigger as the triggerer makes it, from what the database holds; its one event."""
    path, arguments = trigger.serialize()
    assert path == "freshrank.orchestration.airflow.trigger.RunTrigger"

    async def fired() -> list[Any]:
        return [event.payload async for event in RunTrigger(**json.loads(json.dumps(arguments))).run()]

    (payload,) = asyncio.run(fired())
    return dict(payload)


def resumed(task: KubeflowPipelineOperator, deferral: TaskDeferred) -> Any:
    return task.resume_execution(deferral.method_name, {"event": event_of(deferral.trigger)}, {})  # type: ignore[typeddict-item]


def test_the_task_leaves_its_worker_and_comes_back_with_the_outcome(
    submitted: Any, kfp: KfpServer, world: Path
) -> None:
    """Id and page of the run are known while it goes on."""
    task, pushed = operator(world), Pushed()
    deferral = deferred(task, pushed)
    assert pushed == {"run_id": "run-0", RunLink().xcom_key: f"{kfp.url}/#/runs/details/run-0"}
    kfp.script = [{"state": "RUNNING"}, {"state": "RUNNING"}, {"state": "SUCCEEDED"}]
    folder = Run(world, DATE).directory
    write_json(folder / "run.json", {"verdict": "rejected", "served_version": 3, "deployed": False})
    write_json(folder / "verdict.json", {"reasons": [{"sentence": "too few fresh rows", "passed": False}]})
    assert resumed(task, deferral)["reasons"] == ["too few fresh rows"]
    assert kfp.terminated == []


def test_a_failed_run_fails_the_task_with_its_step_and_log(submitted: Any, kfp: KfpServer, world: Path) -> None:
    """And for good: Kubeflow has retried the step already."""
    task = operator(world)
    deferral = deferred(task, Pushed())
    kfp.logs["train-pod"] = "epoch 1\nCUDA out of memory"
    kfp.fail("run-0", "train", "train-pod")
    with pytest.raises(AirflowFailException, match=r"step 'train' failed\nepoch 1\nCUDA out of memory\n.*run-0"):
        resumed(task, deferral)


@pytest.mark.parametrize("state", ["FAILED", "LATE"])
def test_a_failure_is_final_also_where_its_reason_cannot_be_had(
    kfp: KfpServer, world: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Another try of the task would start the run that failed again."""
    monkeypatch.setenv("FRESHRANK_KFP_RETRY_SECONDS", "0")
    kfp.faults = [Fault(".*", status=503)]
    with pytest.raises(AirflowFailException, match=rf"run-0: {state}; .*503.*\nThe run: http"):
        operator(world).resume({}, {"run_id": "run-0", "state": state, "error": ""})  # type: ignore[typeddict-item]


def test_a_run_that_takes_too_long_is_cancelled(submitted: Any, kfp: KfpServer, world: Path) -> None:
    """Nobody waits for it, and it would deploy in the middle of a later day."""
    task = operator(world, timeout=timedelta(seconds=0))
    with pytest.raises(AirflowFailException, match="took longer than 0:00:00 and is cancelled"):
        resumed(task, deferred(task, Pushed()))
    assert kfp.terminated == ["run-0"]


def test_a_run_that_vanished_fails_the_task(submitted: Any, kfp: KfpServer, world: Path) -> None:
    """Somebody deleted it in Kubeflow's pages."""
    task = operator(world)
    deferral = deferred(task, Pushed())
    kfp.runs.clear()
    with pytest.raises(AirflowFailException, match=r"asking for run run-0: .*404"):
        resumed(task, deferral)


def test_the_trigger_outlasts_an_api_that_is_away(
    submitted: Any, kfp: KfpServer, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on without an API server."""
    deferral = deferred(operator(world), Pushed())
    monkeypatch.setenv("FRESHRANK_KFP_RETRY_SECONDS", "0")
    kfp.script = [{"state": "SUCCEEDED"}]
    kfp.faults = [Fault("GET .*/runs/run-0", status=503, times=3), Fault("GET .*/runs/run-0", reset=True)]
    assert event_of(deferral.trigger)["state"] == "SUCCEEDED"


def test_an_api_that_is_away_at_submission_is_worth_another_try(
    submitted: Any, kfp: KfpServer, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow retries the task on what passes through unchanged."""
    monkeypatch.setenv("FRESHRANK_KFP_RETRY_SECONDS", "0")
    kfp.faults = [Fault(".*", status=503)]
    with pytest.raises(ClusterUnreachable):
        operator(world).execute({"ti": Pushed()})  # type: ignore[typeddict-item]


def test_a_worker_killed_while_it_submits_leaves_no_run(
    submitted: Any, kfp: KfpServer, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes when the run exists and the answer is on its way; nothing is started after it."""
    task, create = operator(world), kfp.created

    def killed_in_between(run: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return create(run)

    monkeypatch.setattr(kfp, "created", killed_in_between)

    def ended(*_: object) -> None:
        """As Airflow's task runner does it, once the run exists."""
        while not kfp.runs:
            time.sleep(0.01)
        task.on_kill()

    before = signal.signal(signal.SIGTERM, ended)
    try:
        with pytest.raises(ClusterUnreachable, match=r"killed while submitting .*; cancelled: run-0"):
            task.execute({"ti": Pushed()})  # type: ignore[typeddict-item]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert kfp.terminated == ["run-0"]
    assert kfp.count("POST .*/runs") == 1


def test_a_task_that_waits_no_longer_submits(submitted: Any, kfp: KfpServer, world: Path) -> None:
    """The run belongs to the trigger then: the worker's end is no reason to cancel it."""
    task = operator(world)
    deferred(task, Pushed())
    task.on_kill()
    assert kfp.terminated == []


class Supervisor:
    """Answers what a triggerer's supervisor answers from Airflow's database: the state of the task."""

    def __init__(self, state: str | None) -> None:
        self.state = state

    def send(self, _: object) -> TaskStatesResult:
        if self.state is None:
            raise ConnectionError("no answer")
        return TaskStatesResult(task_states={"a-run": {"train_ranker": self.state}})


@pytest.fixture
def waiting(kfp: KfpServer) -> RunTrigger:
    """A trigger of a task that waits, for a run that goes on."""
    kfp.runs.append(api.V2beta1Run(run_id="run-0", display_name="a run", state="RUNNING"))
    trigger = RunTrigger("run-0", "", time.time() + 60, 0.01)
    trigger.task_instance = TaskInstance(
        id="01999999-0000-7000-8000-000000000000",
        dag_version_id="01999999-0000-7000-8000-000000000001",
        task_id="train_ranker",
        dag_id="daily_retraining",
        run_id="a-run",
        try_number=1,
        map_index=-1,
    )
    return trigger


def ended_by(message: str | None, trigger: RunTrigger, kfp: KfpServer, state: str | None) -> None:
    """Airflow's own triggerer runs the trigger, and cancels it with ``message`` once it looks after its run."""

    async def ended() -> None:
        runner = TriggerRunner()
        runner.triggers[1] = {"name": "a trigger", "events": 0, "task": None}  # type: ignore[typeddict-item]
        task = asyncio.create_task(runner.run_trigger(1, trigger))
        while not kfp.count("GET .*/runs/run-0"):
            await asyncio.sleep(0.01)
        task.cancel(message)
        with pytest.raises(asyncio.CancelledError):
            await task

    with set_supervisor_comms(Supervisor(state)):
        asyncio.run(ended())


@pytest.mark.parametrize("state", ["failed", "success", "running", "restarting"])
def test_a_task_that_somebody_marked_or_cleared_cancels_its_run(
    waiting: RunTrigger, kfp: KfpServer, state: str
) -> None:
    """Once."""
    ended_by(_USER_ACTION_CANCEL_MSG, waiting, kfp, state)
    assert kfp.terminated == ["run-0"]


def test_a_triggerer_that_restarts_leaves_the_run_alone(waiting: RunTrigger, kfp: KfpServer) -> None:
    """It is looked after again by the next one."""
    ended_by(None, waiting, kfp, "deferred")
    assert kfp.terminated == []
    kfp.script = [{"state": "SUCCEEDED"}]
    assert event_of(waiting)["state"] == "SUCCEEDED"


def test_a_triggerer_whose_triggers_another_took_over_leaves_the_run_alone(waiting: RunTrigger, kfp: KfpServer) -> None:
    """To Airflow that looks as if somebody had killed the task, but the task still waits."""
    ended_by(_USER_ACTION_CANCEL_MSG, waiting, kfp, "deferred")
    assert kfp.terminated == []


def test_a_run_is_not_cancelled_on_suspicion(waiting: RunTrigger, kfp: KfpServer) -> None:
    """Where the task's state cannot be learnt, a day's training is worth more than a run too many."""
    ended_by(_USER_ACTION_CANCEL_MSG, waiting, kfp, None)
    assert kfp.terminated == []


def test_a_run_that_had_ended_is_not_cancelled(waiting: RunTrigger, kfp: KfpServer) -> None:
    """The API would refuse it."""
    kfp.runs[0].state = "SUCCEEDED"
    asyncio.run(waiting._cancel())
    assert kfp.terminated == []


def test_the_link_to_the_run_survives_in_airflows_database(world: Path) -> None:
    """Its pages know operators only as serialised, without this package: name and XCom are enough for them."""
    with DAG("a_dag", schedule=None, start_date=None) as dag:
        operator(world)
    task = DagSerialization.from_dict(DagSerialization.to_dict(dag)).get_task("train_ranker")
    assert [(link.name, link.xcom_key) for link in task.operator_extra_links] == [("Kubeflow run", RunLink().xcom_key)]


def test_the_trigger_loads_no_kfp() -> None:
    """A triggerer imports it before it needs it."""
    module = "freshrank.orchestration.airflow.trigger"
    code = f"import sys, {module}; print(sorted({{'kfp', 'torch', 'polars'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
