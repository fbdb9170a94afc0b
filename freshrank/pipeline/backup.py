"""Back up what cannot be recomputed to the object store: imported datasets, the models and the served pointer.

datasets/<name>   the imported directory
models/<name>     installed versions, the pointer, the experiment, notes on rejected versions, codes of strings

Features, checkpoints and the online store are computed from these.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from freshrank.datasets.dataset import MANIFEST, Dataset
from freshrank.errors import ConfigError, MissingArtifact
from freshrank.serving.experiment import FILE as EXPERIMENT
from freshrank.serving.repository import RANKER, ModelRepository, Pointer
from freshrank.storage.files import read_json, write_json
from freshrank.storage.object_store import FETCHED, ObjectStore, configured
from freshrank.storage.workspace import Workspace

log = logging.getLogger(__name__)

STORED_VERSIONS = 3
"""Versions of a backup that the store retains, so that a corrupt newest one can be replaced by the one before."""
_MADE_ANEW = {"model.py", "__pycache__", FETCHED}
"""Belongs to the installed release, not to the model."""


def required_store() -> ObjectStore:
    """The configured store.

    Raises:
        ConfigError: there is none.
    """
    object_store = configured()
    if object_store is None:
        raise ConfigError("FRESHRANK_STORAGE_URL: not set, expected s3://bucket/prefix or file:///directory")
    return object_store


def back_up_dataset(dataset: Dataset, store: ObjectStore) -> str:
    """Upload what changed in the imported directory; returns its location in the store."""
    name = f"datasets/{dataset.schema.name}"
    store.save(name, dataset.path, {"days": len(dataset.days)}, STORED_VERSIONS)
    return f"{store.url}/{name}"


def back_up_models(workspace: Workspace, store: ObjectStore) -> Pointer | None:
    """Upload what changed in the model repository; returns the pointer that is stored with it."""
    repository = ModelRepository(workspace.triton)
    with repository.lock():
        pointer = repository.served()
        names = list(_model_files(workspace, repository))
        facts = {"served": pointer.version if pointer else None}
        store.save(f"models/{workspace.dataset}", workspace.home, facts, STORED_VERSIONS, names)
    return pointer


def _model_files(workspace: Workspace, repository: ModelRepository) -> Iterator[str]:
    roots = [repository.version_directory(version) for version in repository.versions()]
    files = [path for root in roots for path in root.rglob("*") if _MADE_ANEW.isdisjoint(path.relative_to(root).parts)]
    files += [
        *(repository.root / "rejected").glob("*.json"),
        repository.pointer_path,
        repository.root / EXPERIMENT,
        workspace.bindings,
    ]
    home = workspace.home.resolve()
    return (str(path.resolve().relative_to(home)) for path in files if path.is_file())


def restore_dataset(data: Path, store: ObjectStore, name: str | None = None) -> Dataset:
    """The dataset at ``data``, fetched where it is missing, under ``name`` (default: the directory's).

    Raises:
        MissingArtifact: it is not there and the store has none of that name.
        ConfigError: ``data`` holds something else.
    """
    if not (data / MANIFEST).exists():
        if data.exists() and any(data.iterdir()):
            raise ConfigError(
                f"{data}: holds something that is not an imported dataset; name a missing or an empty directory"
            )
        _fetch_dataset(store, name or data.resolve().name, data)
    return Dataset.open(data)


def _fetch_dataset(store: ObjectStore, name: str, data: Path) -> None:
    if store.fetch(f"datasets/{name}", data) is None:
        held = store.names("datasets")
        raise MissingArtifact(
            f"{store.url}/datasets/{name}: nothing is kept there, only {held}; "
            "name one of these, or run `freshrank backup --data DIR` where it is"
        )


def restore_models(workspace: Workspace, store: ObjectStore, force: bool = False) -> Pointer | None:
    """Restore the stored versions and the pointer, the pointer last. None where no model was served.

    Where something serves already it stays, so that a restoration that broke off afterwards can be repeated; with
    ``force`` it is replaced, and so are versions of the same number.

    Raises:
        MissingArtifact: the store has no models of this dataset.
    """
    repository, name = ModelRepository(workspace.triton), f"models/{workspace.dataset}"
    with repository.lock():
        served = repository.served()
        if served and not force:
            log.info("%s: version %s of run %s serves and stays", repository.root, served.version, served.run_date)
            return served
        with _unpacked(store, name, workspace.home) as unpacked:
            return _put_back(
                unpacked / repository.root.relative_to(workspace.home.resolve()), repository, unpacked, workspace
            )


@contextmanager
def _unpacked(store: ObjectStore, name: str, home: Path) -> Iterator[Path]:
    home.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".restore-", dir=home) as temporary:
        if store.fetch(name, Path(temporary) / "kept") is None:
            raise MissingArtifact(
                f"{store.url}/{name}: no models are kept there; run `freshrank backup` where they are"
            )
        yield Path(temporary) / "kept"


def _put_back(backup: Path, repository: ModelRepository, whole: Path, workspace: Workspace) -> Pointer | None:
    for bundle in sorted((backup / "models" / RANKER).glob("*")):
        repository.place_version(bundle, int(bundle.name))
    others = {
        path: repository.root / path.relative_to(backup) for path in [*backup.glob("rejected/*"), backup / EXPERIMENT]
    }
    others[Workspace(whole, workspace.dataset).bindings] = workspace.bindings
    for source, target in others.items():
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, read_json(source))
    if not (backup / repository.pointer_path.name).exists():
        return None
    pointer = Pointer.model_validate(read_json(backup / repository.pointer_path.name))
    repository.point_to(pointer)
    return pointer
