"""The Kubeflow pipeline as an Airflow operator, and which errors are worth a retry.

Importable without kfp and without the libraries of the steps: Airflow's triggerer and DAG processor load it.
"""

import json
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.exceptions import AirflowFailException

from freshrank.errors import ClusterUnreachable, ConfigError, PipelineFailed, ServingError, StorageError
from freshrank.settings import from_environment, settings

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.types import TaskInstanceKey

    from freshrank.config import RunConfig
    from freshrank.orchestration.kubeflow.arguments import PipelineBuilder

RUN_ID = "run_id"
"""Key of the XCom with the id of the run on the cluster."""

_SQLITE_PASSES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
_REDIS_PASSES = (
    "ConnectionError",
    "TimeoutError",
    "ReadOnlyError",
    "TryAgainError",
    "ClusterDownError",
    "MasterDownError",
)
_REDIS_STAYS = ("AuthenticationError", "AuthorizationError")


@contextmanager
def final_errors() -> Iterator[None]:
    """Fail a task without retries on errors only a person can fix: all but an unreachable server or file."""
    try:
        yield
    except Exception as error:
        if may_pass(error):
            raise
        raise AirflowFailException(f"{type(error).__name__}: {error}") from error


def may_pass(error: BaseException | None) -> bool:
    """Whether a retry may succeed: a server or file is unreachable, also as reported by Feast's libraries."""
    if error is None:
        return False
    if isinstance(error, (ServingError, StorageError, ClusterUnreachable, OSError)):
        return True
    return _store_is_away(error) or may_pass(error.__cause__)


def _store_is_away(error: BaseException) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        # The low byte is the error, the rest its kind.
        return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _SQLITE_PASSES
    # An error of redis can only come from a module that is loaded.
    redis = sys.modules.get("redis.exceptions")
    return redis is not None and _is_any(error, redis, _REDIS_PASSES) and not _is_any(error, redis, _REDIS_STAYS)


def _is_any(error: BaseException, module: object, names: Sequence[str]) -> bool:
    return isinstance(error, tuple(getattr(module, name) for name in names))


def data_directory(data: str) -> Path:
    """``data``, or the dataset named by the settings; one in an object store is brought into the workspace."""
    from freshrank.storage.object_store import local_dataset

    if chosen := data or settings().dataset:
        return local_dataset(chosen).resolve()
    raise ConfigError("data: neither the DAG's param 'data' nor FRESHRANK_DATASET names an imported data directory")


def run_config(recipe: str, overrides: list[str]) -> "RunConfig":
    """The named recipe (the default one if empty) with ``section.field=value`` overrides."""
    from freshrank import recipes

    return recipes.recipe(recipe or recipes.DEFAULT_RECIPE, overrides)


class RunLink(BaseOperatorLink):
    """Button on the task's page that opens the run's page in Kubeflow; empty where the pipeline runs locally."""

    name = "Kubeflow run"

    def get_link(self, operator: BaseOperator, *, ti_key: "TaskInstanceKey") -> str:
        from airflow.sdk.execution_time.xcom import XCom

        from freshrank.orchestration.kubeflow.api import run_page

        run_id = XCom.get_value(ti_key=ti_key, key=RUN_ID)
        return run_page(run_id) if run_id else ""


class KubeflowPipelineOperator(BaseOperator):
    """Run a pipeline such as ``train_ranker`` where ``FRESHRANK_RUNNER`` says, wait for it and return the outcome.

    On a cluster the task submits, defers to :class:`~freshrank.orchestration.airflow.trigger.RunTrigger`, which holds
    no worker, and comes back when the run has ended. Whoever kills the task, or clears it, cancels the run; a
    triggerer or worker that restarts does not. The run's id is the XCom ``run_id``.
    """

    template_fields: Sequence[str] = ("data", "run_date", "recipe", "overrides")
    operator_extra_links = (RunLink(),)

    def __init__(
        self,
        *,
        build: "PipelineBuilder",
        data: str,
        run_date: str,
        recipe: str = "",
        overrides: str = "[]",
        timeout: timedelta = timedelta(hours=12),
        poll_seconds: float = 30.0,
        **kwargs: Any,
    ) -> None:
        """``build`` gives the pipeline where it is run, not where the DAG is read.

        ``recipe`` is a name in :mod:`freshrank.recipes`, ``overrides`` a JSON list of ``section.field=value``.

        A run on a cluster that takes longer than ``timeout`` is cancelled, and the task fails.
        """
        super().__init__(**kwargs)
        self.build = build
        self.data = data
        self.run_date = run_date
        self.recipe = recipe
        self.overrides = overrides
        self.timeout = timeout
        self.poll_seconds = poll_seconds
        self._submitting: str | None = None

    def execute(self, context: "Context") -> dict[str, Any]:
        from freshrank.dates import parse_day

        with final_errors():
            config = run_config(self.recipe, json.loads(self.overrides))
            data, run_date = data_directory(self.data), parse_day(self.run_date)
            if settings().runner == "local":
                from freshrank.orchestration.kubeflow.local import run_pipeline

                return self._told(run_pipeline(self.build, data, run_date, config))
            run_id = self._submit(data, run_date, config)
        return self._defer(context, run_id)

    def _submit(self, data: Path, run_date: date, config: "RunConfig") -> str:
        from freshrank.orchestration.kubeflow import submit

        submission = submit.prepare(self.build, data, run_date, config)
        self._submitting = submission.run_name
        run_id = submit.start(submission).run_id
        assert run_id is not None
        return run_id

    def _defer(self, context: "Context", run_id: str) -> Never:
        from freshrank.orchestration.airflow.trigger import RunTrigger
        from freshrank.orchestration.kubeflow.api import run_page
        from freshrank.orchestration.kubeflow.settings import ClusterSettings

        page = run_page(run_id)
        self.log.info("waiting for run %s: %s", run_id, page)
        context["ti"].xcom_push(key=RUN_ID, value=run_id)
        # Airflow itself pushes links when a task ends; whoever waits wants this one before.
        context["ti"].xcom_push(key=self.operator_extra_links[0].xcom_key, value=page)
        self._submitting = None
        deadline = time.time() + self.timeout.total_seconds()
        trigger = RunTrigger(run_id, from_environment(ClusterSettings).namespace, deadline, self.poll_seconds)
        self.defer(trigger=trigger, method_name=self.resume.__name__)

    def resume(self, context: "Context", event: dict[str, Any]) -> dict[str, Any]:
        """The outcome, once the trigger saw the run end; a failure names the step, the tail of its log and the page."""
        from freshrank.orchestration.kubeflow.arguments import outcome

        with final_errors():
            self._require_success(event)
            return self._told(outcome(data_directory(self.data), self.run_date))

    def _require_success(self, event: dict[str, Any]) -> None:
        from freshrank.orchestration.kubeflow.api import PipelinesApi, run_page
        from freshrank.orchestration.kubeflow.settings import ClusterSettings

        run_id, state = event["run_id"], event["state"]
        if state == "SUCCEEDED":
            return
        if event["error"]:
            raise PipelineFailed(f"{event['error']}\nThe run, which may go on: {run_page(run_id)}")
        api = PipelinesApi(from_environment(ClusterSettings).namespace)
        try:
            if state != "LATE":
                raise PipelineFailed(api.explain(run_id))
            api.terminate(run_id)
        except ClusterUnreachable as error:
            # Another try would start the failed run again, or wait as long again for the late one.
            raise PipelineFailed(f"run {run_id}: {state}; {error}\nThe run: {run_page(run_id)}") from None
        raise PipelineFailed(f"run {run_id} took longer than {self.timeout} and is cancelled: {run_page(run_id)}")

    def on_kill(self) -> None:
        """Cancel what is being submitted, and stop submitting; while the task waits, that is the trigger's part."""
        from freshrank.orchestration.kubeflow import submit

        if (name := self._submitting) is None:
            return
        self._submitting = None
        cancelled = submit.cancel_named(name)
        # Airflow goes on with the task after its signal, which would start the run a moment later.
        raise ClusterUnreachable(f"killed while submitting {name}; cancelled: {', '.join(cancelled) or 'nothing'}")

    def _told(self, result: dict[str, Any]) -> dict[str, Any]:
        self.log.info("verdict=%s reasons=%s", result["verdict"], result["reasons"])
        return result
