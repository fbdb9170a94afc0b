"""The request log: whole files, bits as they were, and a request never waits for it."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from freshrank.serving.ranking import request_log as module
from freshrank.serving.ranking.ranked import Ranked
from freshrank.serving.ranking.request_log import RequestLog, inputs_of, read_log


def ranked(number: int, candidates: int = 3) -> Ranked:
    """A request of ``candidates``, with inputs of every dtype and a NaN."""
    scores = np.linspace(0, 1, candidates, dtype=np.float32) + number
    answer = {
        "score": scores,
        "probabilities": np.stack([scores, scores], axis=1),
        "arm": np.array([1]),
        "model_version": np.array([4]),
        "degraded": np.array([False]),
        "cold": scores > 0.5,
        "known": scores >= 0,
    }
    inputs = {
        "item_numeric": np.full((candidates, 2), np.nan, np.float32),
        "item_id": np.arange(candidates),
        "user_index": np.zeros(candidates, np.int64),
    }
    at = datetime(2024, 1, 5, 12, tzinfo=UTC)
    shadows = {7: {"score": scores + 1, "probabilities": answer["probabilities"]}}
    return Ranked(
        f"r{number}",
        number,
        np.arange(candidates),
        at,
        {"query_item_id": 2**60 + 1, "hour": 1.5},
        answer,
        inputs,
        "first",
        shadows,
    )


def test_what_was_served_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    """Scores, flags, context, shadows and the ranker's inputs with their dtypes."""
    log = RequestLog(tmp_path, share=1)
    for number in range(5):
        assert log.offer(ranked(number))
    log.close()
    rows = list(read_log(tmp_path).iter_rows(named=True))
    assert [row["request_id"] for row in rows] == ["r0", "r1", "r2", "r3", "r4"]
    assert rows[2]["score"] == ranked(2).answer["score"].tolist()
    assert (rows[0]["query_item_id"], rows[0]["context"]) == (2**60 + 1, [{"name": "hour", "value": 1.5}])
    assert (rows[0]["experiment"], rows[0]["arm"], rows[0]["model_version"]) == ("first", 1, 4)
    assert [shadow["version"] for shadow in rows[0]["shadows"]] == [7]
    for name, block in inputs_of(rows[1]).items():
        np.testing.assert_array_equal(block, ranked(1).inputs[name], strict=True)


def test_a_share_of_the_requests_is_kept_and_the_others_cost_nothing(tmp_path: Path) -> None:
    """One in ten, drawn by chance."""
    log = RequestLog(tmp_path, share=0.1, seed=1)
    logged = sum(bool(log.offer(ranked(number))) for number in range(1000))
    log.close()
    assert 60 < logged < 140
    assert len(read_log(tmp_path)) == logged


def test_a_file_is_written_when_it_is_full_or_due(tmp_path: Path) -> None:
    """Two rows a file: the third waits for its second to pass."""
    log = RequestLog(tmp_path, share=1, rows=2, seconds=0.5)
    for number in range(3):
        log.offer(ranked(number))
    deadline = time.monotonic() + 10
    while len(read_log(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [len(pl.read_parquet(file)) for file in sorted(tmp_path.glob("*/*.parquet"))] == [2, 1]
    log.close()


def test_a_disk_that_is_full_or_slow_drops_requests_and_never_keeps_one_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The directory is a file: nothing can be written, the loss is logged, and the log goes on."""
    monkeypatch.setattr(module, "WAITING", 2)
    (tmp_path / "log").write_text("in the way")
    slow, write, in_time = threading.Event(), RequestLog._write, []
    monkeypatch.setattr(
        RequestLog, "_write", lambda self, entries: (in_time.append(slow.wait(60)), write(self, entries))
    )
    log = RequestLog(tmp_path / "log", share=1, rows=1)
    said = [log.offer(ranked(number, candidates=2000)) for number in range(200)]
    assert said[-1] is False
    slow.set()
    log.close()
    assert all(in_time), "no offer waited for a write to end"
    assert "1 requests are lost" in caplog.text


def test_a_kill_leaves_whole_files_only(tmp_path: Path) -> None:
    """kill -9 in the middle of writing: every file can be read, and no other is there."""
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from pathlib import Path
from test_request_log import RequestLog, ranked
log = RequestLog(Path({str(tmp_path)!r}), share=1, rows=5)
number = 0
while True:
    log.offer(ranked(number, candidates=500)); number += 1
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*/*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert set(read_log(tmp_path)["model_version"]) == {4}
    assert {len(pl.read_parquet(file)) for file in tmp_path.glob("*/*.parquet")} == {5}
