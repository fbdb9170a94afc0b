"""One name, one code per string id: a workspace refuses a dataset that would mix up items."""

from pathlib import Path

import polars as pl
import pytest

from freshrank.datasets.bindings import bind
from freshrank.datasets.dataset import Dataset
from freshrank.errors import ConfigError
from freshrank.schema import dump_schema
from freshrank.storage.files import sha256_of, write_json
from freshrank.storage.workspace import Workspace
from tests.worlds import tiny_schema


def _dataset(path: Path, items: list[str]) -> Dataset:
    (path / "mappings").mkdir(parents=True, exist_ok=True)
    file = path / "mappings" / "item_id.parquet"
    pl.DataFrame({"value": items, "code": range(len(items))}).write_parquet(file)
    (path / "schema.yaml").write_text(dump_schema(tiny_schema()))
    mappings = {"item_id": {"rows": len(items), "sha256": sha256_of(file)}}
    write_json(path / "manifest.json", {"days": {}, "files": {}, "mappings": mappings})
    return Dataset.open(path)


def test_an_import_that_appends_ids_fits_wherever_it_lies(tmp_path: Path) -> None:
    """The directory may move and the catalogue may grow."""
    workspace = Workspace(tmp_path / "home", "tiny")
    bind(workspace, _dataset(tmp_path / "a", ["x", "y"]))
    bind(workspace, _dataset(tmp_path / "b", ["x", "y", "z"]))
    bind(workspace, _dataset(tmp_path / "b", ["x", "y", "z"]))


@pytest.mark.parametrize("items", [["y", "x"], ["x"], ["x", "z", "y"]])
def test_ids_mapped_anew_are_refused_with_the_ways_out(tmp_path: Path, items: list[str]) -> None:
    """The code of 'y' was 1; a model trained then must not meet another item under it."""
    workspace = Workspace(tmp_path / "home", "tiny")
    bind(workspace, _dataset(tmp_path / "a", ["x", "y"]))
    with pytest.raises(ConfigError, match=r"'item_id' has other codes .* FRESHRANK_HOME"):
        bind(workspace, _dataset(tmp_path / "b", items))
    bind(workspace, _dataset(tmp_path / "a", ["x", "y"]))


def test_another_name_is_another_workspace(tmp_path: Path) -> None:
    """Two logs side by side do not know each other."""
    bind(Workspace(tmp_path / "home", "tiny"), _dataset(tmp_path / "a", ["x", "y"]))
    bind(Workspace(tmp_path / "home", "other"), _dataset(tmp_path / "b", ["y", "x"]))
