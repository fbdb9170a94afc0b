"""A home of its own for every test, and one small imported world for all of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.settings import settings
from tests.orchestration.kfp_server import KfpServer, serving


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 2024-01-01 .. 2024-01-06, so that the newest day is yesterday for the run of 2024-01-07."""
    path = tmp_path_factory.mktemp("world") / "small"
    return simulate(path, WorldConfig(users=30, days=6, items_at_start=60, impressions_per_day=120)).path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workspace; settings are read anew before and after the test."""
    monkeypatch.setenv("FRESHRANK_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield tmp_path / "home"
    settings.cache_clear()


@pytest.fixture
def kfp(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A Kubeflow Pipelines API that freshrank is told to use, with little patience."""
    with serving() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()
        yield server
