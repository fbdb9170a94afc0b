"""The compiled pipeline: its order, its gate, and components that hold no logic of their own."""

import ast
from typing import Any

import pytest
import yaml

from freshrank.components import build
from freshrank.config import RunConfig, Section
from freshrank.orchestration.kubeflow.submit import compiled

STEPS = {"calibrate", "deploy", "evaluate", "stop", "train", "validate-data"}


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return dict(yaml.safe_load(compiled(build, None)))


@pytest.fixture(scope="module")
def containers(spec: dict[str, Any]) -> dict[str, Any]:
    executors = spec["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor["container"] for name, executor in executors.items()}


def conditional_steps(spec: dict[str, Any]) -> dict[str, str]:
    """Step -> the condition under which it runs."""
    branches = spec["components"]["comp-condition-branches-1"]["dag"]["tasks"]
    return {
        step: branch["triggerPolicy"]["condition"]
        for branch in branches.values()
        for step in spec["components"][branch["componentRef"]["name"]]["dag"]["tasks"]
    }


def test_every_config_section_is_one_parameter(spec: dict[str, Any]) -> None:
    """Kubeflow caches by input: a change of one section leaves the steps that do not read it cached."""
    sections = {name for name, value in RunConfig() if isinstance(value, Section)}
    assert set(spec["root"]["inputDefinitions"]["parameters"]) == {"data", "run_date", "data_version"} | sections


def test_steps_run_in_the_order_of_the_design(spec: dict[str, Any]) -> None:
    """Training waits for validation, and each later step takes what the one before it made."""
    tasks = spec["root"]["dag"]["tasks"]
    waits_for = {name: task.get("dependentTasks", []) for name, task in tasks.items()}
    assert waits_for == {
        "validate-data": [],
        "train": ["validate-data"],
        "calibrate": ["train"],
        "evaluate": ["calibrate"],
        "condition-branches-1": ["calibrate", "evaluate"],
    }


def test_only_a_blessed_model_is_deployed(spec: dict[str, Any]) -> None:
    """Deploy and stop are the two sides of one comparison with the verdict that evaluate returned."""
    blessed = "inputs.parameter_values['pipelinechannel--evaluate-Output'] == 'blessed'"
    assert conditional_steps(spec) == {"deploy": blessed, "stop": f"!({blessed})"}


def test_a_stopped_run_keeps_its_reasons_as_an_artifact(spec: dict[str, Any]) -> None:
    """Whoever opens the run sees why nothing was deployed."""
    assert "reasons" in spec["components"]["comp-stop"]["outputDefinitions"]["artifacts"]


@pytest.mark.parametrize(
    ("step", "artifact", "kind"),
    [
        ("train", "ranker", "system.Model"),
        ("train", "metrics", "system.Metrics"),
        ("calibrate", "bundle", "system.Model"),
        ("validate-data", "report", "system.HTML"),
        ("evaluate", "report", "system.HTML"),
        ("evaluate", "metrics", "system.Metrics"),
    ],
)
def test_artifacts_are_typed(spec: dict[str, Any], step: str, artifact: str, kind: str) -> None:
    """Kubeflow's interface shows metrics and pages only for artifacts of their type."""
    outputs = spec["components"][f"comp-{step}"]["outputDefinitions"]["artifacts"]
    assert outputs[artifact]["artifactType"]["schemaTitle"] == kind


def test_what_depends_on_the_world_is_never_cached(spec: dict[str, Any]) -> None:
    """The verdict depends on the champion; deploy and stop act: an old answer from the cache would be wrong."""
    tasks = dict(spec["root"]["dag"]["tasks"])
    for component in ("comp-condition-2", "comp-condition-3"):
        tasks |= spec["components"][component]["dag"]["tasks"]
    cached = {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached == {"validate-data", "train", "calibrate"}


def test_the_cache_of_the_first_steps_knows_the_version_of_the_data(spec: dict[str, Any]) -> None:
    """The path of the data stays the same from day to day and after a repair."""
    for step in ("validate-data", "train"):
        assert "data_version" in spec["components"][f"comp-{step}"]["inputDefinitions"]["parameters"]


def test_every_step_is_a_component(containers: dict[str, Any]) -> None:
    """Nothing runs that is not listed here."""
    assert set(containers) == STEPS


@pytest.mark.parametrize("step", sorted(STEPS))
def test_a_component_only_calls_freshrank(containers: dict[str, Any], step: str) -> None:
    """At most three statements, and freshrank is all they import."""
    function = function_of(containers[step])
    assert len(function.body) <= 3
    imports = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module.split(".")[0] for node in imports if isinstance(node, ast.ImportFrom) and node.module] == [
        "freshrank"
    ] * len(imports)


def function_of(container: dict[str, Any]) -> ast.FunctionDef:
    """The component's function, out of the source that is shipped in its command."""
    functions = [node for node in ast.parse(container["command"][-1]).body if isinstance(node, ast.FunctionDef)]
    assert len(functions) == 1
    return functions[0]


@pytest.mark.parametrize("step", sorted(STEPS))
def test_a_step_installs_nothing_and_streams_its_output(containers: dict[str, Any], step: str) -> None:
    """What runs is what the image, or this environment, holds."""
    container = containers[step]
    assert "pip install" not in " ".join(container["command"])
    assert {"name": "PYTHONUNBUFFERED", "value": "1"} in container["env"]


def test_compiling_twice_gives_the_same_package(spec: dict[str, Any]) -> None:
    """The idempotency key of a submission hashes the package."""
    assert yaml.safe_load(compiled(build, None)) == spec
