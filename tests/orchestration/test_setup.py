"""The Makefile and the lock files: commands are written down once, versions are pinned, nothing names a machine."""

import os
import re
import subprocess
import tomllib

import pytest

from tests.paths import PROJECT_ROOT

REQUIREMENTS = PROJECT_ROOT / "requirements"
LOCKS = sorted(REQUIREMENTS.glob("*.lock"))
TARGETS = ("setup", "demo", "serve", "stop", "test", "test-slow", "lint", "format", "lock", "clean")


def make(*arguments: str) -> str:
    # The make that may be running these tests must not speak through its variables.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    run = subprocess.run(["make", *arguments], cwd=PROJECT_ROOT, env=own, capture_output=True, text=True, check=True)
    return run.stdout


def pins(name: str) -> dict[str, str]:
    """Package -> version."""
    lines = [line for line in (REQUIREMENTS / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def canonical(requirement: str) -> str:
    """Package name of a requirement: without extras, version and punctuation."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_listed_and_can_be_made(target: str) -> None:
    """`make help` is how a newcomer finds them."""
    assert f"make {target} " in make("help")
    make("-n", target)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], ""),
        (
            ["DATA=a log", "DATE=2022-05-09", "PROTOCOL=sparse"],
            '--data "a log" --date "2022-05-09" --protocol "sparse"',
        ),
    ],
)
def test_demo_hands_its_variables_to_the_command(arguments: list[str], options: str) -> None:
    """Nothing given means a simulated world and its newest day."""
    joined = " ".join(make("-n", "demo", *arguments).replace("\\\n", " ").split())
    assert joined.endswith(f"-m freshrank demo {options}".strip())


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_pins_versions_and_names_no_place(path: str) -> None:
    """What installs here installs anywhere."""
    lines = [line for line in (REQUIREMENTS / path).read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[\w.]+", line)] == []


def asked_for(*extras: str) -> set[str]:
    """Packages of the base and of ``extras``, with those that they name in turn."""
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    optional: dict[str, list[str]] = project["optional-dependencies"]
    found = {canonical(requirement) for requirement in project["dependencies"]}
    for extra in extras:
        for requirement in optional[extra]:
            inner = re.fullmatch(r"freshrank\[(.*)\]", requirement)
            found |= asked_for(*inner[1].split(",")) if inner else {canonical(requirement)}
    return found


@pytest.mark.parametrize(
    ("lock", "extras", "left_out"),
    [
        ("runtime.lock", ["orchestrate"], set()),
        ("serve.lock", ["serve"], {"torch"}),
        ("test.lock", ["all", "test", "docs"], {"fuxictr"}),
    ],
)
def test_a_lock_holds_everything_the_project_asks_for(lock: str, extras: list[str], left_out: set[str]) -> None:
    """A dependency added to pyproject.toml without `make lock` is noticed here."""
    assert asked_for(*extras) - set(pins(lock)) == left_out


def test_what_the_test_lock_leaves_out_is_in_the_heavy_one() -> None:
    """`make test` brings it."""
    assert asked_for("all", "spark") - set(pins("test.lock")) <= set(pins("heavy.lock"))


def test_tests_run_on_what_is_shipped() -> None:
    """The test lock is the runtime lock and more, and so is the runtime lock to what serves."""
    assert pins("serve.lock").items() <= pins("runtime.lock").items() <= pins("test.lock").items()


def test_neither_the_base_nor_what_serves_brings_an_orchestrator_or_what_judges() -> None:
    """`pip install freshrank` in a web server or a training loop of another project stays small."""
    orchestrators, judges = {"apache-airflow", "kfp", "kubernetes"}, {"great-expectations", "matplotlib", "scipy"}
    assert not asked_for() & (orchestrators | judges | {"feast", "polars"})
    assert not set(pins("serve.lock")) & (orchestrators | judges | {"torch"})
