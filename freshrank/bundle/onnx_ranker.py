"""The exported ranker, run by ONNX Runtime: what the server runs, and what judges a bundle."""

import logging
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl

from freshrank.features.encoder import Blocks, Catalog, Encoder
from freshrank.features.frames import Frame

log = logging.getLogger(__name__)
ONNX = "ranker.onnx"
OUTPUTS = ("logits", "probabilities", "score")


class OnnxRanker:
    """A bundle's ONNX file under onnxruntime, scoring blocks or whole frames."""

    def __init__(self, bundle: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(bundle / ONNX), options, providers=["CPUExecutionProvider"])
        self.names = [i.name for i in self.session.get_inputs()]
        self.encoder = Encoder.load(bundle)

    def run(self, blocks: Blocks) -> Blocks:
        """Outputs by name for one set of input blocks."""
        answers = self.session.run(list(OUTPUTS), {name: blocks[name] for name in self.names})
        return dict(zip(OUTPUTS, answers, strict=True))

    def score(self, frame: Frame, items: pl.DataFrame, batch_users: int = 2048) -> Blocks:
        """Outputs for every row of ``frame``, in its order; ``items`` is the content table of sequences."""
        catalog = Catalog.build(items, self.encoder)
        parts = [
            self._score_users(frame, catalog, first, batch_users) for first in range(0, len(frame.users), batch_users)
        ]
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        return {name: np.concatenate([answer[name] for _, answer in parts])[order] for name in OUTPUTS}

    def _score_users(self, frame: Frame, catalog: Catalog, first: int, count: int) -> tuple[np.ndarray, Blocks]:
        rows = frame.rows.with_row_index("place").filter(pl.col("user_row").is_between(first, first + count - 1))
        part = Frame(
            users=frame.users.slice(first, count),
            items=frame.items,
            rows=rows.with_columns(pl.col("user_row") - first),
        )
        return rows["place"].to_numpy(), self.run(self.encoder.inputs(part, catalog))
