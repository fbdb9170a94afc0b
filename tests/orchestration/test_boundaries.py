"""The direction of knowledge: dags -> components -> freshrank, and nothing heavy where it would be read often."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import PROJECT_ROOT

ORCHESTRATORS = {"airflow", "kfp", "kubernetes"}
ABOVE = {"freshrank.components", "freshrank.dags"}
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


def modules(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """What ``nodes`` import, with what is imported from it: it may be a module as well."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """Top-level packages imported by ``nodes``."""
    return {name.split(".")[0] for name in modules(nodes)}


ROOMS_ABOVE = {"orchestration", "cli", "components", "dags"}
LIBRARY = [path for path in sources("freshrank") if not ROOMS_ABOVE & set(path.relative_to(PROJECT_ROOT).parts)]
ORCHESTRATION = sources("freshrank/orchestration")


@pytest.mark.parametrize("path", [*LIBRARY, *sources("freshrank/cli")], ids=lambda path: path.name)
def test_the_library_knows_no_orchestrator(path: Path) -> None:
    """Not even inside a function."""
    assert imported(ast.walk(ast.parse(path.read_text()))) & ORCHESTRATORS == set()


@pytest.mark.parametrize("path", [*LIBRARY, *ORCHESTRATION], ids=lambda path: path.name)
def test_the_pipeline_is_handed_in_from_outside(path: Path) -> None:
    """Only the command line and the DAG choose which one; what runs it runs any, and knows no schedule."""
    assert modules(ast.walk(ast.parse(path.read_text()))) & ABOVE == set()


@pytest.mark.parametrize("path", sources("components", "dags"), ids=lambda path: path.name)
def test_what_orchestrators_read_imports_nothing_heavy(path: Path) -> None:
    """Bodies of tasks and components import what they use when they run."""
    assert imported(ast.parse(path.read_text()).body) & HEAVY == set()


@pytest.mark.integration
@pytest.mark.parametrize("dag", sources("dags"), ids=lambda path: path.name)
def test_reading_a_dag_loads_neither_kfp_nor_what_trains(dag: Path) -> None:
    """The DAG processor reads every file again and again."""
    heavy = HEAVY | {"kfp"}
    code = f"import runpy, sys; runpy.run_path({str(dag)!r}); print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


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
