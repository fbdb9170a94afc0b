"""Who is judged against whom."""

from pathlib import Path

import pytest

from freshrank.features.encoder import Encoder
from freshrank.pipeline import champion as champion_module
from freshrank.pipeline.champion import Champion, lacking_inputs
from freshrank.pipeline.run import Run
from freshrank.schema import Schema
from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.settings import settings
from freshrank.storage.files import read_json, write_json
from tests.serving.tiny_bundles import write_bundle
from tests.tiny_log import impression, write_log
from tests.worlds import random_frame, tiny_schema


def _with(table: str, **columns: dict[str, object] | None) -> Schema:
    """The tiny schema with columns added, changed, or (None) removed."""
    tree = tiny_schema().model_dump(mode="json")
    tree[table] = {name: column for name, column in (tree[table] | columns).items() if column is not None}
    return Schema.model_validate(tree)


def test_a_champion_fits_a_schema_that_has_gained_columns() -> None:
    """It reads its own features and does not see the new one."""
    grown = _with("items", colour={"role": "content", "kind": "categorical"})
    assert lacking_inputs(tiny_schema(), grown) == []


def test_a_champion_does_not_fit_a_schema_that_lost_or_reshaped_one_of_its_columns() -> None:
    """Both are named."""
    changed = _with("items", duration=None, vector={"role": "content", "kind": "embedding", "dim": 8})
    assert lacking_inputs(tiny_schema(), changed) == ["duration", "vector"]


def test_a_champion_with_other_actions_cannot_be_compared() -> None:
    """Its probabilities are of something else; its action counters are missing as well."""
    lacking = lacking_inputs(tiny_schema(), _with("impressions", save=None))
    assert lacking[0] == "actions"
    assert "item_save_1d" in lacking


def test_the_report_says_why_popularity_stands_in_for_the_champion() -> None:
    """Nobody must believe that nothing serves."""
    champion = Champion(3, "2024-01-07", "f", bundle=Path(), lacking=("duration",))
    assert str(champion) == "popularity (version 3 of 2024-01-07 needs duration)"


def test_the_champion_of_a_day_is_the_newest_version_of_an_earlier_date_whatever_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions of March 3, 5 and 4 are installed, and that of March 5 serves: it was trained on rows that the runs of
    March 5 and before are judged on."""
    monkeypatch.setenv("FRESHRANK_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    data = write_log(tmp_path / "data", [impression(0, 1, 1)]).path
    repository = ModelRepository(Run(data, "2024-03-05").workspace.triton)
    for number, run_date in enumerate(["2024-03-03", "2024-03-05", "2024-03-04"]):
        repository.install_version(bundle_of(tmp_path / run_date, run_date, float(number)))
    repository.point_to(Pointer(version=2, run_date="2024-03-05", fingerprint="w1.0"))
    runs = [Run(data, run_date) for run_date in ("2024-03-06", "2024-03-05", "2024-03-04", "2024-03-03")]
    champions = [champion_module.champion(run) for run in runs]
    settings.cache_clear()
    assert [champion and champion.version for champion in champions] == [2, 3, 1, None]


def bundle_of(path: Path, run_date: str, weight: float) -> Path:
    """A bundle of ``run_date`` with an encoder."""
    bundle = write_bundle(path, weight)
    write_json(bundle / "bundle.json", read_json(bundle / "bundle.json") | {"run_date": run_date})
    Encoder.fit(random_frame(tiny_schema()), tiny_schema(), 1).save(bundle)
    return bundle
