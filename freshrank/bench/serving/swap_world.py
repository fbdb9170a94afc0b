"""Where `freshrank bench swap` happens: a workspace, a server and two rankers that nothing else uses."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from rich.console import Console

from freshrank.bench.measure import environment, free_ports
from freshrank.config import CalibrationConfig, ModelConfig, TechniquesConfig, TrainingConfig, WindowConfig
from freshrank.datasets.dataset import Dataset
from freshrank.dates import midnight
from freshrank.pipeline import steps
from freshrank.serving.deploy.local_server import LOOPBACK, TritonServer
from freshrank.serving.repository import ModelRepository
from freshrank.settings import settings
from freshrank.storage.files import atomic_directory, read_json, write_json
from freshrank.storage.workspace import Workspace

RANKERS = ("one", "other")
_SMALL = ModelConfig(item_id_dim=8, categorical_dim=8, sequence_dim=16, group_dim=16, mlp=(64, 32), expert_dim=16)
_LONGEST_TRAINING = 5


@dataclass
class SwapWorld:
    """A running server, and ``bundles`` of two rankers by name."""

    dataset: Dataset
    server: TritonServer
    bundles: dict[str, Path]
    home: Path
    copies: int = field(default=0)

    @property
    def url(self) -> str:
        return f"{LOOPBACK}:{self.server.ports.grpc}"

    @property
    def at(self) -> datetime:
        """Noon of the log's last day, whose features the online store holds."""
        return midnight(self.dataset.days[-1], self.dataset.schema.utc_offset_hours) + timedelta(hours=12)

    def unseen(self, name: str) -> Path:
        """A copy of a bundle that counts as a version of its own."""
        self.copies += 1
        with atomic_directory(self.home / "copy") as directory:
            shutil.copytree(self.bundles[name], directory, dirs_exist_ok=True)
            info = read_json(directory / "bundle.json")
            write_json(directory / "bundle.json", info | {"fingerprint": f"{info['fingerprint']}-{self.copies}"})
        return self.home / "copy"


@contextmanager
def swap_world(data: Path, console: Console) -> Iterator[SwapWorld]:
    """Serve ``data`` from ``bench_swap`` in the workspace: the two newest installed versions, or two small rankers."""
    dataset = Dataset.open(data)
    installed = _installed(dataset)
    home = (settings().home / "bench_swap").resolve()
    with environment(HOME=str(home)):
        day = dataset.days[-1].isoformat()
        windows = WindowConfig(train_days=min(_LONGEST_TRAINING, len(dataset.days) - 3))
        console.print("features ...")
        steps.build_features(dataset.path, day, windows)
        steps.materialize(dataset.path, day)
        bundles = {name: home / name for name in RANKERS}
        for number, name in enumerate(RANKERS):
            if len(installed) == len(RANKERS):
                _copy(installed[number], bundles[name])
            else:
                console.print(f"training ranker {name!r} ...")
                _train(dataset, day, windows, number, bundles[name])
        server = _fresh_server(dataset)
        try:
            server.start()
            yield SwapWorld(dataset, server, bundles, home)
        finally:
            server.stop()


def _installed(dataset: Dataset) -> list[Path]:
    """The two newest versions that the dataset's own repository holds."""
    repository = ModelRepository(Workspace.of(dataset.schema.name).triton)
    return [repository.version_directory(version) for version in repository.versions()[-len(RANKERS) :]]


def _copy(bundle: Path, path: Path) -> None:
    with atomic_directory(path) as directory:
        shutil.copytree(bundle, directory, dirs_exist_ok=True)


def _train(dataset: Dataset, day: str, windows: WindowConfig, seed: int, bundle: Path) -> None:
    trained = bundle.with_name(f"{bundle.name}-trained")
    steps.train(dataset.path, day, windows, _SMALL, TechniquesConfig(), TrainingConfig(seed=seed), trained)
    steps.calibrate(dataset.path, day, windows, CalibrationConfig(min_positives=1), trained, bundle)


def _fresh_server(dataset: Dataset) -> TritonServer:
    root = Workspace.of(dataset.schema.name).triton
    TritonServer(ModelRepository(root)).stop()
    shutil.rmtree(root, ignore_errors=True)
    return TritonServer(ModelRepository(root), free_ports())
