"""Ranker + calibration -> one ONNX file, its signature, golden answers and the encoder: a version bundle."""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from freshrank.bundle.onnx_ranker import ONNX, OUTPUTS, OnnxRanker
from freshrank.errors import FreshrankError
from freshrank.export.calibration import Platt
from freshrank.features.encoder import Blocks, Catalog
from freshrank.features.frames import Frame
from freshrank.schema import Schema
from freshrank.storage.files import atomic_write, write_json
from freshrank.training.trained import Trained

log = logging.getLogger(__name__)
PARITY_TOLERANCE = 1e-4
"""On logits, torch against onnxruntime: float32 sums in another order."""
_USER_BLOCKS = (
    "user_categorical",
    "user_multi",
    "user_numeric",
    "user_embedding",
    "sequence_items",
    "sequence_actions",
    "sequence_categorical",
)


class CalibratedRanker(nn.Module):
    """inputs -> logits [N, A] (uncalibrated), probabilities [N, A] (calibrated), score [N] (eq. 12)."""

    slope: Tensor
    intercept: Tensor
    utility: Tensor
    shift: Tensor

    def __init__(self, trained: Trained, platt: Platt, names: list[str]) -> None:
        super().__init__()
        self.ranker = trained.ranker
        self.names = names
        self.register_buffer("slope", torch.tensor(platt.slope))
        self.register_buffer("intercept", torch.tensor(platt.intercept))
        self.register_buffer("utility", torch.tensor(trained.encoder.schema.utilities))
        self.register_buffer("shift", platt.fresh_shift * torch.sign(self.utility))
        self.shifted = platt.fresh_shift != 0

    def forward(self, *blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = dict(zip(self.names, blocks, strict=True))
        logits = self.ranker(inputs)
        calibrated = logits * self.slope + self.intercept
        if self.shifted:
            calibrated = calibrated + self.shift * self.ranker.fresh(inputs).unsqueeze(-1)
        probabilities = torch.sigmoid(calibrated)
        return logits, probabilities, probabilities @ self.utility


def export_bundle(
    trained: Trained, platt: Platt, example: Frame, items: pl.DataFrame, out: Path, facts: dict[str, Any]
) -> None:
    """Write a version bundle into ``out``.

    Args:
        example: real rows (a calibration frame) golden answers are taken from.
        items: content table for sequences.
        facts: goes into ``bundle.json``; needs ``fingerprint`` and ``run_date``.

    Raises:
        FreshrankError: the exported graph and the torch model disagree, or an answer is not finite.
    """
    cases = [trained.encoder.inputs(frame, Catalog.build(items, trained.encoder)) for frame in golden_frames(example)]
    names = sorted(cases[0])
    model = CalibratedRanker(trained, platt, names).eval()
    _export(model, cases[0], out / ONNX)
    trained.encoder.save(out)
    exported = OnnxRanker(out)
    answers = [exported.run(case) for case in cases]
    _check_parity(model, cases, answers)
    _write_golden(out, cases, answers)
    write_json(out / "signature.json", signature(trained.encoder.schema, cases[0], answers[0]))
    schema = trained.encoder.schema
    write_json(out / "bundle.json", facts | {"actions": schema.actions, "utilities": schema.utilities})


def golden_frames(example: Frame) -> list[Frame]:
    """A real request, one with every stored feature missing and unknown ids, one real candidate alone."""
    first = example.rows["user_row"][0]
    rows = example.rows.filter(pl.col("user_row") == first).head(50)
    more = example.rows.head(50).with_columns(pl.lit(first).cast(example.rows["user_row"].dtype).alias("user_row"))
    rows = _zero_user(pl.concat([rows, more]))
    real = Frame(users=example.users[int(first) : int(first) + 1], items=example.items, rows=rows)
    return [real, _all_missing(real), Frame(real.users, real.items, rows.head(1))]


def _zero_user(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns((pl.col("user_row") * 0).alias("user_row"))


def _all_missing(frame: Frame) -> Frame:
    def emptied(table: pl.DataFrame, key: str) -> pl.DataFrame:
        empty = [pl.lit(None, table.schema[c]).alias(c) for c in table.columns if c not in (key, "day")]
        return table.with_columns(pl.lit(-1, pl.Int64).alias(key), *empty)

    return Frame(emptied(frame.users, "user_id"), emptied(frame.items, "item_id"), frame.rows)


def signature(schema: Schema, inputs: Blocks, outputs: Blocks) -> dict[str, list[dict[str, Any]]]:
    """Name, dtype and shape (-1 = dynamic) of what the bundle takes and gives."""

    def spec(name: str, block: np.ndarray) -> dict[str, Any]:
        return {"name": name, "dtype": str(block.dtype), "shape": [-1, *block.shape[1:]]}

    return {
        "inputs": [spec(name, block) for name, block in sorted(inputs.items())],
        "outputs": [spec(name, block) for name, block in outputs.items()],
    }


def _export(model: CalibratedRanker, example: Blocks, path: Path) -> None:
    users, rows = torch.export.Dim("users"), torch.export.Dim("rows")
    # Two users in the example: torch.export would take a leading dimension of 1 for a constant.
    doubled = {n: np.concatenate([b, b]) if n in _USER_BLOCKS else b for n, b in example.items()}
    shapes = tuple({0: users if name in _USER_BLOCKS else rows} for name in model.names)
    blocks = tuple(torch.from_numpy(np.ascontiguousarray(doubled[name])) for name in model.names)
    for chatty in ("onnx_ir", "onnxscript", "torch.onnx"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with warnings.catch_warnings(), atomic_write(path) as temporary:
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            blocks,
            str(temporary),
            input_names=model.names,
            output_names=list(OUTPUTS),
            dynamic_shapes={"blocks": shapes},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _check_parity(model: CalibratedRanker, cases: list[Blocks], answers: list[Blocks]) -> None:
    for number, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        with torch.inference_mode():
            expected = model(*(torch.from_numpy(np.ascontiguousarray(case[name])) for name in model.names))
        for name, value in zip(OUTPUTS, expected, strict=True):
            gap = float(np.abs(value.numpy() - answer[name]).max())
            if not gap <= PARITY_TOLERANCE:
                raise FreshrankError(
                    f"export: output '{name}' of golden case {number} differs by {gap:.3g} between torch and ONNX, "
                    f"expected at most {PARITY_TOLERANCE:g}; the bundle is not written"
                )
    log.info("export: %d golden cases agree between torch and onnxruntime", len(cases))


def _write_golden(out: Path, cases: list[Blocks], answers: list[Blocks]) -> None:
    tensors: Blocks = {}
    for number, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        tensors |= {f"case{number}.in.{name}": np.ascontiguousarray(block) for name, block in case.items()}
        tensors |= {f"case{number}.out.{name}": np.ascontiguousarray(block) for name, block in answer.items()}
    with atomic_write(out / "golden.safetensors") as path:
        save_file(tensors, path)
