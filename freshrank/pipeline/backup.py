"""What cannot be computed again, kept in the object store: imported datasets, and the models with what serves.

datasets/<name>   the imported directory
models/<name>     installed versions, the pointer, the experiment, notes on rejected versions, codes of strings

Features, checkpoints and the online store are computed from these.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.layout import MANIFEST
from freshrank.errors import ConfigError, MissingArtifact
from freshrank.serving.experiment import FILE as EXPERIMENT
from freshrank.serving.repository import RANKER, ModelRepository, Pointer
from freshrank.storage.files import read_json, write_json
from freshrank.storage.object_store import FETCHED, ObjectStore, configured
from freshrank.storage.workspace import Workspace

log = logging.getLogger(__name__)

KEPT = 3
"""Versions of a copy that the store holds: a broken newest one is not the end."""
_MADE_ANEW = {"model.py", "__pycache__", FETCHED}
"""Belongs to the release that serves, not to the model."""


def store() -> ObjectStore:
    """The configured store.

    Raises:
        ConfigError: there is none.
    """
    found = configured()
    if found is None:
        raise ConfigError("FRESHRANK_STORAGE_URL: not set, expected s3://bucket/prefix or file:///directory")
    return found


def back_up_dataset(dataset: Dataset, keeper: ObjectStore) -> str:
    """Send what changed of the imported directory; returns where it is kept."""
    name = f"datasets/{dataset.schema.name}"
    keeper.save(name, dataset.path, {"days": len(dataset.days)}, KEPT)
    return f"{keeper.url}/{name}"


def back_up_models(workspace: Workspace, keeper: ObjectStore) -> Pointer | None:
    """Send what changed of the model repository; returns the pointer that is kept with it."""
    repository = ModelRepository(workspace.triton)
    with repository.lock():
        pointer = repository.served()
        names = list(_model_files(workspace, repository))
        facts = {"served": pointer.version if pointer else None}
        keeper.save(f"models/{workspace.dataset}", workspace.home, facts, KEPT, names)
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


def restore_dataset(data: Path, keeper: ObjectStore, name: str | None = None) -> Dataset:
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
        _fetch_dataset(keeper, name or data.resolve().name, data)
    return Dataset.open(data)


def _fetch_dataset(keeper: ObjectStore, name: str, data: Path) -> None:
    if keeper.fetch(f"datasets/{name}", data) is None:
        held = keeper.names("datasets")
        raise MissingArtifact(
            f"{keeper.url}/datasets/{name}: nothing is kept there, only {held}; "
            "name one of these, or run `freshrank backup --data DIR` where it is"
        )


def restore_models(workspace: Workspace, keeper: ObjectStore, force: bool = False) -> Pointer | None:
    """Put the kept versions and the pointer back; the pointer moves last. None where nothing served.

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
        with _unpacked(keeper, name, workspace.home) as kept:
            return _put_back(kept / repository.root.relative_to(workspace.home.resolve()), repository, kept, workspace)


@contextmanager
def _unpacked(keeper: ObjectStore, name: str, home: Path) -> Iterator[Path]:
    home.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".restore-", dir=home) as temporary:
        if keeper.fetch(name, Path(temporary) / "kept") is None:
            raise MissingArtifact(
                f"{keeper.url}/{name}: no models are kept there; run `freshrank backup` where they are"
            )
        yield Path(temporary) / "kept"


def _put_back(kept: Path, repository: ModelRepository, whole: Path, workspace: Workspace) -> Pointer | None:
    for bundle in sorted((kept / "models" / RANKER).glob("*")):
        repository.place_version(bundle, int(bundle.name))
    others = {path: repository.root / path.relative_to(kept) for path in [*kept.glob("rejected/*"), kept / EXPERIMENT]}
    others[Workspace(whole, workspace.dataset).bindings] = workspace.bindings
    for source, target in others.items():
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, read_json(source))
    if not (kept / repository.pointer_path.name).exists():
        return None
    pointer = Pointer.model_validate(read_json(kept / repository.pointer_path.name))
    repository.point_to(pointer)
    return pointer
