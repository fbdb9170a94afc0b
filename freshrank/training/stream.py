"""Training rows of any number, read from Parquet shards: a bounded window is in memory, another is being made ready.

An epoch is a permutation of all shards over the whole range of days, dealt out to the ranks; a window is as many of a
rank's shards as fit, its user-days in random order. All of it is a function of (seed, epoch, rank): the n-th batch can
be made without those before it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import accumulate
from typing import TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from freshrank.config import TrainingConfig
from freshrank.datasets.dataset import Dataset
from freshrank.errors import DataError
from freshrank.features.encoder import Catalog, Encoder
from freshrank.features.frames import FramePart, concatenated, load_frame, newest_items
from freshrank.schema import IN_TRAINING, Schema
from freshrank.storage.workspace import Workspace
from freshrank.training.batches import Batch, BatchSource, Encoded, TensorFrame, Weighted, check_positives, item_blocks
from freshrank.training.device import Device
from freshrank.training.distributed import ALONE, ProcessGroup
from freshrank.training.shards import Shard, training_rows, training_shards

SHARDS_PER_WINDOW = 8
"""Shards are cut small enough that so many, of other days and users, are shuffled together."""
T = TypeVar("T")


@dataclass(frozen=True)
class EpochPlan:
    """What one rank reads in one epoch: positions in the list of shards, by window."""

    windows: list[list[int]]
    starts: list[int]
    """Rows before each window; one more entry holds the rows of all."""

    @classmethod
    def of(
        cls, rows: Sequence[int], window_rows: int, seed: int, epoch: int, group: ProcessGroup = ALONE
    ) -> "EpochPlan":
        """``rows`` of each shard."""
        order = np.random.default_rng([seed, epoch]).permutation(len(rows)).tolist()
        windows = _windows(_dealt(order, rows, group), rows, window_rows)
        return cls(windows, [0, *accumulate(sum(rows[shard] for shard in window) for window in windows)])

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, slice]]:
        """Windows that hold rows ``start`` to ``end`` of the epoch, and which of their rows."""
        for number, (first, last) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            if first < end and last > start:
                yield number, slice(max(start, first) - first, min(end, last) - first)


def _dealt(order: Sequence[int], rows: Sequence[int], group: ProcessGroup) -> list[int]:
    """This rank's shards: each goes, in order, to the rank with the fewest rows."""
    loads, mine = [0] * group.size, []
    for shard in order:
        rank = loads.index(min(loads))
        loads[rank] += rows[shard]
        if rank == group.rank:
            mine.append(shard)
    return mine


def _windows(order: Sequence[int], rows: Sequence[int], window_rows: int) -> list[list[int]]:
    windows: list[list[int]] = []
    held = window_rows
    for shard in order:
        if held + rows[shard] > window_rows:
            windows.append([])
            held = 0
        windows[-1].append(shard)
        held += rows[shard]
    return windows


class Stream:
    """Batches (:class:`freshrank.training.batches.BatchSource`) over shards, at most two windows in memory."""

    def __init__(
        self, shards: Sequence[Shard], encoder: Encoder, catalog: Catalog, window_rows: int, device: str = "cpu"
    ) -> None:
        self.shards, self.encoder, self.catalog = shards, encoder, catalog
        self.window_rows, self.device = window_rows, device
        self.user_days = sum(shard.user_days for shard in shards)
        self.cold_rows = sum(shard.cold for shard in shards)

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def feed(
        self, size: int, epochs: int, seed: int, start: int = 0, group: ProcessGroup = ALONE
    ) -> Iterator[Weighted]:
        """See :meth:`freshrank.training.batches.BatchSource.feed`.

        Raises:
            DataError: fewer rows for a rank than it has steps.
        """
        steps = -(-len(self) // size)
        for number in range(start // steps, epochs):
            first = start % steps if number == start // steps else 0
            yield from self._epoch(size, steps, number, seed, first, group)

    def _epoch(
        self, size: int, steps: int, number: int, seed: int, first: int, group: ProcessGroup
    ) -> Iterator[Weighted]:
        epoch = EpochPlan.of([shard.rows for shard in self.shards], self.window_rows, seed, number, group)
        ends = _ends(epoch.starts[-1], size, steps, group)
        wanted = [list(epoch.pieces(a, b)) for a, b in zip([0, *ends], ends, strict=False)][first:]
        numbers = sorted({window for pieces in wanted for window, _ in pieces})
        loads = (partial(self._window, epoch.windows[n]) for n in numbers)
        windows, held, data = zip(numbers, ahead(loads), strict=True), -1, None
        for pieces in wanted:
            batches = []
            for window, rows in pieces:
                if window != held:
                    data = None  # let go of the last window before the one after the next is begun
                    held, data = next(windows)
                    order = _order(data, [seed, number, group.rank, held])
                assert data is not None
                batches.append(data.batch(order[rows]))
            weight = sum(rows.stop - rows.start for _, rows in pieces) * group.size * steps / len(self)
            yield Weighted(joined(batches), weight if group.size > 1 else 1.0)

    def _window(self, shards: Sequence[int]) -> TensorFrame:
        """Runs in a thread beside training, so nothing here may compute with torch: a thread that does has OpenMP
        threads of its own, and with more of these than cores every operation of training waits for wake-ups."""
        parts = [self.shards[shard].frame(self.encoder.columns) for shard in sorted(shards)]
        return TensorFrame(concatenated(parts, self.encoder.schema), self.encoder, self.catalog, self.device)


def _order(data: TensorFrame, seed: Sequence[int]) -> Tensor:
    """Rows of a window, its user-days in random order."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    (order,) = data.batches(len(data), generator)
    return order


def _ends(rows: int, size: int, steps: int, group: ProcessGroup) -> list[int]:
    """Where each of ``steps`` batches ends among a rank's ``rows``."""
    if group.size == 1:
        return [min(rows, (step + 1) * size) for step in range(steps)]
    if rows < steps:
        raise DataError(
            f"rank {group.rank} of {group.size}: received {rows} training rows, expected one for each of {steps} steps "
            "at least; start fewer processes, or lower training.window_rows so that there are more shards"
        )
    # Ranks have about as many rows, not exactly: they step together and the loss is weighted.
    return [rows * (step + 1) // steps for step in range(steps)]


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of several, the users of each kept apart."""
    if len(batches) == 1:
        return batches[0]
    users = [len(batch.inputs["sequence_actions"]) for batch in batches]
    starts = [0, *accumulate(users)]
    inputs = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    index = [batch.inputs["user_index"] + start for batch, start in zip(batches, starts, strict=False)]
    labels, cold = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "cold"))
    return Batch(inputs | {"user_index": torch.cat(index)}, labels, cold)


def ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of ``calls`` in order, each begun in a thread when the one before it is handed out."""
    with ThreadPoolExecutor(1) as pool:
        pending: Future[T] | None = None
        for call in calls:
            upcoming = pool.submit(call)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()


def encoded_days(
    dataset: Dataset,
    workspace: Workspace,
    days: Sequence[date],
    schema: Schema,
    min_count: int,
    training: TrainingConfig,
    group: ProcessGroup = ALONE,
) -> Encoded[BatchSource]:
    """The training rows of ``days`` as a ranker that reads ``schema`` is trained on: in memory where they fit a window.

    Every rank of ``group`` calls this; the first one makes the files that all read.
    """
    if not group.leads:
        group.wait()
    device, items = Device.choose(training).name, dataset.items()
    encoded: Encoded[BatchSource]
    if training_rows(dataset, days) <= training.window_rows:
        encoded = Encoded.of(load_frame(dataset, workspace, days, IN_TRAINING), items, schema, min_count, device)
    else:
        shards = training_shards(dataset, workspace, days, training.window_rows // SHARDS_PER_WINDOW)
        encoded = streamed(shards, items, schema, min_count, training.window_rows, device)
    if group.leads:
        group.wait()
    return encoded


def streamed(
    shards: Sequence[Shard],
    items: pl.DataFrame,
    schema: Schema,
    min_count: int,
    window_rows: int,
    device: str = "cpu",
) -> Encoded[Stream]:
    """Fit the encoder in one pass over ``shards``; what :func:`freshrank.training.loop.train_encoded` trains on.

    Raises:
        DataError: no row with an observed label, or an action without a single positive.
    """
    positives = {action: sum(shard.positives[action] for shard in shards) for action in schema.actions}
    check_positives(positives, sum(shard.rows for shard in shards))
    encoder = Encoder.fit_parts(_parts(shards), schema, min_count)
    stream = Stream(shards, encoder, Catalog.build(items, encoder), window_rows, device)
    return Encoded(encoder, stream, lambda: item_blocks(encoder, newest_items(_parts(shards)), device))


def _parts(shards: Sequence[Shard]) -> Iterator[FramePart]:
    return (shard.read() for shard in shards)
