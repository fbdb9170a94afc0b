"""What `pip install freshrank` gives where no checkout is: in parts, and whole."""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import typer.main

from freshrank import __version__
from freshrank.bench.measure import free_ports
from freshrank.cli.main import EXTRAS, app
from freshrank.storage.files import read_json
from tests.homes import LENIENT
from tests.paths import PROJECT_ROOT
from tests.wheel.environments import Environment, build_wheel, link_files

pytestmark = pytest.mark.integration

FOLDERS = ("components", "dags", "feature_repo", "triton_models")

TECHNIQUES = """
import pkgutil, sys
import torch
import freshrank.techniques
names = [module.name for module in pkgutil.iter_modules(freshrank.techniques.__path__, "freshrank.techniques.")]
for name in names:
    __import__(name)
from freshrank.techniques.score_reg import score_reg
regularizer = score_reg(torch.tensor([[0.2], [0.4]]), torch.tensor([True, False]))
assert torch.isfinite(regularizer)
print(len(names))
"""

DAGS = """
from importlib.resources import files
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(dag_folder=str(files("freshrank.dags")))
assert not bag.import_errors, bag.import_errors
print(sorted(bag.dags))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install freshrank`."""
    return Environment.create(tmp_path_factory.mktemp("environment") / "bare", wheel).link("freshrank")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_file_of_the_four_folders_is_in_the_wheel(wheel: Path) -> None:
    """Under the package's name, beside its templates and the mark that it is typed."""
    files = [path for folder in FOLDERS for path in (PROJECT_ROOT / folder).rglob("*") if path.is_file()]
    shipped = {f"freshrank/{path.relative_to(PROJECT_ROOT)}" for path in files if path.suffix != ".pyc"}
    templates = {f"freshrank/reports/templates/{path.name}" for path in PROJECT_ROOT.rglob("freshrank/**/*.j2")}
    assert len(shipped) > 10
    assert shipped | {"freshrank/py.typed"} <= names_in(wheel)
    assert {name for name in templates if "config.pbtxt" not in name} <= names_in(wheel)


def test_the_wheel_installs_the_package_and_nothing_beside_it(wheel: Path) -> None:
    """No `components` or `dags` in the site-packages of somebody else; the license is with the metadata."""
    info = f"freshrank-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names_in(wheel)} == {"freshrank", info}
    assert f"{info}/licenses/LICENSE" in names_in(wheel)
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata


def test_no_module_looks_for_files_above_the_package() -> None:
    """There is nothing of ours there once it is installed."""
    for path in (PROJECT_ROOT / "freshrank").rglob("*.py"):
        assert not re.search(r"__file__.*(\.parent\.parent|\.parents)", path.read_text()), path


def test_the_techniques_need_torch_alone(wheel: Path, tmp_path: Path) -> None:
    """They go into any training loop."""
    result = Environment.create(tmp_path / "torch", wheel).link("torch").run("-c", TECHNIQUES)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 9


def test_the_base_install_has_all_it_asks_for_and_no_orchestrator(bare: Environment) -> None:
    """Neither Airflow nor what reads a log: a web server has the client and not much else."""
    assert bare.check() == ""
    present = {path.name for path in bare.site.iterdir()}
    assert not present & {"airflow", "kfp", "feast", "polars", "great_expectations", "kubernetes", "pandas", "scipy"}


def test_the_base_install_shows_what_there_is(bare: Environment) -> None:
    """Help of everything, and the version, which is that of the package."""
    for arguments in ([], ["train"], ["bench"], ["import", "kuairand"]):
        result = bare.run("-m", "freshrank", *arguments, "--help")
        assert result.returncode == 0, result.stderr
    assert bare.run("-m", "freshrank", "--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("train", "train"),
        ("-v validate", "train"),
        ("serve", "serve"),
        ("run", "orchestrate"),
        ("submit", "orchestrate"),
        ("bench train", "bench"),
    ],
)
def test_a_command_whose_extra_is_missing_says_what_to_install(bare: Environment, command: str, extra: str) -> None:
    """One sentence, and the exit code of a wrong setting."""
    (bare.work / "data").mkdir(exist_ok=True)
    result = bare.run("-m", "freshrank", *command.split(), "--data", "data")
    assert result.returncode == 2, result.stderr
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith(f"freshrank {command.split()[-1] if '-v' in command else command.split()[0]} needs ")
    assert sentence.endswith(f"pip install 'freshrank[{extra}]'")


def test_what_a_command_needs_is_said_of_commands_that_there_are() -> None:
    """And by the names of extras."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert EXTRAS.keys() <= commands.keys()
    assert set(EXTRAS.values()) <= set(distribution("freshrank").metadata.get_all("Provides-Extra"))


@dataclass(frozen=True)
class Day:
    """A directory without a checkout in which a day was run, and its Triton's ports."""

    whole: Environment
    ports: dict[str, str]

    def freshrank(self, *arguments: str, by: Environment | None = None) -> str:
        result = (by or self.whole).run("-m", "freshrank", *arguments, cwd=self.whole.work, **self.ports)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return result.stdout

    def ranked_by(self, environment: Environment) -> list[dict[str, Any]]:
        items = ("--user", "1", "--candidates", "1,2,3", "--at", "2024-01-07T12:00:00+00:00")
        lines = self.freshrank("rank", "--data", "data", *items, "--json", by=environment)
        return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def day(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    """`pip install 'freshrank[all]'` in an empty directory, and Triton as the documentation says: simulate and run."""
    whole = Environment.create(tmp_path_factory.mktemp("environment") / "all", wheel).link("freshrank[all]")
    assert whole.check() == ""
    link_files(distribution("nvidia-pytriton"), whole.site)
    made = Day(whole, {f"FRESHRANK_TRITON_{name.upper()}_PORT": str(port) for name, port in free_ports()})
    made.freshrank("simulate", "--out", "data", "--users", "200", "--days", "6", "--impressions-per-day", "2000")
    try:
        made.freshrank("run", "--data", "data", *(part for each in LENIENT for part in ("--set", each)))
        yield made
    finally:
        made.freshrank("stop", "--data", "data")


@pytest.mark.slow
def test_everything_installed_runs_a_day_from_an_empty_directory(day: Day) -> None:
    """It was blessed, and version 1 answers."""
    (record,) = day.whole.work.glob(".freshrank/runs/*/*/run.json")
    assert read_json(record)["verdict"] == "blessed"
    assert [row["model_version"] for row in day.ranked_by(day.whole)] == [1, 1, 1]


@pytest.mark.slow
def test_the_dags_are_where_airflow_is_told_to_look(day: Day) -> None:
    """In the installed package."""
    home = {"AIRFLOW_HOME": str(day.whole.path / "airflow"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    result = day.whole.run("-c", DAGS, **home)
    assert result.stdout.splitlines()[-1:] == ["['daily_retraining', 'hourly_counters']"], result.stderr


@pytest.mark.slow
def test_what_the_serving_extra_installs_serves_without_torch(
    day: Day, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As in Triton's image: the server is started anew by it, and answers as before."""
    serving = Environment.create(tmp_path_factory.mktemp("environment") / "serve", wheel)
    serving.link("freshrank[serve]", without="torch")
    link_files(distribution("nvidia-pytriton"), serving.site)
    assert not {"torch", "airflow", "kfp", "great_expectations"} & {path.name for path in serving.site.iterdir()}
    before = day.ranked_by(day.whole)
    day.freshrank("stop", "--data", "data")
    day.freshrank("serve", "--data", "data", by=serving)
    assert day.ranked_by(serving) == before
