"""Lose the volume, lose the bucket: one command each, and what served serves again."""

import shutil
from pathlib import Path

import pytest

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.errors import ConfigError, MissingArtifact
from freshrank.orchestration.airflow.operator import data_directory
from freshrank.pipeline.backup import back_up_dataset, back_up_models, restore_dataset, restore_models
from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.settings import settings
from freshrank.storage.files import read_json, sha256_of, write_json
from freshrank.storage.object_store import FETCHED, ObjectStore, local_dataset
from freshrank.storage.workspace import Workspace
from tests.homes import DAY_1, Home
from tests.object_stores import BUCKET, Proxy
from tests.serving.tiny_bundles import write_bundle

pytestmark = pytest.mark.integration

SMALL = WorldConfig(users=20, days=3, items_at_start=30, impressions_per_day=60)


@pytest.fixture
def store(proxy: Proxy, request: pytest.FixtureRequest) -> ObjectStore:
    return ObjectStore(f"s3://{BUCKET}/{request.node.name}")


@pytest.fixture
def workspace(home: Path, tmp_path: Path) -> Workspace:
    """Two versions installed, the second serves, one was rejected."""
    space = Workspace.of("x")
    repository = ModelRepository(space.triton)
    for number, weight in enumerate((1.0, 2.0), start=1):
        assert repository.install_version(write_bundle(tmp_path / f"bundle-{number}", weight)) == number
    repository.point_to(Pointer(version=2, previous=1, run_date="2022-05-01", fingerprint="w2.0"))
    write_json(repository.root / "rejected" / "3.json", {"fingerprint": "w3", "reason": "wrong"})
    write_json(space.home / "bindings" / "x.json", {"item_id": {"rows": 3}})
    return space


def state(workspace: Workspace) -> dict[str, str]:
    """What serves and with which bytes; compiled files name the directory they were compiled in."""
    roots = (workspace.triton, workspace.home / "bindings")
    return {
        str(path.relative_to(workspace.home)): sha256_of(path)
        for root in roots
        for path in root.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", "") and path.name != FETCHED
    }


def test_a_lost_model_repository_is_put_back(workspace: Workspace, store: ObjectStore) -> None:
    """Versions under their numbers, the pointer, the configs made from it, what was rejected, codes of strings."""
    back_up_models(workspace, store)
    before = state(workspace)
    shutil.rmtree(workspace.home)
    pointer = restore_models(workspace, store)
    assert pointer is not None
    assert (pointer.version, pointer.previous) == (2, 1)
    assert state(workspace) == before
    assert ModelRepository(workspace.triton)._next_version() == 4
    assert not list(workspace.home.glob(".restore-*"))


def test_a_workspace_of_another_place_takes_it(workspace: Workspace, store: ObjectStore, tmp_path: Path) -> None:
    """A new volume may be mounted elsewhere."""
    back_up_models(workspace, store)
    elsewhere = Workspace.of("x", tmp_path / "elsewhere")
    restore_models(elsewhere, store)
    assert ModelRepository(elsewhere.triton).served() == ModelRepository(workspace.triton).served()


def test_what_serves_is_not_replaced_unasked(workspace: Workspace, store: ObjectStore) -> None:
    """An old copy must not push out a newer version, which stays; with force it does, and takes no version away."""
    back_up_models(workspace, store)
    repository = ModelRepository(workspace.triton)
    newer = Pointer(version=1, run_date="2022-05-01", fingerprint="w1.0")
    repository.point_to(newer)
    assert restore_models(workspace, store) == newer == repository.served()
    assert restore_models(workspace, store, force=True) == repository.served()
    assert repository.served() is not None
    assert repository.versions() == [1, 2]


def test_a_second_copy_sends_what_is_new(workspace: Workspace, store: ObjectStore, proxy: Proxy) -> None:
    """Another version costs its own files, the pointer and a manifest."""
    back_up_models(workspace, store)
    proxy.requests.clear()
    back_up_models(workspace, store)
    assert len(proxy.uploads) == 1


def test_a_bucket_that_was_lost_is_filled_by_the_same_command(workspace: Workspace, store: ObjectStore) -> None:
    """Nothing remembers that it had been sent before."""
    back_up_models(workspace, store)
    store.remove("models/x")
    back_up_models(workspace, store)
    before = state(workspace)
    shutil.rmtree(workspace.home)
    restore_models(workspace, store)
    assert state(workspace) == before


def test_a_dataset_is_sent_and_fetched_day_by_day(store: ObjectStore, home: Path, tmp_path: Path, proxy: Proxy) -> None:
    """A day more costs the files that it changed; the copy is the dataset, byte for byte."""
    data = tmp_path / "simulated"
    simulate(data, SMALL)
    url = back_up_dataset(Dataset.open(data), store)
    local = local_dataset(url)
    assert local == home / "data" / "simulated"
    simulate(data, SMALL.model_copy(update={"days": 4}))
    proxy.requests.clear()
    back_up_dataset(Dataset.open(data), store)
    assert 0 < len(proxy.uploads) < len([path for path in data.rglob("*") if path.is_file()])
    again = local_dataset(url)
    assert Dataset.open(again).days == Dataset.open(data).days
    assert Dataset.open(again).fingerprint(Dataset.open(data).days) == Dataset.open(data).fingerprint(
        Dataset.open(data).days
    )


def test_the_dag_takes_a_url(store: ObjectStore, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its param, or as FRESHRANK_DATASET, where the second slash is lost."""
    url = back_up_dataset(simulate(tmp_path / "simulated", SMALL), store)
    assert data_directory(url) == home / "data" / "simulated"
    monkeypatch.setenv("FRESHRANK_DATASET", url)
    settings.cache_clear()
    assert data_directory("") == home / "data" / "simulated"


def test_what_is_not_kept_is_named(store: ObjectStore, home: Path, tmp_path: Path) -> None:
    """With what there is instead."""
    back_up_dataset(simulate(tmp_path / "simulated", SMALL), store)
    with pytest.raises(MissingArtifact, match="no dataset is kept there"):
        local_dataset(f"{store.url}/datasets/other")
    with pytest.raises(MissingArtifact, match=r"only \['simulated'\]"):
        restore_dataset(tmp_path / "other", store)
    with pytest.raises(MissingArtifact, match="no models are kept"):
        restore_models(Workspace.of("other"), store)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ConfigError, match="not an imported dataset"):
        restore_dataset(tmp_path / "mine", store, "simulated")


@pytest.mark.slow
def test_lose_the_volume(proxy: Proxy, tmp_path: Path) -> None:
    """A day is deployed, workspace and dataset are deleted; after `freshrank restore` the same version answers."""
    lost = Home.make(tmp_path / "lost")
    lost.environment |= {"FRESHRANK_STORAGE_URL": f"s3://{BUCKET}/volume"}
    assert lost.freshrank("serve").returncode == 0
    try:
        done = lost.run(DAY_1)
        assert done.returncode == 0, done.stderr
        served = lost.served
        assert ObjectStore(f"s3://{BUCKET}/volume").newest("models/simulated") is not None, (
            "a deployment is copied at once"
        )
        assert lost.freshrank("backup").returncode == 0
        lost.freshrank("stop")
        shutil.rmtree(lost.data)
        shutil.rmtree(lost.path / "home")
        back = lost.freshrank("restore", "--name", "simulated")
        assert back.returncode == 0, back.stderr
        assert lost.freshrank("restore").returncode == 0, "it may be repeated"
        assert lost.served == served
        assert lost.freshrank("serve").returncode == 0
        ranked = lost.freshrank(
            "rank", "--user", "1", "--candidates", "1,2,3", "--at", "2024-01-08T12:00:00+00:00", "--json"
        )
        assert ranked.returncode == 0, ranked.stderr
    finally:
        lost.freshrank("stop")
    assert read_json(lost.triton / "served.json")["version"] == served["version"]
