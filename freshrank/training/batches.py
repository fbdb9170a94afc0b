"""What training reads, batch by batch: encoded frames and their labels."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from freshrank.errors import DataError
from freshrank.features.encoder import Blocks, Catalog, Encoder
from freshrank.features.frames import Frame, FramePart, newest_items
from freshrank.models.ranker import Inputs
from freshrank.schema import ITEM_AGE, Schema
from freshrank.training.distributed import ALONE, ProcessGroup


@dataclass(frozen=True)
class Batch:
    """inputs as the ranker takes them; labels [B, A] with NaN = not observed; cold bool [B]."""

    inputs: Inputs
    labels: Tensor
    cold: Tensor


log = logging.getLogger(__name__)


class Weighted(NamedTuple):
    """A batch and what to multiply its loss by, 1 but where ranks have unequal parts of a batch."""

    batch: Batch
    weight: float


class BatchSource(Protocol):
    """What is trained on: a frame in memory (:class:`TensorFrame`) or a stream
    (:class:`freshrank.training.stream.Stream`)."""

    @property
    def user_days(self) -> int: ...

    @property
    def cold_rows(self) -> int: ...

    def __len__(self) -> int:
        """Rows of an epoch, those of all ranks."""

    def feed(
        self, size: int, epochs: int, seed: int, start: int = 0, group: ProcessGroup = ALONE
    ) -> Iterator[Weighted]:
        """``group.rank``'s batches from number ``start`` on; ``size`` is that of all ranks together.

        The n-th batch is the same whatever ``start`` is, and every rank has ceil(len / size) of them per epoch.
        """


S = TypeVar("S", bound=BatchSource, covariant=True)


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

    def feed(
        self, size: int, epochs: int, seed: int, start: int = 0, group: ProcessGroup = ALONE
    ) -> Iterator[Weighted]:
        """See :class:`BatchSource`; every rank holds the whole frame and takes its slice of a batch."""
        order = torch.Generator().manual_seed(seed)
        batches = (rows for _ in range(epochs) for rows in self.batches(size, order))
        for rows, weight in map(group.share, islice(batches, start, None)):
            yield Weighted(self.batch(rows), weight)


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
        return Encoded(encoder, data, lambda: item_blocks(encoder, newest_items([FramePart.whole(frame)]), device))


def item_blocks(encoder: Encoder, items: pl.DataFrame, device: str) -> dict[str, Tensor]:
    """The blocks of a frame's items on ``device``."""
    return _tensors(encoder.item_blocks(items), device)


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
