"""Run the same pipeline on a cluster through the Kubeflow Pipelines API. Importing this module contacts nothing."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from freshrank.config import RunConfig
from freshrank.errors import ClusterUnreachable, ConfigError, PipelineFailed
from freshrank.orchestration.kubeflow.api import FINISHED, PipelinesApi, progress_of, run_page
from freshrank.orchestration.kubeflow.arguments import PipelineBuilder, arguments
from freshrank.orchestration.kubeflow.placement import placement
from freshrank.orchestration.kubeflow.settings import ALL_SETTINGS, ApiSettings, ClusterSettings
from freshrank.settings import Settings, from_environment, settings, unknown_variables
from freshrank.storage.files import fingerprint, write_text

log = logging.getLogger(__name__)

EXPERIMENT = "freshrank"
PIPELINE = "train-ranker"


@dataclass(frozen=True)
class Submission:
    """What was, or with ``dry_run`` would be, sent; ``run_id`` is None after a dry run."""

    run_name: str
    """Ends in ``key``."""
    version: str
    """Name of the pipeline's version: a fingerprint of what was compiled."""
    arguments: dict[str, str]
    package: Path
    namespace: str
    service_account: str
    run_id: str | None = None
    pipeline: str = PIPELINE
    experiment: str = EXPERIMENT

    @property
    def key(self) -> str:
        """The idempotency key: a fingerprint of pipeline and arguments."""
        return self.run_name.rpartition("-")[2]

    @property
    def page(self) -> str | None:
        return None if self.run_id is None else run_page(self.run_id)

    def facts(self) -> dict[str, Any]:
        """Everything but the compiled pipeline, as JSON can hold it."""
        return asdict(self) | {"key": self.key, "package": str(self.package), "page": self.page}

    def __str__(self) -> str:
        if self.run_id is not None:
            return f"{self.run_name}: submitted as run {self.run_id}\n{self.page}"
        # Comments, so that the whole is still the package.
        return "\n".join(
            [f"# {self.run_name}: not submitted; this is what would be sent", *self._head(), self.package.read_text()]
        )

    def _head(self) -> list[str]:
        names = ("run_name", "key", "pipeline", "version", "experiment", "namespace", "service_account")
        named = [f"# {name}: {value}" for name in names if (value := getattr(self, name))]
        return [*named, "# arguments:", *(f"#   {name}: {value}" for name, value in self.arguments.items())]


def compiled(build: PipelineBuilder, cluster: ClusterSettings | None) -> str:
    """The pipeline as YAML, placed by ``cluster``; None gives what the local runner runs."""
    from kfp import compiler

    place = None if cluster is None else placement(cluster)
    # At every setting of every task kfp describes the whole call stack: seconds below Airflow, nothing in a new thread.
    with TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:
        package = Path(folder) / "pipeline.yaml"
        thread.submit(lambda: compiler.Compiler().compile(build(place), str(package))).result()
        return package.read_text()


def prepare(build: PipelineBuilder, data: Path, run_date: date, config: RunConfig) -> Submission:
    """Compile the pipeline of ``run_date`` and name its run, contacting nothing."""
    parameters, cluster = arguments(data, run_date, config), from_environment(ClusterSettings)
    text = compiled(build, cluster)
    version = f"{PIPELINE}-{fingerprint({'pipeline': text})}"
    package = settings().home / "kfp" / f"{version}.yaml"
    write_text(package, text)
    key = fingerprint({"pipeline": text, "arguments": parameters})
    name = f"{PIPELINE}-{run_date.isoformat()}-{key}"
    return Submission(name, version, parameters, package, cluster.namespace, cluster.service_account)


def preflight_warnings(submission: Submission) -> list[str]:
    """Preflight check: what would keep the steps from running on the cluster, as far as can be seen from here."""
    cluster, here = from_environment(ClusterSettings), settings()
    warnings = [] if cluster.image else ["FRESHRANK_CLUSTER_IMAGE: not set; a submission is refused without it"]
    warnings += _home_warnings(here.home, cluster.home_claim, Path(submission.arguments["data"]))
    if here.triton_host == "127.0.0.1" and not here.triton_replicas and not here.triton_replicas_host:
        warnings.append(
            "FRESHRANK_TRITON_HOST: 127.0.0.1 is each step's own pod, where no Triton is; expected the "
            "service of the one to deploy to, or FRESHRANK_TRITON_REPLICAS_HOST"
        )
    return warnings + _secret_warnings(here, cluster) + unknown_variables(*ALL_SETTINGS)


def _secret_warnings(here: Settings, cluster: ClusterSettings) -> list[str]:
    names = ["redis_url"] if here.online_store == "redis" else []
    names += ["triton_control_token"] if here.triton_control_token.get_secret_value() else []
    variables = [f"FRESHRANK_{name.upper()}" for name in names]
    return [
        f"{name}: a secret, which does not travel with the pipeline; expected its Secret in "
        f'FRESHRANK_CLUSTER_SECRET_ENV, as {{"{name}": "secret:key"}}'
        for name in variables
        if name not in cluster.secret_env
    ]


def _home_warnings(home: Path, claim: str, data: Path) -> list[str]:
    outside = (
        []
        if data.is_relative_to(home)
        else [f"--data: {data} is outside FRESHRANK_HOME, {home}; the steps see nothing else"]
    )
    # A workspace that is shared with the steps is a volume here too.
    if home.is_mount():
        return outside
    volume = f"mount {claim} there" if claim else "have no volume there, as FRESHRANK_CLUSTER_HOME_CLAIM is not set"
    return [
        f"FRESHRANK_HOME: {home} is a directory of this machine, and no volume; the steps {volume}. Expected the "
        "path at which both have the same workspace, as in the chart's Airflow",
        *outside,
    ]


def start(submission: Submission) -> Submission:
    """Start what is prepared on the cluster at ``FRESHRANK_KFP_HOST``, or find the run already started.

    A run of the same name that is not failed or canceled is returned instead of starting a second, and of several
    that were started at the same moment one is left.

    Raises:
        ConfigError: no image is set; the components' own name for it is in no registry.
    """
    if not from_environment(ClusterSettings).image:
        raise ConfigError("FRESHRANK_CLUSTER_IMAGE: not set, expected the image with freshrank that the steps run in")
    api = PipelinesApi(submission.namespace)
    known = api.live(submission.run_name)
    return replace(submission, run_id=known[0] if known else _start(api, submission))


def _start(api: PipelinesApi, submission: Submission) -> str:
    pipeline_id, version_id = api.version(submission.pipeline, submission.version, submission.package)
    started = api.start(
        submission.run_name,
        experiment_id=api.experiment(submission.experiment),
        pipeline_version_reference={"pipeline_id": pipeline_id, "pipeline_version_id": version_id},
        runtime_config={"parameters": submission.arguments},
        service_account=submission.service_account or None,
    )
    # Time for whoever submitted at the same moment: afterwards all see the same runs.
    time.sleep(from_environment(ApiSettings).settle_seconds)
    return api.keep_oldest(submission.run_name) or started


def wait(
    run_id: str,
    timeout: timedelta | None = None,
    poll_seconds: float = 30.0,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Return when the run succeeded; PipelineFailed when it did not, or not within ``timeout``.

    ``progress`` is told state and running steps at every look. Where no API answers, the run is looked after further.
    """
    api, deadline = PipelinesApi(from_environment(ClusterSettings).namespace), _deadline(timeout)
    while True:
        state = _look(api, run_id, progress)
        if state == "SUCCEEDED":
            return
        if state in FINISHED:
            raise PipelineFailed(api.explain(run_id))
        if time.monotonic() > deadline:
            raise PipelineFailed(f"run {run_id} is still {state} after {timeout}; look at {run_page(run_id)}")
        time.sleep(poll_seconds)


def _deadline(timeout: timedelta | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout.total_seconds()


def _look(api: PipelinesApi, run_id: str, progress: Callable[[str], None] | None) -> str:
    try:
        run = api.run(run_id)
    except ClusterUnreachable as error:
        log.warning("%s; looking again", error)
        return "out of sight"
    if progress is not None:
        progress(progress_of(run))
    return str(run.state)


def cancel(run_id: str) -> bool:
    """Terminate the run; False when it had ended already, or is not known."""
    return PipelinesApi(from_environment(ClusterSettings).namespace).terminate(run_id)


def cancel_named(run_name: str) -> list[str]:
    """Terminate every run of this name that has not ended; their ids."""
    api = PipelinesApi(from_environment(ClusterSettings).namespace)
    return [run_id for run_id in api.live(run_name) if api.terminate(run_id)]
