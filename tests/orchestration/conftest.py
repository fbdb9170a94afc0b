"""A home of its own for every test, and one small imported world for all of them.

Airflow reads its home when it is first imported, so it gets one before any test module is.
"""

import os
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from freshrank.components import build
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.orchestration.kubeflow.submit import Submission, prepare
from freshrank.recipes import recipe
from freshrank.settings import settings
from tests.orchestration.kfp_server import KfpServer, serving

if "AIRFLOW_HOME" not in os.environ:
    os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airflow-")
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 2024-01-01 .. 2024-01-06, so that the newest day is yesterday for the run of 2024-01-07."""
    path = tmp_path_factory.mktemp("world") / "small"
    return simulate(path, WorldConfig(users=30, days=6, items_at_start=60, impressions_per_day=120)).path


@pytest.fixture(scope="session")
def prepared(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Submission:
    """The run of 2024-01-07, compiled once for all tests that submit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRESHRANK_HOME", str(tmp_path_factory.mktemp("compiled")))
        settings.cache_clear()
        submission = prepare(build, world, date(2024, 1, 7), recipe())
    settings.cache_clear()
    return submission


@pytest.fixture
def kfp(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A Kubeflow Pipelines API that freshrank is told to use, with little patience."""
    with serving() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()
        yield server
