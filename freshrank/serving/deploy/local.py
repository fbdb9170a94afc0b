"""The local Triton and model repository of a dataset: each dataset serves from a repository of its own."""

from pathlib import Path

from freshrank.datasets.bindings import bind
from freshrank.datasets.dataset import Dataset
from freshrank.serving.deploy.local_server import ServerStatus, TritonServer
from freshrank.serving.repository import ModelRepository
from freshrank.storage.workspace import Workspace


def repository(data: Path) -> ModelRepository:
    dataset = Dataset.open(data)
    workspace = Workspace.of(dataset.schema.name)
    bind(workspace, dataset)
    return ModelRepository(workspace.triton)


def server(data: Path) -> TritonServer:
    return TritonServer(repository(data))


def start(data: Path) -> tuple[ServerStatus, list[str]]:
    """Start the Triton of ``data``; the ones of other datasets here that hold its ports are stopped and named."""
    own = server(data)
    stopped = []
    for root in sorted(own.repository.root.parent.glob("*")):
        other = TritonServer(ModelRepository(root))
        if root != own.repository.root and other.status().ports == own.ports and other.stop():
            stopped.append(root.name)
    return own.start(), stopped
