"""The cluster's pipeline differs from the local one only in where steps run; submitting twice starts one run."""

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp_server_api import V2beta1PipelineTaskDetail, V2beta1RunDetails

from freshrank.components import build
from freshrank.components.tasks import IMAGE
from freshrank.errors import ConfigError, PipelineFailed
from freshrank.orchestration.kubeflow import submit as module
from freshrank.orchestration.kubeflow.settings import ApiSettings, ClusterSettings
from freshrank.orchestration.kubeflow.submit import Submission, cancel, prepare, start, wait
from freshrank.recipes import recipe
from freshrank.settings import from_environment, settings
from tests.orchestration.kfp_server import Fault, KfpServer

RUN_DATE = date(2024, 1, 7)
CLUSTER = {
    "FRESHRANK_CLUSTER_IMAGE": "registry.example/freshrank:2",
    "FRESHRANK_CLUSTER_GPUS": "1",
    "FRESHRANK_CLUSTER_NODE_SELECTOR": '{"pool": "gpu"}',
    "FRESHRANK_CLUSTER_MEMORY": "16Gi",
    "FRESHRANK_CLUSTER_HOME_CLAIM": "freshrank-home",
    "FRESHRANK_CLUSTER_SECRET_ENV": '{"FRESHRANK_REDIS_URL": "freshrank-redis:url"}',
    "FRESHRANK_REDIS_URL": "redis:6379,password=hunter2",
}


@pytest.fixture
def cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterSettings:
    for name, value in CLUSTER.items():
        monkeypatch.setenv(name, value)
    return ClusterSettings()


def compiled(path: Path, cluster: ClusterSettings | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's specification, and its Kubernetes part (empty where there is none)."""
    path.write_text(module.compiled(build, cluster))
    spec, *platform = yaml.safe_load_all(path.read_text())
    executors = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
    return spec, executors


def without_placement(spec: dict[str, Any]) -> dict[str, Any]:
    """``spec`` less image, environment, resources and retries."""
    bare = deepcopy(spec)
    for executor in bare["deploymentSpec"]["executors"].values():
        for allowed in ("image", "env", "resources"):
            executor["container"].pop(allowed, None)
    dags = [bare["root"], *(component for component in bare["components"].values() if "dag" in component)]
    for dag in dags:
        for task in dag["dag"]["tasks"].values():
            task.pop("retryPolicy", None)
    return bare


def test_only_placement_differs_between_laptop_and_cluster(cluster: ClusterSettings, tmp_path: Path) -> None:
    """Same steps, same code, same graph, same gate."""
    local, local_platform = compiled(tmp_path / "local.yaml", None)
    remote, remote_platform = compiled(tmp_path / "cluster.yaml", cluster)
    assert without_placement(local) == without_placement(remote)
    assert local_platform == {}
    assert set(remote_platform) == set(remote["deploymentSpec"]["executors"])


def test_every_step_runs_in_the_configured_image(cluster: ClusterSettings, tmp_path: Path) -> None:
    """One image for all steps."""
    spec, _ = compiled(tmp_path / "cluster.yaml", cluster)
    images = {executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()}
    assert images == {"registry.example/freshrank:2"}


def test_only_training_asks_for_the_gpu_and_its_node(cluster: ClusterSettings, tmp_path: Path) -> None:
    """The other steps would hold an accelerator idle."""
    spec, platform = compiled(tmp_path / "cluster.yaml", cluster)
    executors = spec["deploymentSpec"]["executors"]
    resources = {name: executor["container"].get("resources") for name, executor in executors.items()}
    assert resources.pop("exec-train")["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert not [name for name, asked in resources.items() if "accelerator" in asked]
    selectors = {name: part["nodeSelector"]["labels"] for name, part in platform.items() if "nodeSelector" in part}
    assert selectors == {"exec-train": {"pool": "gpu"}}


@pytest.mark.parametrize("nodes", [0, 2])
def test_every_step_but_training_says_how_much_of_a_node_it_needs(
    cluster: ClusterSettings, tmp_path: Path, nodes: int
) -> None:
    """So does the step that only waits for the nodes that train; what is emptied is not asked for."""
    changed = {"train_nodes": nodes, "step_cpu_request": "1500m", "step_memory_request": "3Gi", "step_cpu_limit": ""}
    spec, _ = compiled(tmp_path / "cluster.yaml", cluster.model_copy(update=changed))
    asked = {
        name: {key: value for key, value in executor["container"]["resources"].items() if key.startswith("resource")}
        for name, executor in spec["deploymentSpec"]["executors"].items()
    }
    expected = {"resourceCpuRequest": "1500m", "resourceMemoryRequest": "3Gi", "resourceMemoryLimit": "8Gi"}
    training = {"resourceMemoryRequest": "16Gi", "resourceMemoryLimit": "16Gi"}
    assert asked.pop("exec-train") == (expected if nodes else training)
    assert list(asked.values()) == [expected] * 5


def test_secrets_travel_by_reference(cluster: ClusterSettings, tmp_path: Path) -> None:
    """Every step is told which key of which Secret to read; the value is nowhere in the package."""
    _, platform = compiled(tmp_path / "cluster.yaml", cluster)
    assert "hunter2" not in (tmp_path / "cluster.yaml").read_text()
    for part in platform.values():
        (secret,) = part["secretAsEnv"]
        assert secret["keyToEnv"] == [{"envVar": "FRESHRANK_REDIS_URL", "secretKey": "url"}]


@pytest.mark.parametrize(("claim", "mounts"), [("", 0), ("freshrank-home", 6)])
def test_a_volume_is_mounted_only_when_asked_for(
    cluster: ClusterSettings, tmp_path: Path, claim: str, mounts: int
) -> None:
    """Without a claim the steps exchange artifacts through the object store alone."""
    _, platform = compiled(tmp_path / "cluster.yaml", cluster.model_copy(update={"home_claim": claim}))
    paths = [mount["mountPath"] for part in platform.values() for mount in part.get("pvcMount", [])]
    assert paths == [str(settings().home)] * mounts


def test_a_deterministic_step_is_not_retried(cluster: ClusterSettings, tmp_path: Path) -> None:
    """Validation gives the same answer to the same data; the others may have lost their node."""
    spec, _ = compiled(tmp_path / "cluster.yaml", cluster)
    retried = {name for name, task in spec["root"]["dag"]["tasks"].items() if "retryPolicy" in task}
    assert retried == {"train", "calibrate", "evaluate"}


def test_without_an_image_a_dry_run_shows_the_components_own_and_a_submission_is_refused(
    home: Path, world: Path
) -> None:
    """The components' own image exists in no registry: good enough to read, not to run."""
    assert f"image: {IMAGE}" in str(prepare(build, world, RUN_DATE, recipe()))
    with pytest.raises(ConfigError, match="FRESHRANK_CLUSTER_IMAGE"):
        start(prepare(build, world, RUN_DATE, recipe()))


def test_a_secret_given_by_value_is_refused_without_repeating_it(cluster: ClusterSettings) -> None:
    """Whoever put the secret itself there must not find it in a log."""
    wrong = cluster.model_copy(update={"secret_env": {"FRESHRANK_REDIS_URL": "hunter2"}})
    with pytest.raises(ConfigError, match="secret-name:key") as failure:
        module.compiled(build, wrong)
    assert "hunter2" not in str(failure.value)


def test_a_dry_run_compiles_and_contacts_nothing(cluster: ClusterSettings, world: Path) -> None:
    """No host is configured here, so any contact would fail."""
    submission = prepare(build, world, RUN_DATE, recipe())
    assert submission.run_id is None
    assert submission.arguments["run_date"] == "2024-01-07"
    assert "not submitted" in str(submission)


def test_the_name_of_a_run_is_its_idempotency_key(cluster: ClusterSettings, world: Path) -> None:
    """The same question has the same name; another config or date has another."""
    first, again = (prepare(build, world, RUN_DATE, recipe()).run_name for _ in range(2))
    other = prepare(build, world, RUN_DATE, recipe("baseline")).run_name
    earlier = prepare(build, world, RUN_DATE - timedelta(days=1), recipe()).run_name
    assert first == again
    assert len({first, other, earlier}) == 3


@pytest.fixture
def server(cluster: ClusterSettings, kfp: KfpServer) -> KfpServer:
    return kfp


@pytest.fixture
def run_id(server: KfpServer, prepared: Submission) -> str:
    """A run that was submitted."""
    started = start(prepared).run_id
    assert started is not None
    return started


def test_submitting_twice_starts_one_run(server: KfpServer, prepared: Submission) -> None:
    """A retried Airflow task finds the run it started before it was killed."""
    first, second = (start(prepared) for _ in range(2))
    assert first.run_id == second.run_id == "run-0"
    assert len(server.runs) == 1


def test_a_run_is_of_a_version_named_by_what_was_compiled(
    server: KfpServer, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another placement is another version of the same pipeline; parameters are exactly those it declares."""
    first = start(prepare(build, world, RUN_DATE, recipe()))
    monkeypatch.setenv("FRESHRANK_CLUSTER_IMAGE", "registry.example/freshrank:3")
    second = start(prepare(build, world, RUN_DATE, recipe()))
    assert len(server.pipelines) == 1
    assert [first.version, second.version] == [version.display_name for version in server.versions]
    assert [run.pipeline_version_reference.pipeline_version_id for run in server.runs] == [
        version.pipeline_version_id for version in server.versions
    ]
    assert server.runs[0].runtime_config.parameters == first.arguments


def test_two_days_of_the_same_pipeline_share_a_version(server: KfpServer, prepared: Submission) -> None:
    """Only what runs is uploaded anew, not what it is run on."""
    for day in ("2024-01-06", "2024-01-07"):
        arguments = prepared.arguments | {"run_date": day}
        start(replace(prepared, run_name=f"train-ranker-{day}", arguments=arguments))
    assert (len(server.runs), len(server.versions)) == (2, 1)


@pytest.mark.parametrize("ended", ["FAILED", "CANCELED", "CANCELING"])
def test_a_failed_or_cancelled_run_is_started_again(
    server: KfpServer, prepared: Submission, run_id: str, ended: str
) -> None:
    """Only a run that can still succeed stands in the way of a new one."""
    server.runs[0].state = ended
    assert start(prepared).run_id == "run-1"


def test_two_who_submit_at_the_same_moment_end_with_one_run(server: KfpServer, prepared: Submission) -> None:
    """The API lets both create one; afterwards both name the older, and the other is cancelled."""
    together = threading.Barrier(2, timeout=10)
    server.before_creating = together.wait
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(start, [prepared, prepared]))
    assert len(server.runs) == 2
    assert {submission.run_id for submission in both} == {"run-0"}
    assert set(server.terminated) == {"run-1"}


def test_a_run_whose_creation_was_not_answered_is_found_again(server: KfpServer, prepared: Submission) -> None:
    """The server did what it was asked for, then the connection broke: asking anew must not start a second."""
    server.faults = [Fault("POST .*/runs", reset=True, after=True)]
    assert start(prepared).run_id == "run-0"
    assert len(server.runs) == 1


def test_waiting_ends_with_the_run(server: KfpServer, run_id: str) -> None:
    """Success returns; what is at work is told meanwhile."""
    at_work = V2beta1PipelineTaskDetail(display_name="train", state="RUNNING")
    server.script = [
        {"state": "RUNNING", "run_details": V2beta1RunDetails(task_details=[at_work])},
        {"state": "SUCCEEDED", "run_details": None},
    ]
    seen: list[str] = []
    wait(run_id, poll_seconds=0.01, progress=seen.append)
    assert seen == ["RUNNING, train", "SUCCEEDED"]


def test_a_failed_run_names_its_step_and_the_tail_of_its_log(server: KfpServer, run_id: str) -> None:
    """Of the failed tasks, the step and neither its pod's node nor the graph around it."""
    server.logs["train-pod"] = "\n".join([*(f"epoch {number}" for number in range(100)), "CUDA out of memory"])
    server.fail(run_id, "train", "train-pod", "exit code 137")
    with pytest.raises(PipelineFailed) as failure:
        wait(run_id, timedelta(seconds=5))
    text = str(failure.value)
    assert "step 'train' failed: exit code 137" in text
    assert "epoch 99\nCUDA out of memory" in text
    assert "epoch 1\n" not in text
    assert f"{server.url}/#/runs/details/run-0" in text


def test_a_failed_run_is_reported_also_where_logs_cannot_be_had(server: KfpServer, run_id: str) -> None:
    """The API's own service serves no logs, only Kubeflow's pages do."""
    server.fail(run_id, "train-driver", "train-pod")
    with pytest.raises(PipelineFailed, match=r"step 'train' failed\n.*could not be read here\nThe run: http"):
        wait(run_id, timedelta(seconds=5))


def test_a_run_that_somebody_cancelled_is_said_to_be(server: KfpServer, run_id: str) -> None:
    """Nobody looks for a failed step then."""
    server.terminate(run_id)
    with pytest.raises(PipelineFailed, match="ended as CANCELED: somebody cancelled it"):
        wait(run_id, timedelta(seconds=5), poll_seconds=0.01)


def test_waiting_has_an_end(server: KfpServer, run_id: str) -> None:
    """A run that hangs fails whoever waits for it."""
    with pytest.raises(PipelineFailed, match="still PENDING"):
        wait(run_id, timedelta(seconds=0), poll_seconds=0.01)


def test_waiting_outlasts_an_api_that_is_away(server: KfpServer, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on without it, so the wait does too."""
    server.runs[0].state = "SUCCEEDED"
    monkeypatch.setenv("FRESHRANK_KFP_RETRY_SECONDS", "0")
    server.faults = [Fault("GET .*/runs/run-0", status=503, times=3)]
    wait(run_id, timedelta(seconds=10), poll_seconds=0.01)
    assert server.count("GET .*/runs/run-0") == 4


def test_cancelling_ends_the_run_once(server: KfpServer, run_id: str) -> None:
    """A run that has ended, or that nobody knows, is no error."""
    assert cancel(run_id)
    server.runs[0].state = "CANCELED"
    assert not cancel(run_id)
    assert not cancel("run-of-yesterday")
    assert server.terminated == [run_id]


def test_submitting_without_a_host_says_what_to_set(cluster: ClusterSettings, world: Path) -> None:
    """kfp itself would look for a cluster around it."""
    with pytest.raises(ConfigError, match="FRESHRANK_KFP_HOST"):
        start(prepare(build, world, RUN_DATE, recipe()))


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FRESHRANK_CLUSTER_GPUS", "x", r"^FRESHRANK_CLUSTER_GPUS: received 'x', Input should be a valid integer"),
        (
            "FRESHRANK_CLUSTER_SECRET_ENV",
            '{"A": 3}',
            "^FRESHRANK_CLUSTER_SECRET_ENV: received a value that is not repeat",
        ),
        (
            "FRESHRANK_CLUSTER_SECRET_ENV",
            "hunter2",
            "^FRESHRANK_CLUSTER_SECRET_ENV: .*not repeated here, expected JSON",
        ),
        (
            "FRESHRANK_CLUSTER_STEP_MEMORY_LIMIT",
            "8 GB",
            "^FRESHRANK_CLUSTER_STEP_MEMORY_LIMIT: received '8 GB', .*16Gi",
        ),
        ("FRESHRANK_CLUSTER_CPU", "two", "^FRESHRANK_CLUSTER_CPU: received 'two', .*expected cores .*500m"),
        ("FRESHRANK_KFP_RETRY_SECONDS", "-1", "^FRESHRANK_KFP_RETRY_SECONDS: received '-1', "),
    ],
)
def test_a_wrong_setting_is_named_and_no_secret_repeated(
    variable: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the steps run, and how the API is spoken to, are read like all settings."""
    monkeypatch.setenv(variable, value)
    kind = ApiSettings if "KFP" in variable else ClusterSettings
    with pytest.raises(ConfigError, match=expected) as refused:
        from_environment(kind)
    assert "hunter2" not in str(refused.value)
