"""Training on several nodes: a TrainJob of Kubeflow Trainer that runs torchrun, started and awaited by the train step.

The job is named after everything its ranker depends on. A step that is started again therefore finds the job that it
left behind, and a job that was ended half-way goes on from its checkpoint. Importing this module contacts nothing.
"""

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from freshrank.config import parse_sections
from freshrank.errors import ConfigError, PipelineFailed
from freshrank.orchestration.kubeflow.settings import ClusterSettings, secret_reference, step_environment
from freshrank.pipeline import steps
from freshrank.retry import retrying
from freshrank.settings import from_environment, settings

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
RESTARTS = 3
"""How often torchrun starts all workers anew after one died; they go on from the checkpoint."""
POLL_SECONDS = 10.0
ATTEMPTS = 8
TAIL_LINES = 20

log = logging.getLogger(__name__)
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_MANAGER = "freshrank/train-step"
P = ParamSpec("P")
T = TypeVar("T")


class NoTrainer(Exception):
    """The cluster has no Kubeflow Trainer, or there is no cluster here."""


def train(
    data: str, run_date: str, windows: str, model: str, techniques: str, training: str, out: str
) -> dict[str, Any]:
    """:func:`freshrank.pipeline.steps.train`, on FRESHRANK_CLUSTER_TRAIN_NODES nodes where that is set and
    Trainer is there.

    Raises:
        PipelineFailed: the job failed, was deleted, or left no ranker in the workspace.
    """
    request = {
        "data": data,
        "run_date": run_date,
        "windows": windows,
        "model": model,
        "techniques": techniques,
        "training": training,
    }
    cluster = from_environment(ClusterSettings)
    if cluster.train_nodes:
        _train_on_nodes(request, cluster)
    return steps.train(**parse_sections(request), out=out)


def _train_on_nodes(request: dict[str, str], cluster: ClusterSettings) -> None:
    run, _, key = steps.train_inputs(**parse_sections(request))
    if run.done("train", key):
        return
    job = manifest(f"freshrank-train-{key}", request, cluster)
    try:
        TrainJobs.here().run(job, POLL_SECONDS)
    except NoTrainer as reason:
        log.warning(
            "FRESHRANK_CLUSTER_TRAIN_NODES is %d, but %s; training in this pod, in one process",
            cluster.train_nodes,
            reason,
        )
        return
    if not run.done("train", key):
        raise PipelineFailed(
            f"TrainJob {job['metadata']['name']} is complete, but left no ranker of these inputs in "
            f"{run.workspace.steps}; do its pods have the step's image ({cluster.image}) and volume "
            f"({cluster.home_claim})?"
        )


def manifest(name: str, request: dict[str, str], cluster: ClusterSettings) -> dict[str, Any]:
    """The TrainJob ``name`` that trains what ``request`` asks for.

    Raises:
        ConfigError: no image, or no claim for the workspace that its pods must share.
    """
    if not (cluster.image and cluster.home_claim):
        raise ConfigError(
            f"FRESHRANK_CLUSTER_TRAIN_NODES: received {cluster.train_nodes} with image "
            f"'{cluster.image}' and claim '{cluster.home_claim}'; expected FRESHRANK_CLUSTER_IMAGE and "
            "FRESHRANK_CLUSTER_HOME_CLAIM as well: the nodes share the workspace"
        )
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "freshrank"}},
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": cluster.train_runtime},
            "activeDeadlineSeconds": int(cluster.train_hours * 3600),
            "trainer": _trainer(name, request, cluster),
            "runtimePatches": [_placed(cluster)],
        },
    }


def _trainer(name: str, request: dict[str, str], cluster: ClusterSettings) -> dict[str, Any]:
    limits = {cluster.gpu_resource: str(cluster.gpus)} if cluster.gpus else {}
    limits |= {k: v for k, v in {"cpu": cluster.cpu, "memory": cluster.memory}.items() if v}
    trainer = {
        "image": cluster.image,
        "command": ["python", "-m", "freshrank.training.torchrun_agent"],
        # Doubled, a $ of the request stays one: Kubernetes would look for a variable of that name.
        "args": [*_rendezvous(name), "-m", "freshrank.pipeline.train_worker", json.dumps(request).replace("$(", "$$(")],
        "env": _environment(cluster),
        "numNodes": cluster.train_nodes,
        "numProcPerNode": max(1, cluster.gpus),
    }
    return trainer | ({"resourcesPerNode": {"requests": limits, "limits": limits}} if limits else {})


def _rendezvous(name: str) -> list[str]:
    """How workers find one another anew after one died; how many there are, torchrun reads from PET_NNODES and others.

    Kubernetes puts what Trainer sets into the pod in the place of $(..).
    """
    return [
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)",
        f"--rdzv-id={name}",
        f"--rdzv-conf=join_timeout={ceil(settings().train_connect_seconds)}",
        f"--max-restarts={RESTARTS}",
    ]


def _environment(cluster: ClusterSettings) -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in step_environment().items()]
    for variable, reference in cluster.secret_env.items():
        secret, key = secret_reference(variable, reference)
        plain.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return plain


def _placed(cluster: ClusterSettings) -> dict[str, Any]:
    """What the runtime does not know of the pods: volumes, node, identity."""
    mounts = [{"name": "home", "mountPath": str(settings().home)}, {"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
    pod: dict[str, Any] = {
        "volumes": [
            {"name": "home", "persistentVolumeClaim": {"claimName": cluster.home_claim}},
            # GPUs of one node exchange gradients through it, and a container's own has 64 MiB.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "node",
                "volumeMounts": mounts,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }
    if cluster.node_selector:
        pod["nodeSelector"] = cluster.node_selector
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"manager": _MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


class TrainJobs:
    """The TrainJobs of one namespace, through the Kubernetes API."""

    def __init__(self, client: Any, namespace: str) -> None:
        from kubernetes.client import CoreV1Api, CustomObjectsApi

        self._jobs, self._pods = CustomObjectsApi(client), CoreV1Api(client)
        self.namespace = namespace

    @classmethod
    def here(cls) -> "TrainJobs":
        """Of the namespace that this pod is in, or that the kubeconfig names; NoTrainer where there is neither."""
        from kubernetes import client, config

        try:
            config.load_incluster_config()
            return cls(client.ApiClient(), _NAMESPACE.read_text().strip())
        except config.ConfigException:
            pass
        try:
            _, active = config.list_kube_config_contexts()
            return cls(config.new_client_from_config(), active["context"].get("namespace", "default"))
        except config.ConfigException as error:
            raise NoTrainer(f"no Kubernetes API is known here ({error})") from error

    def run(self, job: dict[str, Any], poll_seconds: float) -> None:
        """Create ``job`` unless it runs already, return when it is complete, and remove it however it ends.

        Raises:
            NoTrainer: the cluster has no such resource.
            PipelineFailed: it failed, somebody deleted it, or the API refuses.
        """
        name = job["metadata"]["name"]
        with _ending_on_sigterm():
            try:
                self._start(job, poll_seconds)
                self._wait(name, poll_seconds)
            finally:
                self._remove(name)

    def _start(self, job: dict[str, Any], poll_seconds: float) -> None:
        name = job["metadata"]["name"]
        while (known := self._get(name)) is not None:
            if _ending(known) is None and "deletionTimestamp" not in known["metadata"]:
                log.info("TrainJob %s/%s runs already", self.namespace, name)
                return
            self._remove(name)
            time.sleep(poll_seconds)
        try:
            self._call(self._jobs.create_namespaced_custom_object, GROUP, VERSION, self.namespace, PLURAL, job)
        except _Refused as refused:
            if refused.status == 404:
                raise NoTrainer(f"the cluster has no {PLURAL}.{GROUP}; install Kubeflow Trainer (v2.3)") from refused
            if refused.status != 409:  # else an attempt of ours whose answer was lost
                raise
        log.info("TrainJob %s/%s is created: %d nodes", self.namespace, name, job["spec"]["trainer"]["numNodes"])

    def _wait(self, name: str, poll_seconds: float) -> None:
        seen = None
        while True:
            job = self._get(name)
            if job is None:
                raise PipelineFailed(f"TrainJob {self.namespace}/{name} was deleted before it was complete")
            state = _state(job)
            if state != seen:
                log.info("TrainJob %s/%s: %s", self.namespace, name, state)
                seen = state
            ending = _ending(job)
            if ending == "Complete":
                return
            if ending == "Failed":
                raise PipelineFailed(f"TrainJob {self.namespace}/{name} failed: {state}\n{self._tail(name)}")
            time.sleep(poll_seconds)

    def _get(self, name: str) -> dict[str, Any] | None:
        try:
            job: dict[str, Any] = self._call(
                self._jobs.get_namespaced_custom_object, GROUP, VERSION, self.namespace, PLURAL, name
            )
        except _Refused as refused:
            if refused.status == 404:
                return None
            raise
        return job

    def _remove(self, name: str) -> None:
        """Its pods go with it. That it cannot be removed must not hide how it ended."""
        try:
            self._call(
                self._jobs.delete_namespaced_custom_object,
                GROUP,
                VERSION,
                self.namespace,
                PLURAL,
                name,
                propagation_policy="Background",
            )
        except PipelineFailed as error:
            if not (isinstance(error, _Refused) and error.status == 404):
                log.warning("TrainJob %s/%s stays: %s", self.namespace, name, error)

    def _tail(self, name: str) -> str:
        """The last lines of each pod that did not end well."""
        selector = f"jobset.sigs.k8s.io/jobset-name={name}"
        try:
            pods = self._call(self._pods.list_namespaced_pod, self.namespace, label_selector=selector).items
            failed = [pod.metadata.name for pod in pods if pod.status.phase == "Failed"]
            return "\n".join(f"{pod}:\n{self._log(pod)}" for pod in failed)
        except PipelineFailed as error:
            return f"the log of its pods cannot be read: {error}"

    def _log(self, pod: str) -> str:
        text: str = self._call(self._pods.read_namespaced_pod_log, pod, self.namespace, tail_lines=TAIL_LINES)
        return text

    def _call(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        def may_pass(error: BaseException) -> bool:
            if isinstance(error, ApiException):
                return not error.status or error.status == 429 or error.status >= 500
            return isinstance(error, HTTPError)

        try:
            return retrying(may_pass, attempts=ATTEMPTS)(function, *arguments, **named)
        except ApiException as error:
            raise _Refused(error.status, self.namespace, error.reason, error.body) from error
        except HTTPError as error:
            raise PipelineFailed(f"the Kubernetes API did not answer {ATTEMPTS} times: {error}") from error


class _Refused(PipelineFailed):
    """The error for a request that the API refused."""

    def __init__(self, status: int, namespace: str, reason: str | None, body: Any) -> None:
        sentence = f"the Kubernetes API answered {status} {reason}: {_message(body)}"
        if status in (401, 403):
            sentence += (
                f"; the step's service account needs a Role in {namespace} to create, get and delete {PLURAL}.{GROUP}, "
                "list pods and get pods/log"
            )
        super().__init__(sentence)
        self.status = status


def _message(body: Any) -> str:
    try:
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(body)


def _ending(job: dict[str, Any]) -> str | None:
    """ "Complete" or "Failed"; None before the end."""
    holding = {c["type"] for c in job.get("status", {}).get("conditions", []) if c["status"] == "True"}
    return next((each for each in ("Failed", "Complete") if each in holding), None)


def _state(job: dict[str, Any]) -> str:
    """What a person wants to know of it, in a line."""
    status = job.get("status", {})
    conditions = [
        f"{c['type']} ({c.get('reason', '')}): {c.get('message', '')}"
        for c in status.get("conditions", [])
        if c["status"] == "True"
    ]
    counts = [f"{each['name']}: {_counts(each)}" for each in status.get("jobsStatus", [])]
    return "; ".join([*conditions, *counts]) or "created"


def _counts(jobs: dict[str, Any]) -> str:
    return ", ".join(f"{jobs[name]} {name}" for name in ("active", "ready", "succeeded", "failed") if jobs.get(name))


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """A canceled run must not leave a job on the GPUs: SIGTERM becomes an exception, and what follows removes it."""

    def end(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
