"""feature_repo/ is generated: Feast finds there what the schema declares."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from freshrank.errors import ConfigError
from freshrank.settings import settings
from tests.paths import PROJECT_ROOT
from tests.tiny_log import impression, write_log

DEFINITIONS = str(PROJECT_ROOT / "feature_repo" / "definitions.py")


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FRESHRANK_DATASET", raising=False)
    settings.cache_clear()
    yield
    settings.cache_clear()


def test_the_repository_exposes_every_view_and_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By module-level names, which is where Feast's command line looks."""
    write_log(tmp_path / "data", [impression(0, 1, 1)])
    monkeypatch.setenv("FRESHRANK_DATASET", str(tmp_path / "data"))
    exposed = set(runpy.run_path(DEFINITIONS))
    views = {f"FeatureView_{name}" for name in ("user_profile", "user_history", "item_content", "item_history")}
    assert views | {"FeatureService_ranking", "Entity_user", "Entity_item"} <= exposed


def test_without_a_dataset_the_error_names_the_variable() -> None:
    """FRESHRANK_DATASET is the one thing it needs."""
    with pytest.raises(ConfigError, match="FRESHRANK_DATASET"):
        runpy.run_path(DEFINITIONS)
