"""Training on several nodes: what Kubeflow Trainer is asked for, and what becomes of a job that ends in any way."""

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from freshrank.errors import ConfigError, PipelineFailed
from freshrank.orchestration.kubeflow import trainjob
from freshrank.orchestration.kubeflow.settings import ClusterSettings
from freshrank.orchestration.kubeflow.trainjob import NoTrainer, TrainJobs, manifest
from freshrank.pipeline import steps
from freshrank.pipeline.train_worker import main as work
from freshrank.recipes import recipe
from freshrank.settings import settings
from tests.orchestration.kubernetes_api import COMPLETE, FAILED, RUNNING, KubernetesApi, kubernetes_api

CLUSTER = ClusterSettings(
    image="registry.example/freshrank:2",
    gpus=2,
    memory="64Gi",
    home_claim="freshrank-home",
    train_nodes=4,
    node_selector={"pool": "gpu"},
    service_account="trainer",
    secret_env={"AWS_SECRET_ACCESS_KEY": "bucket:secret"},
)
REQUEST = {
    "data": "/var/lib/freshrank/data/$(x)",
    "run_date": "2024-01-07",
    "windows": "{}",
    "model": "{}",
    "techniques": "{}",
    "training": "{}",
}


def an_object(required: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def a_list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT, FREE = {"type": "string"}, {"type": "object"}
COUNT = {"type": "integer", "minimum": 1}
NAME = {"type": "string", "maxLength": 63, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}
AMOUNTS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = an_object(("name",), name=TEXT, env=a_list(FREE), volumeMounts=a_list(FREE), securityContext=FREE)
POD = an_object(
    serviceAccountName=TEXT,
    volumes=a_list(FREE),
    initContainers=a_list(CONTAINER),
    securityContext=FREE,
    containers=a_list(CONTAINER),
    imagePullSecrets=a_list(FREE),
    nodeSelector=AMOUNTS,
    affinity=FREE,
    tolerations=a_list(FREE),
    schedulingGates=a_list(FREE),
)
JOB = an_object(metadata=FREE, spec=an_object(template=an_object(metadata=FREE, spec=POD)))
SET = an_object(metadata=FREE, spec=an_object(replicatedJobs=a_list(an_object(("name",), name=TEXT, template=JOB))))
TRAIN_JOB = an_object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=an_object(("name",), name=NAME, labels=AMOUNTS),
    spec=an_object(
        ("runtimeRef",),
        runtimeRef=an_object(("name",), name=TEXT, apiGroup=TEXT, kind=TEXT),
        activeDeadlineSeconds=COUNT,
        trainer=an_object(
            image=TEXT,
            command=a_list(TEXT),
            args=a_list(TEXT),
            env=a_list(an_object(("name",), name=TEXT, value=TEXT, valueFrom=FREE)),
            numNodes={"type": "integer", "minimum": 0},
            numProcPerNode=COUNT,
            resourcesPerNode=an_object(limits=AMOUNTS, requests=AMOUNTS),
        ),
        runtimePatches=a_list(
            an_object(("manager",), manager=TEXT, time=TEXT, trainingRuntimeSpec=an_object(template=SET))
        ),
    ),
)
"""What the resource takes, as Kubeflow Trainer 2.3 declares it; a key that it does not know is dropped in silence."""


@pytest.fixture
def job(home: Path) -> dict[str, Any]:
    return manifest("freshrank-train-0123456789abcdef", REQUEST, CLUSTER)


def test_the_manifest_is_what_the_resource_takes(job: dict[str, Any]) -> None:
    """With all that can be set, and with as little as can be."""
    jsonschema.validate(job, TRAIN_JOB)
    bare = ClusterSettings(image="i", home_claim="c", train_nodes=2)
    jsonschema.validate(manifest("freshrank-train-0", REQUEST, bare), TRAIN_JOB)


def test_every_node_runs_torchrun_on_all_its_gpus(job: dict[str, Any]) -> None:
    """One process a GPU; who is first, and where, Trainer tells each pod."""
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 2)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "2", "memory": "64Gi"}
    assert trainer["command"] == ["python", "-m", "freshrank.training.torchrun_agent"]
    assert "--rdzv-conf=join_timeout=600" in trainer["args"]
    assert "--rdzv-endpoint=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)" in trainer["args"]


def test_the_worker_is_asked_what_the_step_was_asked(job: dict[str, Any]) -> None:
    """Kubernetes reads $( in arguments as a variable unless it is doubled."""
    *_, module, worker, request = job["spec"]["trainer"]["args"]
    assert (module, worker) == ("-m", "freshrank.pipeline.train_worker")
    assert json.loads(request.replace("$$(", "$(")) == REQUEST
    assert "$(x)" not in request.replace("$$(", "")


def test_the_nodes_share_workspace_and_secrets_by_reference(job: dict[str, Any]) -> None:
    """At the same path as the step's; the value of a secret is nowhere."""
    (patch,) = job["spec"]["runtimePatches"]
    pod = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert {"name": "home", "persistentVolumeClaim": {"claimName": "freshrank-home"}} in pod["volumes"]
    assert {"name": "home", "mountPath": str(settings().home)} in pod["containers"][0]["volumeMounts"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    env = {each["name"]: each for each in job["spec"]["trainer"]["env"]}
    assert env["AWS_SECRET_ACCESS_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "bucket", "key": "secret"}}
    assert env["FRESHRANK_HOME"]["value"] == str(settings().home)
    assert not {name for name in env if name.startswith("PET_")}, "Trainer keeps these for itself"


@pytest.mark.parametrize("lacking", ["image", "home_claim"])
def test_nodes_without_image_or_shared_workspace_are_refused(home: Path, lacking: str) -> None:
    """They could not find the data, nor one another's files."""
    with pytest.raises(ConfigError, match="FRESHRANK_CLUSTER_IMAGE and FRESHRANK_CLUSTER_HOME_CLAIM"):
        manifest("x", REQUEST, CLUSTER.model_copy(update={lacking: ""}))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KubernetesApi]:
    with kubernetes_api() as server:
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(server.kubeconfig(tmp_path / "config"))
        )
        yield server


@pytest.fixture
def jobs(api: KubernetesApi) -> TrainJobs:
    return TrainJobs.here()


def test_a_job_is_created_awaited_and_removed(
    jobs: TrainJobs, api: KubernetesApi, job: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Each state it goes through is in the step's log, once."""
    api.states = [{}, RUNNING, RUNNING, COMPLETE]
    with caplog.at_level(logging.INFO):
        jobs.run(job, poll_seconds=0)
    assert api.created == [job]
    assert api.deleted == [job["metadata"]["name"]]
    assert caplog.text.count("node: 1 active, 1 ready") == 1
    assert "Complete (JobsCompleted)" in caplog.text


def test_a_failed_job_tells_why_and_is_removed(jobs: TrainJobs, api: KubernetesApi, job: dict[str, Any]) -> None:
    """The condition, and the last lines of the pod that failed; not of those that did not."""
    api.states = [RUNNING, FAILED]
    with pytest.raises(PipelineFailed, match="jobset failed") as failure:
        jobs.run(job, poll_seconds=0)
    assert "node-1:\nCUDA out of memory" in str(failure.value)
    assert "node-0" not in str(failure.value)
    assert api.deleted == [job["metadata"]["name"]]


def test_a_job_that_somebody_deletes_is_not_awaited_for_ever(
    jobs: TrainJobs, api: KubernetesApi, job: dict[str, Any]
) -> None:
    """Nor taken for a success."""
    api.vanish_after, api.states = 2, [RUNNING]
    with pytest.raises(PipelineFailed, match="deleted before it was complete"):
        jobs.run(job, poll_seconds=0)


def test_a_step_that_starts_again_waits_for_the_job_it_left(
    jobs: TrainJobs, api: KubernetesApi, job: dict[str, Any]
) -> None:
    """Its name is that of its inputs; a second one would train the same twice."""
    api.jobs[job["metadata"]["name"]], api.states = job, [RUNNING, RUNNING, COMPLETE]
    jobs.run(job, poll_seconds=0)
    assert api.created == []


def test_a_failed_job_that_was_left_is_replaced(jobs: TrainJobs, api: KubernetesApi, job: dict[str, Any]) -> None:
    """A retry that found the failure of the time before would be none."""
    api.jobs[job["metadata"]["name"]], api.states = job, [FAILED, RUNNING, COMPLETE]
    jobs.run(job, poll_seconds=0)
    assert api.created == [job]


def test_an_overloaded_api_is_asked_again(jobs: TrainJobs, api: KubernetesApi, job: dict[str, Any]) -> None:
    """Hours of training must not be lost to a minute of 503."""
    api.unavailable = 3
    jobs.run(job, poll_seconds=0)
    assert api.deleted == [job["metadata"]["name"]]


def test_a_cluster_without_trainer_is_told_from_a_failure(
    jobs: TrainJobs, api: KubernetesApi, job: dict[str, Any]
) -> None:
    """The resource is unknown: 404 on creation."""
    api.refuse = {"POST": 404}
    with pytest.raises(NoTrainer, match=r"no trainjobs\.trainer\.kubeflow\.org"):
        jobs.run(job, poll_seconds=0)


def test_a_missing_right_is_named(jobs: TrainJobs, api: KubernetesApi, job: dict[str, Any]) -> None:
    """With what the Role must hold."""
    api.refuse = {"POST": 403}
    with pytest.raises(PipelineFailed, match=r"403.*the server says no.*Role in ranking to create, get and delete"):
        jobs.run(job, poll_seconds=0)


def test_a_canceled_step_takes_its_job_with_it(jobs: TrainJobs, api: KubernetesApi, job: dict[str, Any]) -> None:
    """SIGTERM is how Kubernetes ends the pod of a run that a person canceled."""
    api.states = [RUNNING]
    api.on_create = lambda _: threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit):
        jobs.run(job, poll_seconds=0.05)
    assert api.deleted == [job["metadata"]["name"]]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


CONFIG = recipe(
    "baseline", ["training.min_steps=1", "training.batch_size=64", "model.mlp=[16]", "windows.train_days=2"]
)


SECTIONS = {name: getattr(CONFIG, name).model_dump_json() for name in ("windows", "model", "techniques", "training")}


@pytest.fixture(scope="module")
def featured(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the features of the world, to copy."""
    path = tmp_path_factory.mktemp("featured") / "home"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FRESHRANK_HOME", str(path))
        settings.cache_clear()
        steps.build_features(world, "2024-01-07", CONFIG.windows)
        settings.cache_clear()
    return path


@pytest.fixture
def asked(featured: Path, world: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the train step of a small world is asked, on four nodes."""
    for name, value in {"TRAIN_NODES": "4", "IMAGE": "i", "HOME_CLAIM": "c"}.items():
        monkeypatch.setenv(f"FRESHRANK_CLUSTER_{name}", value)
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.05)
    shutil.copytree(featured, home)
    return {"data": str(world), "run_date": "2024-01-07", **SECTIONS}


def test_the_step_hands_on_what_the_nodes_trained(
    asked: dict[str, str], api: KubernetesApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker of the manifest is run as the cluster would run it; the step itself trains nothing, now or again."""
    api.on_create = lambda job: work(job["spec"]["trainer"]["args"][-1])
    with caplog.at_level(logging.INFO):
        facts = trainjob.train(**asked, out=str(tmp_path / "ranker"))
        trainjob.train(**asked, out=str(tmp_path / "again"))
    assert facts["rows"] > 0
    assert (tmp_path / "ranker" / "ranker.safetensors").exists()
    assert len(api.created) == 1
    assert caplog.text.count("state=started") == 1


def test_a_job_that_leaves_nothing_is_a_failure(asked: dict[str, str], api: KubernetesApi, tmp_path: Path) -> None:
    """Another image or another volume: training here instead would hide it."""
    with pytest.raises(PipelineFailed, match="left no ranker"):
        trainjob.train(**asked, out=str(tmp_path / "ranker"))


@pytest.mark.slow
def test_without_trainer_the_step_trains_itself_and_says_so(
    asked: dict[str, str], api: KubernetesApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One process in its own pod."""
    api.refuse = {"POST": 404}
    trainjob.train(**asked, out=str(tmp_path / "ranker"))
    assert "training in this pod, in one process" in caplog.text
    assert (tmp_path / "ranker" / "ranker.safetensors").exists()
