"""A workspace with a small simulated world, prepared for three training days."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from freshrank.bench.paper.evidence_data import Prepared, load_evidence, locate, prepare
from freshrank.config import WindowConfig
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.settings import settings

WORLD = WorldConfig(users=250, days=7, items_at_start=150, new_items_per_day=20, impressions_per_day=2400)
WINDOWS = WindowConfig(train_days=3, calibration_days=1, evaluation_days=1)
RUN_DATE = date(2024, 1, 8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """FRESHRANK_HOME of this module's tests."""
    path = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRESHRANK_HOME", str(path))
        settings.cache_clear()
        yield path
    settings.cache_clear()
    load_evidence.cache_clear()


@pytest.fixture(scope="module")
def world(home: Path) -> Prepared:
    """The simulated world, its features and frames built."""
    data = simulate(home / "world", WORLD).path
    prepared = locate(data, "sparse", WINDOWS, RUN_DATE)
    prepare(prepared)
    return prepared
