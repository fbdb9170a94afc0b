"""One pass over the training days: batches by user and day, the paper's objective, Adam.

Rows of the same user and day stand together in a batch, so the user block and its sequence encoder run once
per user and day and not once per impression; users are shuffled within the whole training range.
"""

import copy
import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import polars as pl
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from freshrank.checkpoints import Checkpoints, Draws, State, TrainingCurve
from freshrank.config import AldiConfig, ModelConfig, TechniquesConfig, TrainingConfig
from freshrank.distributed import ALONE, Group
from freshrank.encoding import FIRST_KNOWN, NEW, Blocks, Catalog, Encoder
from freshrank.errors import ConfigError, DataError
from freshrank.frames import Frame, Part, newest_items
from freshrank.models.ranker import Ranker, Representation, count_parameters
from freshrank.pretraining import pretrain_items
from freshrank.schema import ITEM_AGE, Schema
from freshrank.storage import atomic_write, read_json, write_json
from freshrank.techniques import aldi
from freshrank.techniques.meta_embedding import alignment
from freshrank.techniques.mixup import mixup
from freshrank.techniques.score_reg import score_reg
from freshrank.transforms import Batch as Batch
from freshrank.transforms import batch_transforms

log = logging.getLogger(__name__)
WEIGHTS = "ranker.safetensors"
DESCRIPTION = "ranker.json"
SMALLEST_BATCH = 32
_MEASURED_STEPS = 15


@dataclass(frozen=True)
class Device:
    """What training runs on, chosen from what the machine has."""

    name: str
    dtype: torch.dtype
    compiled: bool

    @classmethod
    def options(cls, config: TrainingConfig) -> list["Device"]:
        """What ``config`` leaves open: on CUDA, "auto" is bf16 or float32 and torch.compile or not; on the CPU neither.

        The first is the plainest.
        """
        cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
        halves = {"auto": [False, True] if cuda and torch.cuda.is_bf16_supported() else [False], "float32": [False],
                  "bfloat16": [True]}[config.precision]  # fmt: skip
        compiled = {"auto": [False, True] if cuda else [False], "on": [True], "off": [False]}[config.compile]
        name = "cuda" if cuda else "cpu"
        return [cls(name, torch.bfloat16 if half else torch.float32, on) for half in halves for on in compiled]

    @classmethod
    def choose(cls, config: TrainingConfig) -> "Device":
        """The plainest of :meth:`options`."""
        return cls.options(config)[0]

    def __str__(self) -> str:
        model = torch.cuda.get_device_name() if self.name == "cuda" else f"{torch.get_num_threads()} threads"
        compiled = "on" if self.compiled else "off"
        return f"{self.name} ({model}), {str(self.dtype).removeprefix('torch.')}, compile={compiled}"


Watch = Callable[[int, Ranker, Batch], None]


class Fed(NamedTuple):
    """A batch and what to multiply its loss by, 1 but where ranks have unequal parts of a batch."""

    batch: Batch
    weight: float


class Source(Protocol):
    """What is trained on: a frame in memory (:class:`TensorFrame`) or a stream (:class:`freshrank.stream.Stream`)."""

    @property
    def user_days(self) -> int: ...

    @property
    def cold_rows(self) -> int: ...

    def __len__(self) -> int:
        """Rows of an epoch, those of all ranks."""

    def feed(self, size: int, epochs: int, seed: int, start: int = 0, group: Group = ALONE) -> Iterator[Fed]:
        """``group.rank``'s batches from number ``start`` on; ``size`` is that of all ranks together.

        The n-th batch is the same whatever ``start`` is, and every rank has ceil(len / size) of them per epoch.
        """


S = TypeVar("S", bound=Source, covariant=True)


class TensorFrame:
    """A frame encoded once, on the device; batches are gathers."""

    def __init__(self, frame: Frame, encoder: Encoder, catalog: Catalog, device: str = "cpu") -> None:
        schema = encoder.schema
        places, actions = encoder.sequence_places(frame.users, catalog)
        self.users = _tensors(encoder.users_without_sequences(frame), device) | _tensors(
            {"places": places.astype(np.int32)}, device
        )
        self.users["sequence_actions"] = torch.from_numpy(actions.astype(np.int32)).to(device)
        self.items = _tensors(encoder.items(frame), device)
        self.rows = _tensors(encoder.rows(frame, catalog), device)
        self.catalog = _tensors({"item_id": catalog.item_id, "categorical": catalog.categorical}, device)
        self.user_row = torch.from_numpy(frame.rows["user_row"].to_numpy().astype(np.int64)).to(device)
        self.item_row = torch.from_numpy(frame.rows["item_row"].to_numpy().astype(np.int64)).to(device)
        self.labels = torch.from_numpy(labels_of(frame, schema)).to(device)
        self.cold = torch.from_numpy((frame.rows[ITEM_AGE] < schema.fresh_days).to_numpy().copy()).to(device)

    @property
    def user_days(self) -> int:
        return len(self.users["places"])

    @property
    def cold_rows(self) -> int:
        return int(self.cold.sum())

    def __len__(self) -> int:
        return len(self.user_row)

    def batch(self, rows: Tensor) -> Batch:
        """Rows (positions, int64 [B]); rows of one user and day should be neighbours."""
        users, index = torch.unique_consecutive(self.user_row[rows], return_inverse=True)
        inputs = _taken(self.users, users)
        places = inputs.pop("places")
        sequence = _taken(self.catalog, places.flatten())
        inputs["sequence_items"] = sequence["item_id"].view(places.shape)
        if sequence["categorical"].shape[1]:
            inputs["sequence_categorical"] = sequence["categorical"].unflatten(0, places.shape)
        inputs |= _taken(self.items, self.item_row[rows]) | _taken(self.rows, rows)
        labels, cold = self.labels.index_select(0, rows), self.cold.index_select(0, rows)
        return Batch(inputs | {"user_index": index}, labels, cold)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Row positions per batch; users in random order with a generator, in their own order without."""
        users = self.users["places"].shape[0]
        rank = torch.arange(users) if generator is None else torch.randperm(users, generator=generator)
        order = torch.argsort(rank.to(self.user_row.device)[self.user_row], stable=True)
        yield from order.split(size)

    def feed(self, size: int, epochs: int, seed: int, start: int = 0, group: Group = ALONE) -> Iterator[Fed]:
        """See :class:`Source`; every rank holds the whole frame and takes its slice of a batch."""
        order = torch.Generator().manual_seed(seed)
        batches = (rows for _ in range(epochs) for rows in self.batches(size, order))
        for rows, weight in map(group.share, islice(batches, start, None)):
            yield Fed(self.batch(rows), weight)


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


def masked_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over actions of the mean binary cross-entropy of the observed labels; labels may be soft. A scalar."""
    observed = ~torch.isnan(labels)
    target = torch.where(observed, labels, torch.zeros_like(labels))
    losses = binary_cross_entropy_with_logits(logits, target, reduction="none") * observed
    return (losses.sum(0) / observed.sum(0).clamp(min=1)).sum()


def objective(
    ranker: Ranker, batch: Batch, techniques: TechniquesConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_BCE + lambda_1 L_BCE(mixed) + lambda_2 L_MMD (eq. 11) + the student's losses, and its parts before weighting.

    ``generator`` is mixup's. A further technique is a further part with its weight.
    """
    representation = ranker.represent(batch.inputs)
    logits = ranker.prediction(representation.z_bar).float()
    parts = {"bce": (1.0, masked_bce(logits, batch.labels))}
    if techniques.mixup:
        z_mix, y_mix = mixup(representation.z_bar, batch.labels, techniques.mixup.alpha, generator)
        parts["mixup"] = techniques.mixup.weight, masked_bce(ranker.prediction(z_mix).float(), y_mix)
    if techniques.score_reg:
        parts["score_reg"] = techniques.score_reg.weight, score_reg(torch.sigmoid(logits), batch.cold)
    if techniques.aldi:
        parts |= _student_parts(ranker, batch, representation, logits, techniques.aldi)
    if techniques.meta_embedding and techniques.meta_embedding.alignment_weight:
        weight = techniques.meta_embedding.alignment_weight
        parts["alignment"] = weight, _alignment(ranker, batch.inputs["item_id"], representation.x_item)
    loss = functools.reduce(torch.add, (weight * part for weight, part in parts.values()))
    return loss, {name: part for name, (_, part) in parts.items()}


def _student_parts(
    ranker: Ranker, batch: Batch, representation: Representation, teacher: Tensor, config: AldiConfig
) -> dict[str, tuple[float, Tensor]]:
    assert ranker.student is not None
    student = ranker.student(representation.x_student).float()
    impressions = batch.inputs["item_numeric"][:, ranker.impressions_column]
    weight = aldi.teacher_weight(impressions, batch.cold, config.half_known)
    rating = aldi.rating_alignment(student, teacher, weight)
    ranking = aldi.ranking_alignment(student, teacher, weight, batch.inputs["user_index"])
    return {
        "student": (config.student_weight, masked_bce(student, batch.labels)),
        "rating": (config.rating_weight, rating),
        "ranking": (config.ranking_weight, ranking),
    }


def _alignment(ranker: Ranker, ids: Tensor, content: Tensor) -> Tensor:
    assert ranker.id_generator is not None
    shared = ranker.item_ids(torch.full_like(ids[:1], NEW))
    generated = shared + ranker.id_generator.generate(content)
    return alignment(generated, ranker.item_ids(ids), ids >= FIRST_KNOWN)


def train_ranker(
    frame: Frame,
    items: pl.DataFrame,
    schema: Schema,
    model: ModelConfig,
    techniques: TechniquesConfig,
    training: TrainingConfig,
    watch: Watch | None = None,
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


@dataclass(frozen=True)
class Encoded(Generic[S]):
    """A training frame under the encoder fitted on it: what all rankers of one schema and ``min_count`` can share."""

    encoder: Encoder
    data: S
    newest_items: Callable[[], dict[str, Tensor]]
    """The item blocks with one row per item of the training days, its newest, by item id."""

    @classmethod
    def of(
        cls, frame: Frame, items: pl.DataFrame, schema: Schema, min_count: int, device: str = "cpu"
    ) -> "Encoded[TensorFrame]":
        check_positives({action: int(frame.rows[action].sum()) for action in schema.actions}, len(frame.rows))
        encoder = Encoder.fit(frame, schema, min_count)
        data = TensorFrame(frame, encoder, Catalog.build(items, encoder), device)
        return Encoded(encoder, data, lambda: item_blocks(encoder, newest_items([Part.whole(frame)]), device))


def item_blocks(encoder: Encoder, items: pl.DataFrame, device: str) -> dict[str, Tensor]:
    """The blocks of a frame's items on ``device``."""
    return _tensors(encoder.item_blocks(items), device)


def train_encoded(
    encoded: Encoded[Source],
    model: ModelConfig,
    techniques: TechniquesConfig,
    training: TrainingConfig,
    watch: Watch | None = None,
    checkpoints: Checkpoints | None = None,
    group: Group = ALONE,
) -> Trained:
    """Fit a ranker on a source that is encoded already, with the encoder's ``min_count`` that of ``model``.

    A training kept in ``checkpoints`` goes on where it was. Every rank of ``group`` calls this and gets one ranker.
    """
    encoder, data, options = encoded.encoder, encoded.data, Device.options(training)
    torch.manual_seed(training.seed)
    ranker = Ranker(encoder, model, techniques).to(options[0].name)
    kept = checkpoints.device if checkpoints else None
    device = next((option for option in options if str(option) == kept), None) or fastest(
        options, ranker, data, techniques, training, group
    )
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
        raise ConfigError(f"techniques.sibling_prior.columns: received {unknown}, expected some of the schema's "
                          f"history.siblings {list(declared)}; declare it there and import again")  # fmt: skip
    if not wanted:
        log.warning("the sibling prior has no features: schema.yaml declares no history.siblings, or none was named")
    return schema.with_siblings(tuple(entry for entry in declared if entry in wanted))


def fit(
    ranker: Ranker,
    data: Source,
    encoder: Encoder,
    techniques: TechniquesConfig,
    training: TrainingConfig,
    device: Device,
    watch: Watch | None = None,
    checkpoints: Checkpoints | None = None,
    group: Group = ALONE,
) -> TrainingCurve:
    """Train ``ranker`` in place, one optimiser step per batch."""
    size = batch_size(training, len(data))
    steps = training.epochs * -(-len(data) // size)
    state = _start(ranker, training, steps, device, group)
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


def _start(ranker: Ranker, training: TrainingConfig, steps: int, device: Device, group: Group) -> State:
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay,
                                  fused=True)  # fmt: skip
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    draws = Draws(training.seed, group.rank)
    draws.seed_torch()
    return State(ranker, optimizer, schedule, draws, str(device))


class _Loss(nn.Module):
    """:func:`objective` as a module, which is what torch's DistributedDataParallel wraps."""

    def __init__(self, ranker: Ranker, techniques: TechniquesConfig, compiled: bool) -> None:
        super().__init__()
        self.ranker, self.techniques = ranker, techniques
        self.run = torch.compile(objective) if compiled else objective

    def forward(self, batch: Batch, mixing: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.run(self.ranker, batch, self.techniques, mixing)

    @classmethod
    def of(cls, ranker: Ranker, techniques: TechniquesConfig, device: Device, group: Group) -> nn.Module:
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


def fastest(
    options: Sequence[Device],
    ranker: Ranker,
    data: Source,
    techniques: TechniquesConfig,
    training: TrainingConfig,
    group: Group = ALONE,
) -> Device:
    """The one of ``options`` whose steps measure fastest on the first batch; ranker and draws stay as they are."""
    if len(options) == 1:
        return options[0]
    batch = next(data.feed(batch_size(training, len(data)), 1, training.seed, 0, group)).batch
    seconds = [step_seconds(option, copy.deepcopy(ranker), batch, techniques) for option in options]
    log.info("seconds per step: %s", ", ".join(f"{o} {s:.4f}" for o, s in zip(options, seconds, strict=True)))
    return options[int(group.gathered(torch.tensor(seconds))[0].argmin())]


def step_seconds(device: Device, ranker: Ranker, batch: Batch, techniques: TechniquesConfig) -> float:
    """Median of some steps of ``ranker`` on ``batch``, after others that compile and warm up; trains ``ranker``."""
    loss_of, mixing, found = _Loss(ranker, techniques, device.compiled), torch.Generator().manual_seed(0), []
    optimizer = torch.optim.AdamW(ranker.parameters(), fused=True)
    ranker.train()
    with torch.random.fork_rng():
        for _ in range(_MEASURED_STEPS):
            started = time.perf_counter()
            loss, _ = _step(loss_of, optimizer, device, batch, mixing)
            float(loss.detach())  # waits for a GPU
            found.append(time.perf_counter() - started)
    return median(found[_MEASURED_STEPS // 3 :])


def batch_size(training: TrainingConfig, rows: int) -> int:
    """The configured size, halved until an epoch has ``min_steps`` steps: a small log must not end untrained."""
    size = training.batch_size
    while size > SMALLEST_BATCH and rows < size * training.min_steps:
        size //= 2
    return size


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


def labels_of(frame: Frame, schema: Schema) -> np.ndarray:
    """Labels float32 [N, A], NaN = not observed."""
    columns = [frame.rows[a].cast(pl.Float32).fill_null(float("nan")).to_numpy() for a in schema.actions]
    return np.stack(columns, axis=1)


def check_positives(positives: dict[str, int], rows: int) -> None:
    """Raise :class:`DataError` unless every action has a positive among ``rows`` training rows."""
    for action, count in positives.items():
        if not count:
            raise DataError(
                f"action '{action}': 0 positives in {rows} training rows; expected at least one. "
                "Check the label join, or train on more days (windows.train_days)"
            )


def _taken(blocks: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Half the time of ``block[rows]``."""
    return {name: block.index_select(0, rows) for name, block in blocks.items()}


def _tensors(blocks: Blocks, device: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(block)).to(device) for name, block in blocks.items()}


def _facts(
    ranker: Ranker,
    encoder: Encoder,
    model: ModelConfig,
    training: TrainingConfig,
    data: Source,
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
