"""What a row costs: training steps and served latency against the baseline, measured side by side in one process."""

import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel
from rich.console import Console
from rich.progress import track

from freshrank.bench.paper.evidence_data import Evidence, load_evidence
from freshrank.bench.paper.task import Task, predictions_of
from freshrank.bundle.onnx_ranker import OnnxRanker
from freshrank.export.calibration import Platt
from freshrank.export.onnx_export import export_bundle
from freshrank.features.encoder import Blocks, Catalog
from freshrank.features.frames import Frame
from freshrank.storage.derived import fingerprint_of
from freshrank.storage.files import read_json, write_json
from freshrank.training.batches import Encoded, TensorFrame
from freshrank.training.loop import train_encoded
from freshrank.training.trained import Trained

ROWS = 40 * 1024
"""Trained on per epoch and measurement: 40 steps of the default batch size."""
CANDIDATES = 500
_ANSWERS_PER_REPEAT = 20


class Cost(BaseModel):
    """In % of the baseline, 0 = the same."""

    training: float
    latency: float


class _FirstSteps(TensorFrame):
    """The first ``ROWS`` rows of an epoch: length, batch size and learning rate are those of the whole epoch."""

    def __init__(self, whole: TensorFrame) -> None:
        self.__dict__.update(whole.__dict__)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
        return islice(super().batches(size, generator), -(-ROWS // size))


def costs(tasks: dict[str, Task], baseline: Task, repeats: int, console: Console) -> dict[str, Cost]:
    """Cost by row name; kept beside the row's predictions, so a second call measures nothing.

    One process, one thread. The first ``ROWS`` rows of every epoch are trained on in turn with the baseline
    (baseline, row, baseline, row, ...): CPU seconds, building the model included. Then the exported ONNX models
    answer one user with ``CANDIDATES`` candidates in turn: wall seconds. Both are ratios of medians.
    """
    paths = {name: path_of_cost(task, baseline, repeats) for name, task in tasks.items()}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing and repeats:
        _measure({name: (tasks[name], paths[name]) for name in missing}, baseline, repeats, console)
    return {name: Cost.model_validate(read_json(path)) for name, path in paths.items() if path.exists()}


def path_of_cost(task: Task, baseline: Task, repeats: int) -> Path:
    inputs = {"repeats": repeats, "baseline": predictions_of(baseline).name}
    return predictions_of(task) / f"cost-{fingerprint_of(inputs, _measure)}.json"


def _measure(wanted: dict[str, tuple[Task, Path]], baseline: Task, repeats: int, console: Console) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evidence = load_evidence(baseline.source)
    try:
        with tempfile.TemporaryDirectory() as folder:
            base = _Served(_steps(baseline, evidence)[1], evidence, Path(folder) / "baseline")
            for name in track(wanted, "timing", console=console, disable=not console.is_terminal):
                task, path = wanted[name]
                training, trained = _training_ratio(task, baseline, evidence, repeats)
                served = _Served(trained, evidence, Path(folder) / path.parent.name)
                latency = _latency_ratio(served, base, repeats * _ANSWERS_PER_REPEAT)
                write_json(path, Cost(training=100 * (training - 1), latency=100 * (latency - 1)).model_dump())
    finally:
        torch.set_num_threads(threads)


def _steps(task: Task, evidence: Evidence) -> tuple[float, Trained]:
    """CPU seconds of the first steps, and what came of them."""
    whole = evidence.encoded(task.config).train
    few = Encoded(whole.encoder, _FirstSteps(whole.data), whole.newest_items)
    started = time.process_time()
    trained = train_encoded(few, task.config.model, task.config.techniques, task.config.training)
    return time.process_time() - started, trained


def _training_ratio(task: Task, baseline: Task, evidence: Evidence, repeats: int) -> tuple[float, Trained]:
    ours, theirs = [], []
    for _ in range(repeats):
        theirs.append(_steps(baseline, evidence)[0])
        seconds, trained = _steps(task, evidence)
        ours.append(seconds)
    return median(ours) / median(theirs), trained


class _Served:
    """A model under onnxruntime with a request of one user and ``CANDIDATES`` candidates."""

    def __init__(self, trained: Trained, evidence: Evidence, folder: Path) -> None:
        width = len(evidence.schema.actions)
        folder.mkdir()
        platt = Platt(slope=(1.0,) * width, intercept=(0.0,) * width)
        export_bundle(trained, platt, evidence.calibration, evidence.items, folder, {"fingerprint": "", "run_date": ""})
        self.model = OnnxRanker(folder, threads=1)
        self.request: Blocks = trained.encoder.inputs(
            _one_request(evidence.evaluation), Catalog.build(evidence.items, trained.encoder)
        )
        self.answer()

    def answer(self) -> float:
        started = time.perf_counter()
        self.model.run(self.request)
        return time.perf_counter() - started


def _one_request(frame: Frame) -> Frame:
    """The user with the most candidates before a full list of them."""
    user = int(np.bincount(frame.rows["user_row"].to_numpy()).argmax())
    rows = frame.rows.head(CANDIDATES).with_columns((pl.col("user_row") * 0).alias("user_row"))
    return Frame(frame.users[user : user + 1], frame.items, rows)


def _latency_ratio(ours: _Served, theirs: _Served, answers: int) -> float:
    pairs = [(theirs.answer(), ours.answer()) for _ in range(answers)]
    return median(own for _, own in pairs) / median(base for base, _ in pairs)
