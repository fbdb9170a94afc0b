"""One config, laptop and cluster: the compiled pipelines differ in what the chart owns, and in nothing else."""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from freshrank.components import build
from freshrank.orchestration.kubeflow import submit as module
from freshrank.orchestration.kubeflow.arguments import arguments
from freshrank.orchestration.kubeflow.settings import ClusterSettings
from freshrank.recipes import recipe
from freshrank.settings import Settings, settings
from tests.paths import PROJECT_ROOT

EVERYTHING = ClusterSettings(
    image="registry.example/freshrank:2",
    namespace="ranking",
    service_account="pipeline",
    gpus=2,
    gpu_resource="amd.com/gpu",
    node_selector={"pool": "gpu"},
    cpu="8",
    memory="16Gi",
    home_claim="freshrank-home",
    secret_env={"FRESHRANK_REDIS_URL": "freshrank-redis:url"},
    retries=3,
    train_runtime="ours",
    train_hours=3,
    step_cpu_request="1500m",
    step_cpu_limit="3",
    step_memory_request="3Gi",
    step_memory_limit="5Gi",
)
"""Every setting of the cluster away from its default, but for training on several nodes."""
NODES = EVERYTHING.model_copy(update={"train_nodes": 4})

CONTAINER = r"deploymentSpec/executors/exec-[\w-]+/container"
PLATFORM = r"platforms/kubernetes/deploymentSpec/executors/exec-[\w-]+"
OWNED = {
    rf"{CONTAINER}/image": "image",
    rf"{CONTAINER}/env/(FRESHRANK_\w+|AWS_ENDPOINT_URL|AWS_DEFAULT_REGION)": "settings",
    r"deploymentSpec/executors/exec-train/container/resources": "gpus, gpu_resource, cpu, memory",
    rf"{CONTAINER}/resources/(resourceC|c)pu(Request|Limit)": "step_cpu_request, step_cpu_limit",
    rf"{CONTAINER}/resources/(resourceM|m)emory(Request|Limit)": "step_memory_request, step_memory_limit",
    r"(root|components/comp-condition[\w-]*)/dag/tasks/[\w-]+/retryPolicy": "retries",
    rf"{PLATFORM}/secretAsEnv": "secret_env",
    rf"{PLATFORM}/pvcMount": "home_claim",
    rf"{PLATFORM}/podMetadata": "the label that network policies let publish",
    r"platforms/kubernetes/deploymentSpec/executors/exec-train/nodeSelector": "node_selector",
}
"""Where the two may differ -> which of the chart's settings says so."""
KFP_ENV = {"PYTHONUNBUFFERED"}


def compiled(path: Path, cluster: ClusterSettings | None) -> dict[str, Any]:
    """The specification with the Kubernetes part in it; environment variables by name."""
    path.write_text(module.compiled(build, cluster))
    whole: dict[str, Any] = {}
    for document in yaml.safe_load_all(path.read_text()):
        whole |= document
    for executor in whole["deploymentSpec"]["executors"].values():
        container = executor["container"]
        container["env"] = {each["name"]: each["value"] for each in container.get("env", [])}
    return whole


def differences(left: Any, right: Any, at: str = "") -> Iterator[str]:
    """Paths at which two trees differ; a branch that only one has is followed as far as some rule may own it."""
    if left == right:
        return
    if isinstance(left, dict | None) and isinstance(right, dict | None) and not _owned(at):
        left, right = left or {}, right or {}
        for key in sorted(set(left) | set(right)):
            yield from differences(left.get(key), right.get(key), f"{at}/{key}".lstrip("/"))
    else:
        yield at


def _owned(path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in OWNED)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    out = tmp_path_factory.mktemp("compiled")
    return compiled(out / "local.yaml", None), compiled(out / "cluster.yaml", EVERYTHING)


def test_laptop_and_cluster_differ_only_in_what_the_chart_owns(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """With everything set that can be; and each rule is needed, so none outlives what it was for."""
    differing = list(differences(*pair))
    assert [path for path in differing if not _owned(path)] == []
    assert [rule for rule in OWNED if not any(re.fullmatch(rule, path) for path in differing)] == []


def test_training_on_several_nodes_is_placement_too(
    pair: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    """The step that waits for the nodes asks for what other steps do and not for what they get, which it hands on."""
    nodes = compiled(tmp_path / "nodes.yaml", NODES)
    assert [path for path in differences(pair[0], nodes) if not _owned(path)] == []
    executors = nodes["deploymentSpec"]["executors"]
    container = executors["exec-train"]["container"]
    assert container["resources"] == executors["exec-evaluate"]["container"]["resources"]
    given = {name.removeprefix("FRESHRANK_CLUSTER_"): value for name, value in container["env"].items()}
    assert {name.lower() for name in given} >= set(ClusterSettings.model_fields)
    assert given["NODE_SELECTOR"] == '{"pool": "gpu"}'


def _other_command(spec: dict[str, Any]) -> None:
    spec["deploymentSpec"]["executors"]["exec-train"]["container"]["command"][-1] += "\n    pass"


def _other_gate(spec: dict[str, Any]) -> None:
    tasks = spec["root"]["dag"]["tasks"]
    condition = next(name for name in tasks if name.startswith("condition"))
    del tasks[condition]


def _other_parameter(spec: dict[str, Any]) -> None:
    spec["root"]["inputDefinitions"]["parameters"]["gate"]["isOptional"] = True


def _cached_verdict(spec: dict[str, Any]) -> None:
    spec["root"]["dag"]["tasks"]["evaluate"]["cachingOptions"] = {"enableCache": True}


def _resources_elsewhere(spec: dict[str, Any]) -> None:
    spec["deploymentSpec"]["executors"]["exec-evaluate"]["container"]["resources"]["accelerator"] = {"count": "1"}


def _foreign_variable(spec: dict[str, Any]) -> None:
    spec["deploymentSpec"]["executors"]["exec-train"]["container"]["env"]["OMP_NUM_THREADS"] = "1"


@pytest.mark.parametrize(
    "tampered",
    [_other_command, _other_gate, _other_parameter, _cached_verdict, _resources_elsewhere, _foreign_variable],
)
def test_any_other_difference_is_found(
    pair: tuple[dict[str, Any], dict[str, Any]], tampered: Callable[[dict[str, Any]], None]
) -> None:
    """Code, graph, parameters, caching, and placement of what must not be placed."""
    local, cluster = pair
    other = deepcopy(cluster)
    tampered(other)
    assert [path for path in differences(local, other) if not _owned(path)]


def test_every_setting_of_the_cluster_was_tried() -> None:
    """A new one must be added to what is compared here."""
    tried, default = EVERYTHING.model_dump(), ClusterSettings().model_dump()
    assert [name for name in tried if tried[name] == default[name]] == ["train_nodes"]


def test_the_chart_sets_every_setting_of_the_cluster() -> None:
    """And none that is not there."""
    named = set(re.findall(r"FRESHRANK_CLUSTER_(\w+):", (PROJECT_ROOT / "helm/templates/pipeline.yaml").read_text()))
    assert named == {name.upper() for name in ClusterSettings.model_fields}


def test_every_variable_that_steps_are_given_is_a_setting(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Where things are, never what is trained; without a store, nothing of one."""
    for executor in pair[1]["deploymentSpec"]["executors"].values():
        assert {name.removeprefix("FRESHRANK_").lower() for name in set(executor["container"]["env"]) - KFP_ENV} <= set(
            Settings.model_fields
        )


def test_steps_are_told_where_the_object_store_is(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """URL, endpoint and region; credentials only by reference."""
    for name, value in {
        "FRESHRANK_STORAGE_URL": "s3://b/p",
        "AWS_ENDPOINT_URL": "http://minio:9000",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_ACCESS_KEY_ID": "someone",
    }.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    spec = compiled(tmp_path / "cluster.yaml", EVERYTHING)
    for executor in spec["deploymentSpec"]["executors"].values():
        env = executor["container"]["env"]
        assert (env["FRESHRANK_STORAGE_URL"], env["AWS_ENDPOINT_URL"]) == ("s3://b/p", "http://minio:9000")
        assert not {"AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"} & set(env)
    assert "hunter2" not in (tmp_path / "cluster.yaml").read_text()


def test_the_arguments_are_those_of_the_config_on_either(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the cluster do not reach them."""
    day, config = date(2024, 1, 7), recipe()
    before = arguments(world, day, config)
    monkeypatch.setenv("FRESHRANK_CLUSTER_GPUS", "8")
    monkeypatch.setenv("FRESHRANK_RUNNER", "cluster")
    assert arguments(world, day, config) == before
