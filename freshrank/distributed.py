"""One process among those that train together, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(hours=12)
"""How long ranks wait for the one that makes the files; torchrun ends them should it fail."""


class Share(NamedTuple):
    """This process's part of a batch: ``rows`` int64 [n], never empty, and what to multiply its mean loss by.

    Gradients are averaged over the processes, so the weight is the process's rows over the rows of an average one.
    """

    rows: Tensor
    weight: float


@dataclass(frozen=True)
class Group:
    """The processes of one training; alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what all share."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Share:
        """This rank's slice of a batch that all ranks have."""
        start, end = (len(rows) * rank // self.size for rank in (self.rank, self.rank + 1))
        # Every rank must step: without rows of its own it computes one that does not count.
        return Share(rows[start:end] if end > start else rows[:1], (end - start) * self.size / len(rows))

    def gathered(self, tensor: Tensor) -> Tensor:
        """``tensor`` of every rank, [ranks, ..], on the CPU; it must have the same shape everywhere."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


ALONE = Group()


@contextmanager
def joined() -> Iterator[Group]:
    """The group of ``torchrun`` that this process was started in (WORLD_SIZE, RANK), else alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Group(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
