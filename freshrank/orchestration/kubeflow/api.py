"""Client of the Kubeflow Pipelines API: timeouts, retries, credentials, and errors that say what to do.

Importing this module loads neither kfp nor Airflow and contacts nothing: Airflow's triggerer and DAG processor read it.
"""

import json
import logging
import re
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from freshrank.errors import ConfigError, PipelineFailed
from freshrank.orchestration.kubeflow.api_failures import (
    api_exception,
    explained,
    in_words,
    is_transient,
    is_unknown_name,
    require_json,
)
from freshrank.orchestration.kubeflow.settings import ApiSettings
from freshrank.retry import retrying
from freshrank.settings import from_environment, settings

FINISHED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
"""Final states of a run."""
TAIL_LINES = 30

_NOT_TO_BE_JOINED = {"FAILED", "CANCELED", "CANCELING", "SKIPPED"}
_MADE_MEANWHILE = {409, 500}
"""409; the upload of older servers says 500."""
_PODS_ASKED = 5
_NOT_A_STEP = re.compile(r"^(root|executor|condition(-.*)?|.*\(\d+\))$")

log = logging.getLogger(__name__)
T = TypeVar("T")


def run_page(run_id: str) -> str:
    """URL of the run's page for a browser."""
    return f"{(from_environment(ApiSettings).ui_host or settings().kfp_host).rstrip('/')}/#/runs/details/{run_id}"


class PipelinesApi:
    """What freshrank asks of the API; every call is repeated on passing failures and can safely be made again.

    Raises ClusterUnreachable when the failure did not pass in ``retry_seconds``, ConfigError when the API refuses the
    token, PipelineFailed for everything else. One thread at a time.
    """

    def __init__(self, namespace: str = "") -> None:
        """Connects at the first call. ``namespace`` is the profile of a multi-user Kubeflow, else empty."""
        _require_url(settings().kfp_host)
        self._settings = from_environment(ApiSettings)
        self._namespace = namespace or None
        self._client: Any = None
        self._has_answered = False

    def version(self, pipeline: str, name: str, package: Path) -> tuple[str, str]:
        """Ids of ``pipeline`` and its version ``name``; what does not exist is created, from ``package``."""

        def ensure(client: Any) -> tuple[str, str]:
            owner = _get_or_create(
                lambda: _first(client.list_pipelines(filter=_named(pipeline), namespace=self._namespace).pipelines),
                lambda: client.pipelines.pipeline_service_create_pipeline(
                    pipeline=client.api_models.V2beta1Pipeline(display_name=pipeline, namespace=self._namespace)
                ),
            ).pipeline_id
            version = _get_or_create(
                lambda: _first(client.list_pipeline_versions(owner, filter=_named(name)).pipeline_versions),
                lambda: client.pipeline_uploads.upload_pipeline_version(str(package), name=name, pipelineid=owner),
            )
            return _given(owner), _given(version.pipeline_version_id)

        return self._call(f"uploading version {name}", ensure)

    def experiment(self, name: str) -> str:
        """Id of the experiment, created where there is none."""

        def ensure(client: Any) -> str:
            where = {"namespace": self._namespace} if self._namespace else {}
            body = client.api_models.V2beta1Experiment(display_name=name, **where)
            existing = _get_or_create(
                lambda: _first(client.list_experiments(filter=_named(name), **where).experiments),
                lambda: client.experiments.experiment_service_create_experiment(experiment=body),
            )
            return _given(existing.experiment_id)

        return self._call(f"looking for experiment {name}", ensure)

    def live(self, run_name: str) -> list[str]:
        """Ids of the runs of this name that have succeeded or still can, the oldest first."""
        runs = self._call(f"looking for run {run_name}", lambda client: self._live(client, run_name))
        return [str(run.run_id) for run in runs]

    def start(self, run_name: str, **body: Any) -> str:
        """The run of this name, created unless there is one; ``body`` are fields of ``V2beta1Run``.

        A request whose answer was lost may have created the run, so every try looks first.
        """

        def ensure(client: Any) -> str:
            live = self._live(client, run_name)
            if live:
                return str(live[0].run_id)
            run = client.api_models.V2beta1Run(display_name=run_name, **body)
            return _given(client.runs.run_service_create_run(run=run).run_id)

        return self._call(f"starting run {run_name}", ensure)

    def keep_oldest(self, run_name: str) -> str | None:
        """The oldest live run of this name, the others terminated: all who submitted at once agree on it.

        The API has no idempotency key and lets many runs have one name.
        """
        live = self.live(run_name)
        for run_id in live[1:]:
            if self.terminate(run_id):
                log.warning("run %s was a second %s: cancelled", run_id, run_name)
        return live[0] if live else None

    def run(self, run_id: str) -> Any:
        """The run as the API's ``V2beta1Run``; PipelineFailed when there is none of this id."""

        def ask(client: Any) -> Any:
            run = client.get_run(run_id)
            _given(run.run_id)
            return run

        return self._call(f"asking for run {run_id}", ask)

    def terminate(self, run_id: str) -> bool:
        """Cancel the run; False when it had ended already, or is gone."""

        def cancel(client: Any) -> bool:
            try:
                if client.get_run(run_id).state in FINISHED:
                    return False
                client.terminate_run(run_id)
            except api_exception() as error:
                if error.status == 404:
                    return False
                raise
            return True

        return self._call(f"terminating run {run_id}", cancel)

    def explain(self, run_id: str) -> str:
        """Why a run that did not succeed did not: its step, the step's message and the tail of its log."""
        run = self.run(run_id)
        lines = [f"run {run_id} ended as {run.state}: {_reason(run)}"]
        if run.state == "FAILED":
            lines.append(self._log_tail(run) or "the log of the step could not be read here")
        return "\n".join([*lines, f"The run: {run_page(run_id)}"])

    def _live(self, client: Any, run_name: str) -> list[Any]:
        page = client.list_runs(
            filter=_named(run_name), sort_by="created_at desc", page_size=100, namespace=self._namespace
        )
        live = [run for run in page.runs or [] if run.state not in _NOT_TO_BE_JOINED]
        never = datetime.max.replace(tzinfo=UTC)
        return sorted(live, key=lambda run: (run.created_at or never, run.run_id))

    def _log_tail(self, run: Any) -> str | None:
        """Last lines of the failed step's pod, as Kubeflow's pages get them; None where they are not to be had."""
        for pod in _failed_pods(run):
            try:
                text = self._pod_log(pod)
            except Exception as error:
                # The reason of the run is worth more than the reason for not having its log.
                log.info("no log of pod %s: %s", pod, error)
                continue
            if text.strip():
                return "\n".join(text.rstrip().splitlines()[-TAIL_LINES:])
        return None

    def _pod_log(self, pod: str) -> str:
        namespace = [("podnamespace", self._namespace)] if self._namespace else []
        answer = self._connected()._run_api.api_client.call_api(
            "/k8s/pod/logs",
            "GET",
            query_params=[("podname", pod), *namespace],
            auth_settings=["Bearer"],
            _preload_content=False,
            _return_http_data_only=True,
        )
        if "html" in answer.headers.get("Content-Type", ""):
            raise PipelineFailed("a page instead of a log")
        return bytes(answer.data).decode(errors="replace")

    def _connected(self) -> Any:
        if self._client is None:
            self._client = _connect(self._settings)
        return self._client

    def _call(self, what: str, call: Callable[[Any], T]) -> T:
        def tell(error: BaseException, pause: float) -> None:
            log.warning("%s %s; next try in %.1f s", settings().kfp_host, in_words(error), pause)

        calling = retrying(self._may_pass, seconds=self._settings.retry_seconds, before_pause=tell)
        try:
            result: T = calling(self._authorised, call)
        except Exception as error:
            raise explained(what, error, self._settings) from error
        return result

    def _may_pass(self, error: BaseException) -> bool:
        """A name that was known a moment ago comes back; one that never was is misspelt."""
        return is_transient(error) and (self._has_answered or not is_unknown_name(error))

    def _authorised(self, call: Callable[[Any], T]) -> T:
        try:
            result = call(self._connected())
        except api_exception() as error:
            if error.status != 401:
                raise
            # The token may have been renewed between the reading of the file and the answer.
            self._client = None
            result = call(self._connected())
        self._has_answered = True
        return result


def _require_url(host: str) -> None:
    if not host:
        raise ConfigError("FRESHRANK_KFP_HOST: not set, expected the URL of the Kubeflow Pipelines API")
    if not host.startswith(("http://", "https://")):
        raise ConfigError(f"FRESHRANK_KFP_HOST: received {host!r}, expected a URL that starts with http:// or https://")


def _connect(how: ApiSettings) -> Any:
    """A ``kfp.Client`` whose requests end after ``request_seconds``, which repeats none and reads nothing but JSON."""
    import urllib3
    from kfp import client as kfp_client
    from kfp_server_api import V2beta1GetHealthzResponse
    from kfp_server_api.rest import RESTClientObject

    class Client(kfp_client.Client):  # type: ignore[misc]
        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            # kfp asks for it to guess a namespace, which it keeps in the user's home; ours is a setting.
            return V2beta1GetHealthzResponse(multi_user=False)

    class Rest(RESTClientObject):  # type: ignore[misc]
        def request(self, *args: Any, _preload_content: bool = True, _request_timeout: Any = None, **kw: Any) -> Any:
            limit = _request_timeout or (how.request_seconds / 3, how.request_seconds * 2 / 3)
            try:
                answer = super().request(*args, _preload_content=_preload_content, _request_timeout=limit, **kw)
            except api_exception() as error:
                if error.status == 404 or 300 <= error.status < 400:
                    require_json(error)
                raise
            if _preload_content:
                require_json(answer)
            return answer

    if how.ca_cert is not None and not how.ca_cert.is_file():
        raise ConfigError(f"FRESHRANK_KFP_CA_CERT: received {how.ca_cert}, expected a file with certificates (PEM)")
    warnings.filterwarnings("ignore", message="This client only works", category=FutureWarning)
    file, token = how.token_file(), how.token.get_secret_value()
    credentials = kfp_client.ServiceAccountTokenVolumeCredentials(str(file)) if file else None
    connected = Client(
        host=settings().kfp_host,
        existing_token=token or None,
        credentials=credentials,
        ssl_ca_cert=None if how.ca_cert is None else str(how.ca_cert),
    )
    api_client = connected._run_api.api_client
    api_client.configuration.retries = urllib3.Retry(0, redirect=3, raise_on_redirect=False)
    api_client.rest_client = Rest(api_client.configuration)
    return connected


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "string_value": name}]})


def _given(identity: Any) -> str:
    """``identity`` of an answer: the client reads whatever it is sent, a page of HTML as an object without fields."""
    if identity is None:
        raise ValueError("an answer without an id")
    return str(identity)


def _first(items: list[Any] | None) -> Any:
    return items[0] if items else None


def _get_or_create(find: Callable[[], Any], make: Callable[[], Any]) -> Any:
    if (existing := find()) is not None:
        return existing
    try:
        return make()
    except api_exception() as error:
        if error.status in _MADE_MEANWHILE and (existing := find()) is not None:
            return existing
        raise


def _tasks(run: Any) -> list[Any]:
    return (run.run_details.task_details if run.run_details else None) or []


def _failed(run: Any) -> list[Any]:
    """The failed tasks in the order in which they ended: a step before the graph that contains it."""
    never = datetime.max.replace(tzinfo=UTC)
    return sorted((task for task in _tasks(run) if task.state == "FAILED"), key=lambda task: task.end_time or never)


def failed_step(run: Any) -> str | None:
    """Name of the step that failed first, in the pipeline's own words; None when no step says so."""
    names = [str(task.display_name).removesuffix("-driver") for task in _failed(run)]
    return next((name for name in names if not _NOT_A_STEP.match(name) and name != run.display_name), None)


def progress_of(run: Any) -> str:
    """State of the run and names of the steps that are at work, in a line."""
    names = [str(task.display_name) for task in _tasks(run) if task.state == "RUNNING"]
    steps = [name for name in names if not (_NOT_A_STEP.match(name) or name.endswith("-driver"))]
    return ", ".join([str(run.state), *steps])


def _reason(run: Any) -> str:
    if run.state in ("CANCELED", "CANCELING"):
        return "somebody cancelled it"
    messages = [task.error.message for task in _failed(run) if task.error and task.error.message]
    message = messages[0] if messages else (run.error.message if run.error else "") or ""
    step = failed_step(run)
    summary = f"step '{step}' failed" if step else "no step reported a failure"
    return f"{summary}: {message}" if message else summary


def _failed_pods(run: Any) -> list[str]:
    """Pods that may hold the failed step's log, the latest attempt first.

    ``pod_name`` of a task is defined in the API but left empty by its servers up to now (kubeflow/pipelines issue
    14007); those of its children are not.
    """
    pods: list[str] = []
    for task in reversed(_failed(run)):
        pods += [task.pod_name, *(child.pod_name for child in reversed(task.child_tasks or []))]
    return list(dict.fromkeys(pod for pod in pods if pod))[:_PODS_ASKED]
