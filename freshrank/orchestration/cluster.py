"""Run the same pipeline on a cluster through the Kubeflow Pipelines API. Importing this module contacts nothing."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from freshrank.config import RunConfig
from freshrank.errors import ConfigError, PipelineFailed
from freshrank.orchestration.pipeline import arguments, load_pipeline, outcome
from freshrank.settings import settings, store_endpoint
from freshrank.storage import atomic_write, fingerprint

EXPERIMENT = "freshrank"
PUBLISHER_LABEL = ("freshrank/publisher", "true")
"""The chart's network policies let only pods with this label publish to Triton and write to the online store."""

_TRAINING_TASK = "train"
_DETERMINISTIC_TASK = "validate-data"
_NOT_FOR_STEPS = {"runner", "kfp_host", "dataset"}


class ClusterSettings(BaseSettings):
    """Where the steps run, from environment variables ``FRESHRANK_CLUSTER_<FIELD>``; mappings are JSON."""

    model_config = SettingsConfigDict(env_prefix="FRESHRANK_CLUSTER_", extra="forbid")

    image: str = ""
    """The image with freshrank that the steps run in; a dry run without it shows the components' own name for it."""
    namespace: str = ""
    """Profile on a multi-user installation of Kubeflow, empty on a single-user one."""
    service_account: str = ""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Accelerators of the training step; with ``train_nodes``, of each node."""
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = {}
    """Labels a node must carry for the training step."""
    cpu: str = ""
    memory: str = ""
    """Limit of the training step, as Kubernetes writes it: ``16Gi``."""
    home_claim: str = ""
    """PersistentVolumeClaim mounted at the workspace (``FRESHRANK_HOME``); none when empty."""
    secret_env: dict[str, str] = {}
    """Environment variable -> ``secret:key`` for every step; the value itself never enters the pipeline."""
    retries: Annotated[int, Field(ge=0)] = 2
    train_nodes: Annotated[int, Field(ge=0)] = 0
    """Nodes that train together in a TrainJob of Kubeflow Trainer; 0 trains in the step's own pod, in one process."""
    train_runtime: str = "torch-distributed"
    """The ClusterTrainingRuntime of that TrainJob."""
    train_hours: Annotated[float, Field(gt=0)] = 12
    """After which Kubernetes ends it."""


@dataclass(frozen=True)
class Submission:
    """What was, or with ``dry_run`` would be, sent; ``run_id`` is None after a dry run."""

    run_name: str
    arguments: dict[str, str]
    package: Path
    run_id: str | None

    def __str__(self) -> str:
        if self.run_id is None:
            return f"# {self.run_name}: not submitted\n{self.package.read_text()}"
        return f"{self.run_name}: submitted as run {self.run_id}"


def compile_package(path: Path, cluster: ClusterSettings | None = None) -> None:
    """Write the pipeline as YAML, placed by ``cluster``; None gives what the local runner runs."""
    from kfp import compiler

    place = None if cluster is None else placement(cluster)
    with TemporaryDirectory() as folder:
        package = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(load_pipeline(place), str(package))
        with atomic_write(path) as temporary:
            temporary.write_text(package.read_text())


def placement(cluster: ClusterSettings) -> Callable[[Any], None]:
    """How each task is placed: image, settings, secrets by reference, volume; the training step's node and GPU."""
    secrets = [(variable, *secret_reference(variable, value)) for variable, value in cluster.secret_env.items()]

    def place(task: Any) -> None:
        from kfp import kubernetes

        if cluster.image:
            task.set_container_image(cluster.image)
        kubernetes.add_pod_label(task, *PUBLISHER_LABEL)
        for name, value in step_environment().items():
            task.set_env_variable(name, value)
        for variable, secret, key in secrets:
            kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env={key: variable})
        if cluster.home_claim:
            kubernetes.mount_pvc(task, pvc_name=cluster.home_claim, mount_path=str(settings().home))
        if task.name == _TRAINING_TASK:
            _place_training(task, cluster)
        if task.name != _DETERMINISTIC_TASK:
            task.set_retry(cluster.retries, backoff_duration="60s", backoff_factor=2.0)

    return place


def secret_reference(variable: str, reference: str) -> tuple[str, str]:
    """Secret and key of ``secret:key``; ConfigError where it is anything else."""
    name, separator, key = reference.partition(":")
    if not (name and separator and key):
        # What stands there may be the secret itself, so it is not repeated.
        raise ConfigError(f"FRESHRANK_CLUSTER_SECRET_ENV: {variable} is not of the form secret-name:key")
    return name, key


def step_environment() -> dict[str, str]:
    """What steps read of settings and store, but for secrets."""
    values = settings().model_dump(exclude=_NOT_FOR_STEPS)
    plain = {name: str(value) for name, value in values.items() if not isinstance(value, SecretStr) and value != ""}
    return _of_the_store() | {f"FRESHRANK_{name.upper()}": value for name, value in plain.items()}


def _of_the_store() -> dict[str, str]:
    """What an object store's client reads beside credentials, which travel as ``secret_env``."""
    if not settings().storage_url:
        return {}
    found = {"AWS_ENDPOINT_URL": store_endpoint(), "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION")}
    return {name: value for name, value in found.items() if value}


def _place_training(task: Any, cluster: ClusterSettings) -> None:
    """The node and GPU of the pod that trains; the one that waits for a TrainJob needs neither, but hands them on."""
    from kfp import kubernetes

    if cluster.train_nodes:
        for name, value in cluster.model_dump().items():
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            task.set_env_variable(f"FRESHRANK_CLUSTER_{name.upper()}", text)
        return
    if cluster.gpus:
        task.set_accelerator_type(cluster.gpu_resource).set_accelerator_limit(cluster.gpus)
    if cluster.cpu:
        task.set_cpu_limit(cluster.cpu)
    if cluster.memory:
        task.set_memory_limit(cluster.memory)
    for label, value in cluster.node_selector.items():
        kubernetes.add_node_selector(task, label, value)


def submit(data: Path, run_date: date, config: RunConfig, dry_run: bool = False) -> Submission:
    """Start the pipeline of ``run_date`` on the cluster at ``FRESHRANK_KFP_HOST``, or find the run already started.

    The run's name ends in a fingerprint of pipeline and arguments. A run of that name that is not failed or canceled
    is returned instead of starting a second; ``dry_run`` only compiles and contacts nothing.
    """
    cluster = ClusterSettings()
    if not (cluster.image or dry_run):
        raise ConfigError("FRESHRANK_CLUSTER_IMAGE: not set, expected the image with freshrank that the steps run in")
    package = settings().home / "kfp" / "train-ranker.yaml"
    compile_package(package, cluster)
    parameters = arguments(data, run_date, config)
    key = fingerprint({"pipeline": package.read_text(), "arguments": parameters})
    run_name = f"train-ranker-{run_date.isoformat()}-{key}"
    run_id = None if dry_run else _start(_client(), cluster, package, parameters, run_name)
    return Submission(run_name, parameters, package, run_id)


def _client() -> Any:
    from kfp import Client

    if not settings().kfp_host:
        raise ConfigError("FRESHRANK_KFP_HOST: not set, expected the URL of the Kubeflow Pipelines API")
    return Client(host=settings().kfp_host)


def _start(client: Any, cluster: ClusterSettings, package: Path, parameters: dict[str, str], run_name: str) -> str:
    known = _find(client, cluster.namespace or None, run_name)
    if known is not None:
        return known
    run = client.create_run_from_pipeline_package(
        str(package),
        arguments=parameters,
        run_name=run_name,
        experiment_name=EXPERIMENT,
        namespace=cluster.namespace or None,
        service_account=cluster.service_account or None,
    )
    return str(run.run_id)


def _find(client: Any, namespace: str | None, run_name: str) -> str | None:
    predicate = {"operation": "EQUALS", "key": "display_name", "string_value": run_name}
    page = client.list_runs(
        filter=json.dumps({"predicates": [predicate]}), sort_by="created_at desc", namespace=namespace
    )
    return next(
        (str(run.run_id) for run in page.runs or [] if run.state not in ("FAILED", "CANCELED", "CANCELING")), None
    )


def wait(run_id: str, timeout: timedelta, poll_seconds: float = 30.0) -> None:
    """Return when the run succeeded; PipelineFailed when it did not, or not within ``timeout``."""
    client, deadline = _client(), time.monotonic() + timeout.total_seconds()
    where = f"{settings().kfp_host}/#/runs/details/{run_id}"
    while (run := client.get_run(run_id)).state != "SUCCEEDED":
        if run.state in ("FAILED", "CANCELED", "SKIPPED"):
            raise PipelineFailed(f"run {run_id} ended as {run.state}: {_failed_step(run)}; its log: {where}")
        if time.monotonic() > deadline:
            raise PipelineFailed(f"run {run_id} is still {run.state} after {timeout}; look at {where}")
        time.sleep(poll_seconds)


def _failed_step(run: Any) -> str:
    tasks = (run.run_details.task_details if run.run_details else None) or []
    failed = [task.display_name for task in tasks if task.state == "FAILED"]
    return f"step '{failed[-1]}' failed" if failed else str(run.error or "no step reported a failure")


def run_on_cluster(data: Path, run_date: date, config: RunConfig, timeout: timedelta) -> dict[str, Any]:
    """:func:`submit`, :func:`wait`, and the outcome that the steps left in the shared workspace."""
    run_id = submit(data, run_date, config).run_id
    assert run_id is not None
    wait(run_id, timeout)
    return outcome(data, run_date.isoformat())
