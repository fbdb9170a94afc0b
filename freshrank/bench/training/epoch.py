"""`freshrank bench epoch`: what an epoch gains from encoding a user's sequence once and without its padding.

The naive way runs the user block, sequence encoder included, for every impression and over the padded length. Both
ways train the same weights on the same batches in turn; the losses they end with are compared, so a gain that
changed the result would show.
"""

import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.progress import track
from torch import Tensor

from freshrank.bench.paper.evidence_data import Prepared, load_evidence, prepare
from freshrank.bench.paper.rows import BASELINE, ROWS, config_of, layers_of, tuned
from freshrank.models.ranker import Inputs, Ranker
from freshrank.reports.report import library_versions
from freshrank.storage.files import write_json
from freshrank.training.batches import Batch, Encoded, TensorFrame
from freshrank.training.device import Device
from freshrank.training.loop import fit


class EpochBench(BaseModel):
    """Ratios of one run, side by side; absolute times are of no use elsewhere."""

    rows: int
    """Impressions trained on per timing."""
    threads: int
    speed_up: float
    """Median over pairs of naive seconds / our seconds."""
    lowest: float
    highest: float
    loss_difference: float
    """Largest difference of the mean loss of any part of the curve."""
    versions: dict[str, str]


class _First(TensorFrame):
    """The first ``count`` batches of an epoch."""

    def __init__(self, whole: TensorFrame, count: int) -> None:
        self.__dict__.update(whole.__dict__)
        self.count = count

    def batches(self, size: int, generator: torch.Generator | None = None) -> Any:
        return islice(super().batches(size, generator), self.count)


class _PerImpression(_First):
    """The user block repeated for every impression."""

    def batch(self, rows: Tensor) -> Batch:
        once = super().batch(rows)
        index = once.inputs["user_index"]
        users = {*self.users, "sequence_items", "sequence_categorical"} & set(once.inputs)
        repeated = {name: once.inputs[name][index] for name in users}
        inputs = once.inputs | repeated | {"user_index": torch.arange(len(rows), device=index.device)}
        return Batch(inputs, once.labels, once.cold)


class _Padded(Ranker):
    """All sequences encoded at their padded length."""

    def _sequence(self, inputs: Inputs) -> Tensor:
        return self._padded_sequence(inputs)


def epoch(prepared: Prepared, steps: int, repeats: int, out: Path, console: Console) -> EpochBench:
    """Time both ways ``repeats`` times in turn over ``steps`` batches; write ``out`` as JSON."""
    prepare(prepared)
    config = config_of(
        ROWS[BASELINE], 0, *layers_of(ROWS[BASELINE], tuned(prepared.protocol)), windows=prepared.source.windows
    )
    whole = load_evidence(prepared.source).encoded(config).train
    ways = [(Ranker, _First(whole.data, steps)), (_Padded, _PerImpression(whole.data, steps))]
    timings = [
        [_timed(ranker, Encoded(whole.encoder, data, whole.newest_items), config) for ranker, data in ways]
        for _ in track(range(repeats), "epochs", console=console, disable=not console.is_terminal)
    ]
    ratios = [naive / ours for (ours, _), (naive, _) in timings]
    (_, losses), (_, others) = timings[0]
    result = EpochBench(
        rows=min(len(whole.data), steps * config.training.batch_size),
        threads=torch.get_num_threads(),
        speed_up=median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        loss_difference=max(abs(a - b) for a, b in zip(losses, others, strict=True)),
        versions=library_versions(),
    )
    write_json(out, result.model_dump())
    return result


def _timed(kind: type[Ranker], encoded: Encoded[TensorFrame], config: Any) -> tuple[float, list[float]]:
    torch.manual_seed(config.training.seed)
    device = Device.choose(config.training)
    ranker = kind(encoded.encoder, config.model, config.techniques).to(device.name)
    started = time.perf_counter()
    curve = fit(ranker, encoded.data, encoded.encoder, config.techniques, config.training, device)
    return time.perf_counter() - started, curve.losses["bce"]
