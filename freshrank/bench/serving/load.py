"""Callers of the systems that `freshrank bench serving` compares: closed loops in processes of their own."""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from freshrank.bench.serving.steady_load import received
from freshrank.bundle.golden import Tensors
from freshrank.bundle.onnx_ranker import OnnxRanker
from freshrank.datasets.dataset import Dataset
from freshrank.features.encoder import Blocks
from freshrank.schema import ITEM_ID, SEQUENCE_ITEMS, USER_ID, Entity
from freshrank.serving.protocol import OUTPUTS
from freshrank.serving.ranking.feast_import import import_feast
from freshrank.serving.ranking.online_store import RedisReader
from freshrank.serving.ranking.query import Query
from freshrank.serving.ranking.service import RequestBatch, online_features
from freshrank.serving.repository import RANKER, RANKING
from freshrank.serving.triton import TritonClient, on_wire
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace

SHARE_NEW = 0.05
LEAD_IN_SECONDS = 1.0
"""Before each slice, untimed: connections are made, and items are in memory as they are under steady load."""
POOL = 64
"""Different requests per size and process; each caller starts somewhere else in them."""
_OUTPUTS = [spec.name for spec in OUTPUTS]

Ask = Callable[[int], Any]
"""Sends request ``i`` of the pool and returns its scores [N]; raises where the answer is not right."""


@dataclass(frozen=True)
class Place:
    """Addresses and paths of all systems, for a process that calls them."""

    data: Path
    bundle: Path
    version: int
    triton: str
    uncached: str
    fastapi: str
    at_us: int


@dataclass(frozen=True)
class Slice:
    """Some seconds of one system at one size and concurrency, as one process saw them."""

    seconds: list[float]
    took: float
    """Seconds the slice lasted."""
    cpu: float
    """CPU seconds the calling process spent."""
    wrong: int


class Caller:
    """All systems, as one process calls them."""

    def __init__(self, place: Place, seed: int) -> None:
        import_feast()
        self.place = place
        self.seed = seed
        self.dataset = Dataset.open(place.data)
        self.pools: dict[int, list[Query]] = {}
        self.ready: dict[int, list[Blocks]] = {}
        self.stored: dict[int, list[list[tuple[Entity, bytes]]]] = {}

    def prepare(self, sizes: list[int]) -> None:
        """Draw the requests of each size, and for the floor what they read and what the ranker is given."""
        for size in sizes:
            self.pools[size] = draw(self.dataset, size, POOL, self.seed + size, self.place.at_us)
            known = [self.features.read(*_ids(query)) for query in self.pools[size]]
            self.ready[size] = [
                RequestBatch([query]).blocks(k, self.ranker.encoder)[0]
                for query, k in zip(self.pools[size], known, strict=True)
            ]
            sequences = [k.users.values(SEQUENCE_ITEMS)[k.users.present(SEQUENCE_ITEMS)] for k in known]
            self.stored[size] = [
                self._keys(query, np.unique(sequence))
                for query, sequence in zip(self.pools[size], sequences, strict=True)
            ]

    def _keys(self, query: Query, sequence: Any) -> list[tuple[Entity, bytes]]:
        items = np.unique(np.concatenate([query.item_ids, sequence]))
        keys = {
            Entity.USER: self.rows.keys(Entity.USER, np.array([query.user_id])),
            Entity.ITEM: self.rows.keys(Entity.ITEM, items),
        }
        return [(entity, key) for entity, entity_keys in keys.items() for key in entity_keys]

    @cached_property
    def schema(self) -> Any:
        return self.ranker.encoder.schema

    @cached_property
    def ranker(self) -> OnnxRanker:
        return OnnxRanker(self.place.bundle, threads=1)

    @cached_property
    def all_cores(self) -> OnnxRanker:
        return OnnxRanker(self.place.bundle, threads=0)

    @cached_property
    def features(self) -> Any:
        return online_features(self.schema, Workspace.of(self.schema.name))

    @cached_property
    def rows(self) -> RedisReader:
        return RedisReader(self.schema, settings().redis_url.get_secret_value(), seconds=10)

    @contextmanager
    def system(self, name: str, size: int) -> Iterator[Ask]:
        """One caller of a system."""
        if name in ("ranking", "ranking, nothing kept", "ranker alone"):
            with TritonClient(self.place.uncached if name == "ranking, nothing kept" else self.place.triton) as client:
                yield self._ranker(client, size) if name == "ranker alone" else self._ranking(client, size)
        elif name == "FastAPI":
            yield self._fastapi(size)
        else:
            yield self._floor(size, self.ranker if name == "floor, 1 thread" else self.all_cores)

    def _ranking(self, client: TritonClient, size: int) -> Ask:
        def ask(number: int) -> Any:
            answer = client.infer(RANKING, on_wire(_request(self.pools[size][number])), _OUTPUTS)
            if answer["degraded"][0, 0] or answer["model_version"][0, 0] != self.place.version:
                raise ValueError("degraded, or answered by another version")
            return answer["score"][0]

        return ask

    def _ranker(self, client: TritonClient, size: int) -> Ask:
        outputs = ["probabilities", "score"]
        return lambda number: client.infer(RANKER, self.ready[size][number], outputs, self.place.version)["score"]

    def _floor(self, size: int, ranker: OnnxRanker) -> Ask:
        fields = {entity: self.rows.fields(entity) for entity in (Entity.USER, Entity.ITEM)}

        def ask(number: int) -> Any:
            with self.rows.client.pipeline(transaction=False) as pipeline:
                for entity, key in self.stored[size][number]:
                    pipeline.execute_command("HMGET", key, *fields[entity])
                pipeline.execute()
            return ranker.run(self.ready[size][number])["score"]

        return ask

    def _fastapi(self, size: int) -> Ask:
        import urllib3

        pool = urllib3.PoolManager()

        def ask(number: int) -> Any:
            query = self.pools[size][number]
            body = {"user_id": query.user_id, "item_ids": query.item_ids.tolist(), "at_us": query.at_us}
            answer = pool.request("POST", f"{self.place.fastapi}/rank", json=body, timeout=60)
            return np.array(json.loads(answer.data)["score"])

        return ask

    def call(self, name: str, size: int, callers: int, seconds: float) -> Slice:
        """Closed loops of ``callers`` threads for about ``seconds``."""
        self._calls(name, size, callers, LEAD_IN_SECONDS)
        started, cpu = time.perf_counter(), time.process_time()
        times, wrong = self._calls(name, size, callers, seconds)
        return Slice(times, time.perf_counter() - started, time.process_time() - cpu, wrong)

    def _calls(self, name: str, size: int, callers: int, seconds: float) -> tuple[list[float], int]:
        stop = time.perf_counter() + seconds
        with ThreadPoolExecutor(callers) as threads:
            loops = [threads.submit(self._loop, name, size, k * POOL // callers, stop) for k in range(callers)]
            answered = [loop.result() for loop in loops]
        return [taken for part, _ in answered for taken in part], sum(wrong for _, wrong in answered)

    def _loop(self, name: str, size: int, number: int, stop: float) -> tuple[list[float], int]:
        taken, wrong = [], 0
        with self.system(name, size) as ask:
            while time.perf_counter() < stop:
                number, started = (number + 1) % POOL, time.perf_counter()
                try:
                    scores = ask(number)
                    wrong += len(scores) != size or not np.isfinite(scores).all()
                except Exception:
                    wrong += 1
                taken.append(time.perf_counter() - started)
        return taken, wrong


def _request(query: Query) -> Tensors:
    return {"user_id": np.array([query.user_id]), "item_ids": query.item_ids, "event_time": np.array([query.at_us])}


def _ids(query: Query) -> tuple[Any, Any, Any]:
    return np.array([query.user_id]), query.item_ids, np.zeros(0, np.int64)


def draw(dataset: Dataset, size: int, count: int, seed: int, at_us: int) -> list[Query]:
    """Requests of users of the log's last day; candidates as often as they were shown on it, 5% of them the newest."""
    generator = np.random.default_rng(seed)
    shown = dataset.impressions(dataset.days[-1:]).select(USER_ID, ITEM_ID).collect()
    items = dataset.items().sort("created_at", descending=True)[ITEM_ID]
    counts = items.to_frame().join(shown.group_by(ITEM_ID).agg(pl.len()), on=ITEM_ID, how="left", maintain_order="left")
    weights = counts["len"].fill_null(0).to_numpy() + 0.1
    users = shown[USER_ID].unique().sort().to_numpy()
    newest = items.head(max(1, len(items) // 20)).to_numpy()
    queries = []
    for _ in range(count):
        new = generator.choice(newest, int(size * SHARE_NEW))
        old = generator.choice(items.to_numpy(), size - len(new), p=weights / weights.sum())
        queries.append(Query(int(generator.choice(users)), np.concatenate([new, old]), at_us, {}))
    return queries


class Callers:
    """Processes that call on command; use it in a ``with``."""

    def __init__(self, place: Place, sizes: list[int], processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[tuple[Any, Any]] = [context.Pipe() for _ in range(processes)]
        self._processes = [
            context.Process(target=_serve, args=(theirs, place, sizes, 1000 * number), daemon=True)
            for number, (_, theirs) in enumerate(self._pipes)
        ]

    def __enter__(self) -> "Callers":
        for process in self._processes:
            process.start()
        for ours, _ in self._pipes:
            received(ours)
        return self

    def __exit__(self, *_: object) -> None:
        for ours, _ in self._pipes:
            ours.send(None)
        for process in self._processes:
            process.join()

    def call(self, name: str, size: int, callers: int, seconds: float) -> Slice:
        """``callers`` threads spread over the processes."""
        shares = [len(range(number, callers, len(self._pipes))) for number in range(len(self._pipes))]
        busy = [(ours, share) for (ours, _), share in zip(self._pipes, shares, strict=True) if share]
        for ours, share in busy:
            ours.send((name, size, share, seconds))
        slices = [received(ours) for ours, _ in busy]
        return Slice(
            seconds=[taken for part in slices for taken in part.seconds],
            took=max(part.took for part in slices),
            cpu=sum(part.cpu for part in slices),
            wrong=sum(part.wrong for part in slices),
        )


def _serve(pipe: Connection, place: Place, sizes: list[int], seed: int) -> None:
    try:
        caller = Caller(place, seed)
        caller.prepare(sizes)
        pipe.send("ready")
        while command := pipe.recv():
            pipe.send(caller.call(*command))
    except Exception as error:
        pipe.send(error)
