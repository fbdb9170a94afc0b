"""One rank of a distributed training, as started by torchrun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from freshrank.errors import PipelineFailed
from freshrank.settings import settings

_FILES = timedelta(hours=12)
"""How long ranks wait for the one that writes the files; if its process ends, they end at once."""


class Share(NamedTuple):
    """This process's part of a batch: ``rows`` int64 [n], never empty, and what to multiply its mean loss by.

    Gradients are averaged over the processes, so the weight is the process's rows over the rows of an average one.
    """

    rows: Tensor
    weight: float


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one training; alone by default."""

    rank: int = 0
    size: int = 1
    waiting: dist.ProcessGroup | None = None
    """The same processes with the timeout of :meth:`wait`."""

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
        """Wait, for hours if need be, until all ranks have arrived."""
        if self.size > 1:
            dist.barrier(self.waiting)


ALONE = ProcessGroup()


@contextmanager
def joined() -> Iterator[ProcessGroup]:
    """The group of ``torchrun`` that this process was started in (WORLD_SIZE, RANK), else alone.

    Raises:
        PipelineFailed: the others did not come within FRESHRANK_TRAIN_CONNECT_SECONDS, ended, or kept this process
            waiting in a step for longer than FRESHRANK_TRAIN_EXCHANGE_SECONDS.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        with _told("did not come within {0.train_connect_seconds:g} s (FRESHRANK_TRAIN_CONNECT_SECONDS)"):
            waiting = _connected()
        with _told("ended, or kept it waiting for {0.train_exchange_seconds:g} s (FRESHRANK_TRAIN_EXCHANGE_SECONDS)"):
            yield ProcessGroup(dist.get_rank(), size, waiting)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _connected() -> dist.ProcessGroup:
    """Connect all ranks twice: for exchanges, and, returned, for waiting."""
    connect = timedelta(seconds=settings().train_connect_seconds)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=connect)
    waiting: dist.ProcessGroup = dist.new_group(timeout=connect, backend="gloo")
    # A group connects with the timeout that its exchanges have afterwards, unless it is changed in between.
    _set_pg_timeout(timedelta(seconds=settings().train_exchange_seconds))
    _set_pg_timeout(_FILES, waiting)
    return waiting


@contextmanager
def _told(what_others_did: str) -> Iterator[None]:
    """Raise PipelineFailed in place of what torch raises about other processes."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no error of its own.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        rank, others = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
        raise PipelineFailed(
            f"rank {rank} of {others}: other processes {what_others_did.format(settings())}; started again, it goes on "
            f"from the checkpoint ({str(error).splitlines()[0]})"
        ) from error
