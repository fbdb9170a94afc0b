"""Requests at a constant rate from a separate process, however the server behaves (open loop).

The loop is open: request i is due at start + i / rate and its latency counts from then, so that a server that stands
still is charged for every request that would have come, not for the one that happened to wait.
"""

import asyncio
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.mappings import MAPPINGS
from freshrank.errors import FreshrankError
from freshrank.schema import ITEM_ID, USER_ID
from freshrank.serving.client.client import Answer, AsyncClient, Client

TOLERANCE = 1e-4
"""Of a score: the same request may be answered alone or together with others."""
SHARE_UNKNOWN = 0.05
_STARTS_IN = 0.5


@dataclass(frozen=True)
class LoadRequest:
    """Ids of an imported dataset; some of the items are known to nobody."""

    user_id: int
    item_ids: list[int]


@dataclass(frozen=True)
class LoadTarget:
    """Where the load goes, and ``expected``: the right scores [requests, candidates] by name of the model."""

    url: str
    data: Path
    at: datetime
    requests: list[LoadRequest]
    expected: dict[str, Any]
    rate: float


def draw(dataset: Dataset, candidates: int, count: int, seed: int = 0) -> list[LoadRequest]:
    """``count`` different requests of users of the log's last day."""
    generator = np.random.default_rng(seed)
    users = dataset.impressions(dataset.days[-1:]).select(pl.col(USER_ID).unique().sort()).collect()[USER_ID].to_numpy()
    items = dataset.items()[ITEM_ID].to_numpy()
    unknown = int(candidates * SHARE_UNKNOWN)
    fresh = int(items.max()) + 1 + np.arange(unknown)
    return [
        LoadRequest(
            int(generator.choice(users)), [*generator.choice(items, candidates - unknown).tolist(), *fresh.tolist()]
        )
        for _ in range(count)
    ]


def scores(url: str, data: Path, at: datetime, requests: list[LoadRequest]) -> Any:
    """What the served version says to each request, [requests, candidates]."""
    dataset = Dataset.open(data)
    with Client(url, dataset.schema, data / MAPPINGS) as client:
        return np.stack([client.rank_ids(each.user_id, each.item_ids, at).score for each in requests])


@contextmanager
def steady_load(target: LoadTarget) -> Iterator[Callable[[], pl.DataFrame]]:
    """Ask at ``target.rate`` until the yielded function is called, which returns one row per request.

    ``due`` (seconds on the clock of time.perf_counter), ``latency`` (seconds since then), ``version`` (0 where there
    was no answer), ``model`` (whose scores they were, empty for nobody's), ``error``.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, target), daemon=True)
    process.start()
    try:
        received(ours)
        yield lambda: _stopped(ours)
    finally:
        process.kill()
        process.join()


def _stopped(pipe: Connection) -> pl.DataFrame:
    pipe.send("stop")
    schema = {"due": pl.Float64, "latency": pl.Float64, "version": pl.Int64, "model": pl.String, "error": pl.String}
    return pl.DataFrame(received(pipe), schema=schema, orient="row").sort("due")


def received(pipe: Connection) -> Any:
    """What the load process sends; its errors are raised here, and its death is a FreshrankError."""
    try:
        message = pipe.recv()
    except EOFError:
        raise FreshrankError("bench: the process that sends requests has died") from None
    if isinstance(message, Exception):
        raise message
    return message


def _run(pipe: Connection, target: LoadTarget) -> None:
    try:
        pipe.send(asyncio.run(_ask_until_told(pipe, target)))
    except Exception as error:
        pipe.send(error)


async def _ask_until_told(pipe: Connection, target: LoadTarget) -> list[tuple[Any, ...]]:
    told = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), told.set)
    async with AsyncClient(target.url, Dataset.open(target.data).schema, target.data / MAPPINGS) as client:
        await _row(client, target, 0, time.perf_counter())
        pipe.send("ready")
        # A collection of this process's garbage would look like a slow answer.
        gc.disable()
        tasks: list[asyncio.Task[tuple[Any, ...]]] = []
        start = time.perf_counter() + _STARTS_IN
        while not told.is_set():
            due = start + len(tasks) / target.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(_row(client, target, len(tasks), due)))
        return await asyncio.gather(*tasks)


async def _row(client: AsyncClient, target: LoadTarget, number: int, due: float) -> tuple[Any, ...]:
    place = number % len(target.requests)
    request = target.requests[place]
    try:
        answer = await client.rank_ids(request.user_id, request.item_ids, target.at)
    except Exception as error:
        return due, time.perf_counter() - due, 0, "", str(error)
    latency = time.perf_counter() - due
    return due, latency, answer.model_version, _model(answer, place, target.expected), ""


def _model(answer: Answer, place: int, expected: dict[str, Any]) -> str:
    """Whose scores these are."""
    matching = [n for n, right in expected.items() if np.abs(right[place] - answer.score).max() < TOLERANCE]
    return "" if answer.degraded or not matching else matching[0]
