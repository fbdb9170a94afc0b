"""The direction of knowledge: dags -> components -> freshrank, and nothing heavy where it would be read often."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from freshrank.settings import PROJECT_ROOT

ORCHESTRATORS = {"airflow", "kfp", "kubernetes", "components"}
HEAVY = {
    "torch",
    "pandas",
    "polars",
    "numpy",
    "pyarrow",
    "feast",
    "great_expectations",
    "ibis",
    "duckdb",
    "tritonclient",
}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((PROJECT_ROOT / folder).rglob("*.py"))]


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """Top-level packages imported by ``nodes``."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


LIBRARY = [path for path in sources("freshrank") if "orchestration" not in path.parts]
ORCHESTRATION = sources("freshrank/orchestration")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_the_library_knows_no_orchestrator(path: Path) -> None:
    """Not even inside a function."""
    assert imported(ast.walk(ast.parse(path.read_text()))) & ORCHESTRATORS == set()


@pytest.mark.parametrize("path", sources("components", "dags"), ids=lambda path: path.name)
def test_what_orchestrators_read_imports_nothing_heavy(path: Path) -> None:
    """Bodies of tasks and components import what they use when they run."""
    assert imported(ast.parse(path.read_text()).body) & HEAVY == set()


@pytest.mark.parametrize("path", ORCHESTRATION, ids=lambda path: path.name)
def test_orchestration_imports_kfp_only_where_it_runs_it(path: Path) -> None:
    """Importing the operator costs the triggerer no Kubeflow, and nothing is contacted at import."""
    assert {"kfp", "kubernetes"} & imported(ast.parse(path.read_text()).body) == set()


def test_only_the_operator_and_its_trigger_import_airflow() -> None:
    """The runners work where Airflow is not installed."""
    users = [path.name for path in ORCHESTRATION if "airflow" in imported(ast.walk(ast.parse(path.read_text())))]
    assert users == ["operator.py", "trigger.py"]


def test_only_the_train_job_speaks_to_kubernetes() -> None:
    """Everything else asks Kubeflow."""
    users = [path.name for path in ORCHESTRATION if "kubernetes" in imported(ast.walk(ast.parse(path.read_text())))]
    assert users == ["trainjob.py"]
