"""The images, read as text (no engine is at hand), and what of them runs without one: Triton's start, imports."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
import yaml
from tritonclient.grpc import InferenceServerClient

from freshrank import __version__
from freshrank.bench.measure import free_ports
from tests.helm.charts import CHART, container_of, containers, rendered

pytestmark = pytest.mark.integration

IMAGES = CHART / "images"
ROOT = CHART.parent
LAUNCHER = IMAGES / "tritonserver.py"
RELEASED = ("freshrank", "triton", "airflow")


@dataclass
class Stage:
    """One ``FROM`` of the Dockerfile with what follows it."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def of(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]


def stages() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", (IMAGES / "Dockerfile").read_text(), flags=re.MULTILINE)
    by_name: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            by_name[name] = Stage(name, arguments.get(base.removeprefix("$"), base))
        elif instruction == "ARG" and not by_name:
            arguments |= [rest.split("=")]
        elif instruction:
            list(by_name.values())[-1].steps.append((instruction, rest))
    return by_name


def ancestry(name: str) -> list[Stage]:
    """The stage ``name`` and those it is built upon, the outermost first."""
    every = stages()
    return [*(ancestry(every[name].base) if every[name].base in every else []), every[name]]


def copied() -> Iterator[tuple[str, str | None, str]]:
    """Stage, stage that is copied from (None: the checkout) and source of every ``COPY``."""
    for stage in stages().values():
        for text in stage.of("COPY"):
            words = shlex.split(text)
            options = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
            for source in [word for word in words if not word.startswith("--")][:-1]:
                yield stage.name, options.get("from"), source


def pinned(lock: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_there_is_an_image_for_steps_triton_and_airflow() -> None:
    """One command builds the three, from stages of the same names, under the names that the chart installs."""
    bake = (IMAGES / "docker-bake.hcl").read_text()
    assert set(re.findall(r'^\s+target\s+= "(\w+)"', bake, re.MULTILINE)) == set(RELEASED)
    assert set(RELEASED) <= stages().keys()
    values = yaml.safe_load((CHART / "values.yaml").read_text())["images"]
    registry, version = (re.search(rf'"{name}" {{\n  default = "(.*)"', bake) for name in ("REGISTRY", "VERSION"))
    assert registry is not None
    assert version is not None
    for name in ("freshrank", "triton"):
        assert f'"${{REGISTRY}}/{name}:${{VERSION}}"' in bake
        assert values[name] | {"digest": ""} == {
            "repository": f"{registry[1]}/{name}",
            "tag": version[1],
            "digest": "",
        }


def test_the_version_of_the_images_is_that_of_the_project_and_the_chart() -> None:
    """Bake file, package and Chart.yaml agree."""
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__
    assert f'variable "VERSION" {{\n  default = "{__version__}"' in (IMAGES / "docker-bake.hcl").read_text()


def test_every_base_is_pinned() -> None:
    """A stage starts from another one, or from a tag with a whole version; Python is new enough for the project."""
    for stage in stages().values():
        if stage.base not in stages():
            version = re.fullmatch(r"[\w./-]+:(\d+)\.(\d+)\.\d+[\w.-]*", stage.base)
            assert version is not None, stage.base
            assert (int(version[1]), int(version[2])) >= (3, 11)
            assert f'variable "PYTHON_IMAGE" {{\n  default = "{stage.base}"' in (IMAGES / "docker-bake.hcl").read_text()


@pytest.mark.parametrize("name", RELEASED)
def test_an_image_runs_as_the_user_of_the_pods(name: str) -> None:
    """The last word on the user is 1000, as the chart's security context says; nothing is done as root after it."""
    instructions = [instruction for instruction, _ in stages()[name].steps]
    assert stages()[name].of("USER") == ["1000:1000"]
    assert set(instructions[instructions.index("USER") + 1 :]) <= {"CMD", "ENTRYPOINT", "EXPOSE"}


def test_what_airflows_chart_calls_to_probe_is_the_command_it_is_given(tmp_path: Path) -> None:
    """Its probes call /entrypoint, which Airflow's own image has; here it becomes what it is given."""
    (step,) = [text for text in stages()["airflow"].of("RUN") if "/entrypoint" in text]
    (write,) = re.findall(r"printf '.*' > /entrypoint", step)
    script = tmp_path / "entrypoint"
    subprocess.run(["sh", "-c", write.replace("/entrypoint", str(script))], check=True)
    assert script.read_text() == '#!/bin/sh\nexec "$@"\n'
    assert "chmod 755 /entrypoint" in step
    script.chmod(0o755)
    run = subprocess.run([script, "sh", "-c", 'echo "$1"; exit 3', "-", "two  words"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (3, "two  words\n")
    assert stages()["airflow"].of("ENTRYPOINT") == ['["/entrypoint"]']


@pytest.mark.parametrize("name", RELEASED)
def test_an_image_says_what_it_was_built_from(name: str) -> None:
    """Commit, version and time are labels, filled by arguments that the bake file passes."""
    labels = " ".join(text for stage in ancestry(name) for text in stage.of("LABEL"))
    bake = (IMAGES / "docker-bake.hcl").read_text()
    for argument in ("revision", "version", "created"):
        assert f'org.opencontainers.image.{argument}="${argument.upper()}"' in labels
        assert re.search(rf"{argument.upper()}\s+= {argument.upper()}\n", bake)


@pytest.mark.parametrize("name", RELEASED)
def test_tools_that_install_stay_behind(name: str) -> None:
    """No released image descends from the stage with pip, uv and their caches."""
    assert not {stage.name for stage in ancestry(name)} & {"installer", "steps-packages", "triton-packages", "wheel"}


@pytest.mark.parametrize("name", RELEASED)
def test_an_image_has_the_package_installed_and_no_checkout(name: str) -> None:
    """From the wheel, on top of the packages and before anything that uses it; no folder of the sources beside it."""
    (install,) = [text for text in stages()[name].of("RUN") if "pip install" in text]
    assert "from=wheel" in install
    assert "--editable" not in install
    from_checkout = [source for stage, copied_from, source in copied() if stage == name and copied_from is None]
    assert set(from_checkout) <= {"helm/images/tritonserver.py"}
    assert stages()[name].steps.index(("RUN", install)) == 1


def test_triton_has_the_packages_of_its_extra() -> None:
    """Its lock is what the resolver makes of freshrank[serve]; no list is filtered on the way."""
    steps = " ".join(text for stage in ancestry("triton-packages") for text in stage.of("RUN"))
    assert "requirements/serve.lock" in steps
    assert "runtime.lock" not in steps
    assert "grep" not in steps


def test_what_is_copied_is_in_the_checkout_and_not_ignored() -> None:
    """Every source exists, and the ignore file, which leaves out everything else, lets it through."""
    allowed = [
        line.removeprefix("!").rstrip("/")
        for line in (IMAGES / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    sources = [source for _, stage, source in copied() if stage is None]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source.rstrip("/") in (pattern, pattern.partition("/")[0]) for pattern in allowed), source
    assert {stage for _, stage, _ in copied() if stage} <= stages().keys()


def test_packages_come_from_the_lock_files_alone() -> None:
    """Every installation names a lock file or the wheel built here, and resolves nothing but torch's own companions."""
    commands = [text for stage in stages().values() for text in stage.of("RUN")]
    installs = [part for text in commands for part in text.split("&&") if "$UV" in part or "pip install" in part]
    assert len(installs) >= 6
    for part in installs:
        assert re.search(r"requirements/\w+\.lock|/wheels/\*\.whl", part), part
        assert "--no-deps" in part or "^torch==" in part or "bootstrap.lock" in part, part
    (build,) = [text for text in commands if "uv build" in text]
    assert "--build-constraints requirements/runtime.lock" in build
    assert not [text for text in commands if re.search(r"curl|wget|apt-get", text)]


def test_nothing_secret_is_in_the_images() -> None:
    """No argument or variable speaks of one, and no file of the builder's home is let in."""
    for stage in stages().values():
        for text in stage.of("ARG") + stage.of("ENV"):
            assert not re.search(r"PASSWORD|TOKEN|SECRET|CREDENTIAL", text, re.IGNORECASE)
    assert (IMAGES / "Dockerfile.dockerignore").read_text().splitlines()[1] == "*"


def test_locks_of_the_airflow_image_do_not_contradict_each_other() -> None:
    """What only Airflow has is not pinned a second time."""
    assert not pinned("airflow.lock").keys() & pinned("runtime.lock").keys()


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name, name=name.partition(".")[0])

sys.meta_path.insert(0, Absent())
from freshrank.serving.ranking.feast_import import import_feast
import_feast()
import onnxruntime, feast
import freshrank.features.store, freshrank.bundle.golden, freshrank.errors, freshrank.settings
import freshrank.serving.cpu, freshrank.serving.protocol, freshrank.serving.repository, freshrank.storage.workspace
import freshrank.serving.ranking.metrics, freshrank.serving.ranking.query, freshrank.serving.ranking.ranked
import freshrank.serving.ranking.recorder, freshrank.serving.ranking.request_log, freshrank.serving.ranking.served
import freshrank.serving.ranking.service, freshrank.serving.deploy.local_server
"""


def absent_from_triton() -> set[str]:
    """What can be imported here and not in Triton's image: no package of its lock brings it."""
    present = {*pinned("serve.lock"), *pinned("triton.lock"), "freshrank"}
    return {
        module
        for module, packages in packages_distributions().items()
        if not present & {re.sub(r"[-_.]+", "-", package).lower() for package in packages}
    }


def test_triton_and_its_models_import_nothing_that_their_image_leaves_out() -> None:
    """They start where torch, Airflow, Kubeflow and whatever else only others need is not installed."""
    absent = absent_from_triton()
    assert {"torch", "airflow", "kfp", "kubernetes", "great_expectations", "sklearn", "scipy", "matplotlib"} <= absent
    assert not absent & {"feast", "onnxruntime", "polars", "tritonclient"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(absent=absent)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr


def test_what_the_models_import_is_what_that_test_imports() -> None:
    """A module that a model of triton_models/ begins to use must be tried as well; one wants Triton's own around it."""
    used = set()
    for model in ROOT.glob("triton_models/*/model.py"):
        used |= set(re.findall(r"^from (freshrank[\w.]+) import", model.read_text(), re.MULTILINE))
    assert len(used) > 10
    assert used - set(re.findall(r"freshrank[\w.]+", WITHOUT)) == {"freshrank.serving.ranking.tensors"}


@pytest.fixture
def backends(tmp_path: Path) -> dict[str, str]:
    """The environment in which the launcher has assembled its backends, as the build of the image does."""
    environment = os.environ | {"TRITON_BACKENDS": str(tmp_path / "triton" / "backends"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, LAUNCHER, "--assemble"], check=True, env=environment)
    return environment


def test_the_backends_are_readable_by_the_user_of_the_pod(backends: dict[str, str]) -> None:
    """The build makes them as root, Triton reads them as user 1000."""
    folder = Path(backends["TRITON_BACKENDS"])
    for path in (folder.parent, folder, folder / "python"):
        assert path.stat().st_mode & stat.S_IROTH
        assert path.stat().st_mode & stat.S_IXOTH
    assert {file.suffix for file in (folder / "python").iterdir()} >= {".so", ".py"}


def test_the_launcher_is_the_server(backends: dict[str, str], tmp_path: Path) -> None:
    """It becomes tritonserver, with the arguments given; a signal to it ends the server."""
    models, ports = tmp_path / "models", free_ports()
    models.mkdir()
    arguments = [f"--{name}-port={port}" for name, port in ports]
    process = subprocess.Popen(
        [sys.executable, LAUNCHER, f"--model-repository={models}", "--model-control-mode=explicit", *arguments],
        env=backends,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert answers(f"http://127.0.0.1:{ports.http}/v2/health/live", process)
        with urlopen(f"http://127.0.0.1:{ports.http}/v2", timeout=5) as answer:
            assert json.load(answer)["name"] == "triton"
        process.terminate()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def test_a_client_whose_connection_is_ended_loses_no_request(backends: dict[str, str], tmp_path: Path) -> None:
    """It connects anew by itself, after triton.connectionSeconds (give or take a tenth) each time."""
    (age,) = [
        argument
        for argument in container_of(rendered("default", "triton.connectionSeconds=1"), "triton")["args"]
        if "connection-age" in argument
    ]
    with launched(tmp_path, backends, age) as port, InferenceServerClient(f"127.0.0.1:{port}") as client:
        used, deadline = set(), time.monotonic() + 10
        while len(used) < 3 and time.monotonic() < deadline:
            assert client.is_server_live()
            used |= connections_to(port)
    assert len(used) == 3


def test_connections_are_as_old_as_they_like_where_the_value_is_0() -> None:
    """Then Triton is told nothing of their age."""
    arguments = container_of(rendered("default", "triton.connectionSeconds=0"), "triton")["args"]
    assert not [argument for argument in arguments if "connection" in argument]


def connections_to(port: int) -> set[int]:
    """This process's own ports of connections to `port`."""
    opened = psutil.Process().net_connections("tcp")
    return {
        each.laddr.port for each in opened if each.raddr and each.raddr.port == port and each.status == "ESTABLISHED"
    }


@contextmanager
def launched(folder: Path, environment: dict[str, str], *arguments: str) -> Iterator[int]:
    """The gRPC port of the launcher's server with ``arguments`` and no model; it is gone afterwards."""
    models, ports = folder / "models", free_ports()
    models.mkdir()
    process = subprocess.Popen(
        [
            *[sys.executable, LAUNCHER, f"--model-repository={models}", "--model-control-mode=explicit"],
            *[f"--{name}-port={port}" for name, port in ports],
            *arguments,
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert answers(f"http://127.0.0.1:{ports.http}/v2/health/live", process)
        yield ports.grpc
    finally:
        process.kill()
        process.wait()


def answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether ``url`` does before ``process`` ends."""
    while process.poll() is None:
        try:
            urlopen(url, timeout=1).close()
        except (URLError, OSError):
            continue
        return True
    return False


def test_commands_of_the_chart_are_commands_of_the_images() -> None:
    """What the pods start by name is a script of a locked package, of this project, or the launcher."""
    started = {container["command"][0] for container in containers(rendered("production"))}
    ours = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
    assert started <= ours | {"feast", "python3", "tritonserver", "sh", "redis-server"}
    assert "/usr/local/bin/tritonserver" in " ".join(stages()["triton"].of("COPY"))
    assert "feast" in pinned("runtime.lock")
