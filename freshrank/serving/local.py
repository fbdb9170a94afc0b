"""The local Triton and model repository of a dataset: each dataset serves from a repository of its own."""

from pathlib import Path

from freshrank.datasets.contract import Dataset
from freshrank.serving.repository import ModelRepository
from freshrank.serving.server import TritonServer
from freshrank.workspace import Workspace


def repository(data: Path) -> ModelRepository:
    return ModelRepository(Workspace.of(Dataset.open(data).schema.name).triton)


def server(data: Path) -> TritonServer:
    return TritonServer(repository(data))
