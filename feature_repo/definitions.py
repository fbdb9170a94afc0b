"""Feast's view of the dataset that ``FRESHRANK_DATASET`` names, generated from its ``schema.yaml``."""

from freshrank.datasets.dataset import Dataset
from freshrank.errors import ConfigError
from freshrank.features.store import definitions
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace

path = settings().dataset
if path is None:
    raise ConfigError("FRESHRANK_DATASET: not set; expected the directory of an imported dataset")
schema = Dataset.open(path).schema

# Feast registers what it finds under the names of this module.
globals().update(
    {f"{type(each).__name__}_{each.name}": each for each in definitions(schema, Workspace.of(schema.name))}
)
