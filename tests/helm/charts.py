"""The chart, rendered by the real helm."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).resolve().parents[2] / "helm"

Object = dict[str, Any]


def find_helm() -> str:
    """Beside the interpreter first: a helm of another version on PATH must not decide a test."""
    beside = Path(sys.executable).parent / "helm"
    binary = str(beside) if beside.is_file() else shutil.which("helm")
    if binary is None:
        pytest.fail("helm was found neither beside Python nor on PATH: run `make setup`, which installs it.")
    return binary


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([find_helm(), *arguments], capture_output=True, text=True, check=False, timeout=60)


def values_of(scenario: str) -> list[str]:
    return [] if scenario == "default" else ["--values", str(CHART / "ci" / f"{scenario}-values.yaml")]


def template(scenario: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    settings = [part for override in overrides for part in ("--set-json", override)]
    return helm("template", "freshrank", str(CHART), *values_of(scenario), *settings)


def refusal(*overrides: str, scenario: str = "default") -> str:
    """What helm says when it rejects the values; fails when it accepts them."""
    run = template(scenario, *overrides)
    assert run.returncode != 0, f"{overrides} was accepted"
    return run.stderr


def notes(scenario: str, *overrides: str) -> str:
    """What is said to who installs the release."""
    settings = [part for override in overrides for part in ("--set-json", override)]
    run = helm("install", "freshrank", str(CHART), "--dry-run=client", *values_of(scenario), *settings)
    assert run.returncode == 0, run.stderr
    return run.stdout.partition("\nNOTES:\n")[2]


@cache
def rendered(scenario: str, *overrides: str) -> list[Object]:
    """Every object of the release; an override reads ``path=json``."""
    run = template(scenario, *overrides)
    assert run.returncode == 0, run.stderr
    return [document for document in yaml.safe_load_all(run.stdout) if document]


def rendered_at(home: Path) -> list[Object]:
    """The default release with its workspace at a folder of this machine; the chart refuses one below /tmp."""
    at_default = json.dumps(rendered("default"))
    return list(json.loads(at_default.replace("/var/lib/freshrank", str(home))))


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (match,) = [item for item in of_kind(objects, kind) if item["metadata"]["name"] == name]
    return match


def pods(objects: list[Object]) -> list[Object]:
    """Templates of all pods, those of jobs included."""
    specs = [item.get("spec", {}) for item in objects]
    specs = [spec["jobTemplate"]["spec"] if "jobTemplate" in spec else spec for spec in specs]
    return [spec["template"] for spec in specs if "template" in spec]


def pod_of(objects: list[Object], component: str) -> Object:
    (match,) = [pod for pod in pods(objects) if component_of(pod) == component]
    return match


def component_of(pod: Object) -> str:
    return str(pod["metadata"]["labels"]["app.kubernetes.io/component"])


def container_of(objects: list[Object], component: str) -> Object:
    (container,) = pod_of(objects, component)["spec"]["containers"]
    return dict(container)


def init_container_of(objects: list[Object], component: str) -> Object:
    (container,) = pod_of(objects, component)["spec"]["initContainers"]
    return dict(container)


def containers(objects: list[Object]) -> list[Object]:
    """All of them, those that run before the others included."""
    kinds = ("initContainers", "containers")
    return [container for pod in pods(objects) for kind in kinds for container in pod["spec"].get(kind, [])]


def is_ready(home: Path, port: int) -> bool:
    """The answer of the readiness probe of a Triton with this workspace, whose HTTP port is `port`.

    What the probe keeps in the pod's `/tmp` is in a folder beside the workspace.
    """
    probe = container_of(rendered_at(home), "triton")["readinessProbe"]
    interpreter, *options, script = probe["exec"]["command"]
    assert interpreter == "python3"
    scratch = home.with_name(f"{home.name}-scratch")
    scratch.mkdir(exist_ok=True)
    for there, here in (('"127.0.0.1", 8000', f'"127.0.0.1", {port}'), ('"/tmp/served', f'"{scratch}/served')):
        assert script.count(there) == 1
        script = script.replace(there, here)
    command = [sys.executable, *options, script]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
