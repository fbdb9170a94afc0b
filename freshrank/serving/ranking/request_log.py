"""What was really served: a share of the requests, whole, in Parquet.

One row per request holds what was asked, what every version said, and the ranker's inputs as they were, so that an A/B
can be computed once outcomes are known (join on ``request_id``), a ranking be replayed bit for bit, and a model be
trained on what was served. Requests are handed over by reference and written by a thread of its own; a file appears
whole or not at all, and what a kill takes is at most the rows of one file that was not yet written.
"""

import logging
import queue
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from freshrank.features.encoder import Blocks
from freshrank.schema import QUERY_ITEM_ID
from freshrank.serving.ranking.ranked import Ranked
from freshrank.storage.files import atomic_write

ROWS_PER_FILE = 500
SECONDS_PER_FILE = 60.0
WAITING = 200
"""Requests that may wait to be written; the next ones are dropped and counted."""
_BLOCK = "input_"
_TENSOR = pl.Struct({"dtype": pl.String, "shape": pl.List(pl.Int64), "data": pl.Binary})

log = logging.getLogger(__name__)

_Entry = tuple[Ranked, datetime]


class RequestLog:
    """Writes ``<directory>/<UTC date>/<process>-<number>.parquet``.

    Args:
        share: of the requests that are kept, drawn by chance.
        rows, seconds: a file is written when it holds so many, or this long after its first.
    """

    def __init__(
        self, directory: Path, share: float, rows: int = ROWS_PER_FILE, seconds: float = SECONDS_PER_FILE, seed: int = 0
    ) -> None:
        self._directory = directory
        self._share = share
        self._rows = rows
        self._seconds = seconds
        self._random = np.random.default_rng(seed or None)
        self._process = uuid.uuid4().hex[:12]
        self._files = 0
        self._queue: queue.Queue[_Entry | None] = queue.Queue(WAITING)
        self._writer = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._writer.start()

    def offer(self, ranked: Ranked) -> bool | None:
        """Keep ``ranked`` if it is drawn: True, False where it had to be dropped, None where it was not drawn."""
        if self._random.random() >= self._share:
            return None
        try:
            self._queue.put_nowait((ranked, datetime.now(UTC)))
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        """Write what waits, and stop."""
        self._queue.put(None)
        self._writer.join()

    def _write_all(self) -> None:
        while (first := self._queue.get()) is not None:
            entries, goes_on = self._following(first, time.monotonic() + self._seconds)
            self._write(entries)
            if not goes_on:
                return

    def _following(self, first: _Entry, due: float) -> tuple[list[_Entry], bool]:
        """``first`` and what comes before the file is full or ``due``, and whether more may come."""
        entries = [first]
        while len(entries) < self._rows and (left := due - time.monotonic()) > 0:
            try:
                taken = self._queue.get(timeout=left)
            except queue.Empty:
                break
            if taken is None:
                return entries, False
            entries.append(taken)
        return entries, True

    def _write(self, entries: list[_Entry]) -> None:
        self._files += 1
        path = self._directory / f"{entries[0][1]:%Y-%m-%d}" / f"{self._process}-{self._files:06d}.parquet"
        try:
            with atomic_write(path) as temporary:
                pl.DataFrame([_row(*each) for each in entries], schema=_schema(entries)).write_parquet(
                    temporary, compression="zstd"
                )
        except Exception as error:
            # A full disk, or a row that cannot be written, costs these rows and not the ones to come.
            log.warning("request log: %d requests are lost, %s cannot be written: %s", len(entries), path, error)


def _row(ranked: Ranked, served_at: datetime) -> dict[str, Any]:
    answer = ranked.answer
    return {
        "request_id": ranked.request_id or uuid.uuid4().hex,
        "event_timestamp": ranked.at,
        "served_at": served_at,
        "user_id": ranked.user_id,
        "query_item_id": ranked.context.get(QUERY_ITEM_ID),
        "context": [
            {"name": name, "value": float(value)} for name, value in ranked.context.items() if name != QUERY_ITEM_ID
        ],
        "experiment": ranked.experiment,
        "arm": int(answer["arm"][0]),
        "model_version": int(answer["model_version"][0]),
        "degraded": bool(answer["degraded"][0]),
        "item_ids": ranked.item_ids.tolist(),
        "score": answer["score"].tolist(),
        "probabilities": answer["probabilities"].tolist(),
        "cold": answer["cold"].tolist(),
        "known": answer["known"].tolist(),
        "shadows": [
            {"version": version} | {name: answer_of[name].tolist() for name in ("score", "probabilities")}
            for version, answer_of in ranked.shadows.items()
        ],
    } | {
        _BLOCK + name: {"dtype": block.dtype.str, "shape": list(block.shape), "data": block.tobytes()}
        for name, block in ranked.inputs.items()
    }


def _schema(entries: list[_Entry]) -> dict[str, Any]:
    blocks = sorted({name for ranked, _ in entries for name in ranked.inputs})
    utc, floats = pl.Datetime("us", "UTC"), pl.List(pl.Float32)
    return {
        "request_id": pl.String,
        "event_timestamp": utc,
        "served_at": utc,
        "user_id": pl.Int64,
        "query_item_id": pl.Int64,
        "context": pl.List(pl.Struct({"name": pl.String, "value": pl.Float64})),
        "experiment": pl.String,
        "arm": pl.Int64,
        "model_version": pl.Int64,
        "degraded": pl.Boolean,
        "item_ids": pl.List(pl.Int64),
        "score": floats,
        "probabilities": pl.List(floats),
        "cold": pl.List(pl.Boolean),
        "known": pl.List(pl.Boolean),
        "shadows": pl.List(pl.Struct({"version": pl.Int64, "score": floats, "probabilities": pl.List(floats)})),
    } | {_BLOCK + name: _TENSOR for name in blocks}


def read_log(directory: Path) -> pl.DataFrame:
    """All requests under ``directory`` by the time they were served; columns that a file lacks are null."""
    files = sorted(directory.glob("*/*.parquet"))
    if not files:
        return pl.DataFrame(schema=_schema([]))
    return pl.concat([pl.read_parquet(file) for file in files], how="diagonal_relaxed").sort("served_at")


def inputs_of(row: dict[str, Any]) -> Blocks:
    """What the ranker was given for one row of :func:`read_log` (``named=True``): dtypes, shapes and bits."""
    tensors = {name.removeprefix(_BLOCK): value for name, value in row.items() if name.startswith(_BLOCK) and value}
    return {name: np.frombuffer(t["data"], t["dtype"]).reshape(t["shape"]) for name, t in tensors.items()}
