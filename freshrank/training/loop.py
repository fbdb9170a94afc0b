"""One pass over the training days: batches by user and day, the paper's objective, Adam.

Rows of the same user and day stand together in a batch, so the user block and its sequence encoder run once
per user and day and not once per impression; users are shuffled within the whole training range.
"""

import functools
import json
import logging
import sys
import time
from collections.abc import Callable

import polars as pl
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from freshrank.config import ModelConfig, TechniquesConfig, TrainingConfig
from freshrank.errors import ConfigError
from freshrank.features.encoder import Encoder
from freshrank.features.frames import Frame
from freshrank.models.ranker import Ranker, count_parameters
from freshrank.schema import Schema
from freshrank.training.augmentations import batch_transforms
from freshrank.training.batches import Batch as Batch
from freshrank.training.batches import BatchSource, Encoded
from freshrank.training.checkpoints import Checkpoints
from freshrank.training.device import Device
from freshrank.training.distributed import ALONE, ProcessGroup
from freshrank.training.objective import objective
from freshrank.training.pretrain_items import pretrain_items
from freshrank.training.state import Generators, State, TrainingCurve
from freshrank.training.trained import Trained

log = logging.getLogger(__name__)
SMALLEST_BATCH = 32

StepWatch = Callable[[int, Ranker, Batch], None]


def train_ranker(
    frame: Frame,
    items: pl.DataFrame,
    schema: Schema,
    model: ModelConfig,
    techniques: TechniquesConfig,
    training: TrainingConfig,
    watch: StepWatch | None = None,
) -> Trained:
    """Fit encoder and ranker on ``frame``; ``items`` is the content table sequences are looked up in.

    ``watch`` is called before every step with its number (from 1), the ranker and the batch; it may look, not touch.

    Raises:
        DataError: no row with an observed label, or an action without a single positive.
        ConfigError: the sibling prior names a column that the schema has no siblings by.
    """
    seen = model_schema(schema, techniques)
    encoded = Encoded.of(frame, items, seen, model.min_count, Device.choose(training).name)
    return train_encoded(encoded, model, techniques, training, watch)


def train_encoded(
    encoded: Encoded[BatchSource],
    model: ModelConfig,
    techniques: TechniquesConfig,
    training: TrainingConfig,
    watch: StepWatch | None = None,
    checkpoints: Checkpoints | None = None,
    group: ProcessGroup = ALONE,
) -> Trained:
    """Fit a ranker on a source that is encoded already, with the encoder's ``min_count`` that of ``model``.

    A training kept in ``checkpoints`` goes on where it was. Every rank of ``group`` calls this and gets one ranker.
    """
    encoder, data, device = encoded.encoder, encoded.data, Device.choose(training)
    torch.manual_seed(training.seed)
    ranker = Ranker(encoder, model, techniques).to(device.name)
    log.info("training on %s, %d rows, %d user-days", device, len(data), data.user_days)
    started = time.perf_counter()
    if techniques.pretraining:
        pretrain_items(ranker.item, encoded.newest_items(), techniques.pretraining, training.seed)
    curve = fit(ranker, data, encoder, techniques, training, device, watch, checkpoints, group)
    seconds = time.perf_counter() - started
    facts = _facts(ranker, encoder, model, training, data, curve, device) | {
        "examples_per_second": round(len(data) * training.epochs / seconds, 1)
    }
    return Trained(ranker.cpu().eval(), encoder, model, techniques, facts)


def model_schema(schema: Schema, techniques: TechniquesConfig) -> Schema:
    """What a ranker reads of ``schema``: all but the siblings, and with the sibling prior those it is given.

    Raises:
        ConfigError: it names a column that the schema has no siblings by.
    """
    if techniques.sibling_prior is None:
        return schema.without_siblings()
    declared = schema.history.siblings
    wanted = declared if techniques.sibling_prior.columns is None else techniques.sibling_prior.columns
    if unknown := sorted(set(wanted) - set(declared)):
        raise ConfigError(
            f"techniques.sibling_prior.columns: received {unknown}, expected some of the schema's "
            f"history.siblings {list(declared)}; declare it there and import again"
        )
    if not wanted:
        log.warning("the sibling prior has no features: schema.yaml declares no history.siblings, or none was named")
    return schema.with_siblings(tuple(entry for entry in declared if entry in wanted))


def fit(
    ranker: Ranker,
    data: BatchSource,
    encoder: Encoder,
    techniques: TechniquesConfig,
    training: TrainingConfig,
    device: Device,
    watch: StepWatch | None = None,
    checkpoints: Checkpoints | None = None,
    group: ProcessGroup = ALONE,
) -> TrainingCurve:
    """Train ``ranker`` in place, one optimiser step per batch."""
    size = batch_size(training, len(data))
    steps = training.epochs * -(-len(data) // size)
    state = _start(ranker, training, steps, group)
    # Draws of its own: switching mixup on leaves batches, hidden ids and initial weights as they were.
    transforms, mixing = batch_transforms(encoder, techniques, training, state.draws), state.draws.generator(2)
    if checkpoints:
        checkpoints.restore(state)
    loss_of = _Loss.of(ranker, techniques, device, group)
    ranker.train()
    fed = data.feed(size, training.epochs, training.seed, state.step, group)
    for batch, weight in track(fed, "training", total=steps - state.step, disable=not sys.stderr.isatty()):
        state.step += 1
        batch = functools.reduce(lambda batch, transform: transform(batch), transforms, batch)
        if watch:
            watch(state.step, ranker, batch)
        _, parts = _step(loss_of, state.optimizer, device, batch, mixing, weight)
        state.schedule.step()
        state.sums.add(parts, weight)
        if state.step % max(1, steps // 50) == 0 or state.step == steps:
            state.curve.add(state.step, state.sums.take(group))
        if checkpoints and checkpoints.due(state.step):
            checkpoints.save(state)
    return state.curve


def _start(ranker: Ranker, training: TrainingConfig, steps: int, group: ProcessGroup) -> State:
    optimizer = torch.optim.AdamW(
        ranker.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    draws = Generators(training.seed, group.rank)
    draws.seed_torch()
    return State(ranker, optimizer, schedule, draws)


class _Loss(nn.Module):
    """:func:`objective` as a module, which is what torch's DistributedDataParallel wraps."""

    def __init__(self, ranker: Ranker, techniques: TechniquesConfig, compiled: bool) -> None:
        super().__init__()
        self.ranker, self.techniques = ranker, techniques
        self.run = torch.compile(objective) if compiled else objective

    def forward(self, batch: Batch, mixing: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.run(self.ranker, batch, self.techniques, mixing)

    @classmethod
    def of(cls, ranker: Ranker, techniques: TechniquesConfig, device: Device, group: ProcessGroup) -> nn.Module:
        """Over several ranks, gradients are averaged while they are computed."""
        loss = cls(ranker, techniques, device.compiled)
        # A batch without a sequence, say, leaves parameters without a gradient.
        return loss if group.size == 1 else DistributedDataParallel(loss, find_unused_parameters=True)


def _step(
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: Device,
    batch: Batch,
    mixing: torch.Generator,
    weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss before the step, and its parts; ``weight`` is the batch's among those of all ranks."""
    with torch.autocast(device.name, device.dtype, enabled=device.dtype != torch.float32):
        loss, parts = loss_of(batch, mixing)
    optimizer.zero_grad(set_to_none=True)
    (loss * weight).backward()
    optimizer.step()
    return loss, parts


def batch_size(training: TrainingConfig, rows: int) -> int:
    """The configured size, halved until an epoch has ``min_steps`` steps: a small log must not end untrained."""
    size = training.batch_size
    while size > SMALLEST_BATCH and rows < size * training.min_steps:
        size //= 2
    return size


def _facts(
    ranker: Ranker,
    encoder: Encoder,
    model: ModelConfig,
    training: TrainingConfig,
    data: BatchSource,
    curve: TrainingCurve,
    device: Device,
) -> dict[str, object]:
    parameters = count_parameters(ranker)
    with torch.random.fork_rng():
        plain = count_parameters(Ranker(encoder.without_siblings(), model))
    return {
        "device": str(device),
        "rows": len(data),
        "batch_size": batch_size(training, len(data)),
        "cold_rows": data.cold_rows,
        "user_days": data.user_days,
        "parameters": parameters,
        "parameter_increase": parameters / plain - 1,
        "curve": {"steps": curve.steps, "losses": curve.losses},
        "training": json.loads(training.model_dump_json()),
    }
