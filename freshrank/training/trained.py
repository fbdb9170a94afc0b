"""A trained ranker on disk, and its predictions."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file

from freshrank.config import ModelConfig, TechniquesConfig
from freshrank.features.encoder import Catalog, Encoder
from freshrank.features.frames import Frame
from freshrank.models.ranker import Ranker
from freshrank.storage.files import atomic_write, read_json, write_json
from freshrank.training.batches import Batch as Batch
from freshrank.training.batches import TensorFrame

log = logging.getLogger(__name__)
WEIGHTS = "ranker.safetensors"
DESCRIPTION = "ranker.json"


@dataclass(frozen=True)
class Trained:
    """A trained ranker with what is needed to run and to describe it."""

    ranker: Ranker
    encoder: Encoder
    model: ModelConfig
    techniques: TechniquesConfig
    facts: dict[str, object]

    def save(self, directory: Path) -> None:
        """Weights as safetensors, everything else as JSON."""
        with atomic_write(directory / WEIGHTS) as path:
            save_file({n: t.contiguous() for n, t in self.ranker.state_dict().items()}, path)
        self.encoder.save(directory)
        sections = {"model": self.model.model_dump(), "techniques": self.techniques.model_dump()}
        write_json(directory / DESCRIPTION, sections | {"facts": self.facts})

    @classmethod
    def load(cls, directory: Path) -> "Trained":
        description = read_json(directory / DESCRIPTION)
        encoder = Encoder.load(directory)
        model = ModelConfig.model_validate(description["model"])
        # Older files name the residual alone, the only technique with weights then.
        techniques = description.get("techniques") or {"residual": description["residual"]}
        techniques = TechniquesConfig.model_validate(techniques)
        ranker = Ranker(encoder, model, techniques)
        ranker.load_state_dict(load_file(directory / WEIGHTS))
        return cls(ranker.eval(), encoder, model, techniques, description["facts"])


def predict(trained: Trained, frame: Frame, items: pl.DataFrame, batch_size: int = 8192) -> np.ndarray:
    """Uncalibrated logits [N, A] float32 for every row of ``frame``, in its order."""
    data = TensorFrame(frame, trained.encoder, Catalog.build(items, trained.encoder))
    return predict_encoded(trained, data, batch_size)


def predict_encoded(trained: Trained, data: TensorFrame, batch_size: int = 8192) -> np.ndarray:
    """:func:`predict` on a frame that is encoded already, on the CPU."""
    logits = torch.empty(len(data), len(trained.encoder.schema.actions))
    with torch.inference_mode():
        for rows in data.batches(batch_size):
            logits[rows] = trained.ranker(data.batch(rows).inputs)
    return logits.numpy()
