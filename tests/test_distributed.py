"""Two processes started by torchrun, over gloo, against one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from freshrank.storage import sha256_of
from freshrank.training import Trained, labels_of, masked_bce, predict
from tests.homes import Home
from tests.rank import SCHEMA, frame, trained

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")


def _started(*arguments: str, environment: dict[str, str] | None = None) -> None:
    port = ("--master-port", str(np.random.default_rng().integers(20_000, 30_000)))
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TORCHRUN, *port, *arguments], env=(environment or dict(os.environ)) | threads,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    _started("-m", "tests.rank", str(out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("source", ["memory", "stream"])
def test_both_ranks_hold_the_same_ranker(ranks: Path, source: str) -> None:
    """To the bit."""
    assert len({sha256_of(ranks / f"{source}-{rank}" / "ranker.safetensors") for rank in (0, 1)}) == 1


@pytest.mark.slow
def test_two_processes_train_the_ranker_of_one_on_the_same_batches(ranks: Path, tmp_path: Path) -> None:
    """45 steps of 64 rows, 32 on each: losses to 1e-4, weights to 1e-3 (sums in another order, amplified by Adam)."""
    one, two = trained("memory", tmp_path / "shards"), Trained.load(ranks / "memory-0")
    curves = [each.facts["curve"]["losses"]["bce"] for each in (one, two)]
    assert np.allclose(*curves, rtol=1e-4, atol=0)
    weights = two.ranker.state_dict()
    assert all(torch.allclose(value, weights[name], atol=1e-3) for name, value in one.ranker.state_dict().items())


@pytest.mark.slow
def test_two_processes_on_shards_of_their_own_reach_the_loss_of_one(ranks: Path, tmp_path: Path) -> None:
    """Other rows in every batch, the same number of them: after three epochs, loss over all rows to 3%, where another
    seed moves that of one process by 2%."""
    one, two = trained("stream", tmp_path / "shards"), Trained.load(ranks / "stream-0")
    assert one.facts["curve"]["steps"] == two.facts["curve"]["steps"]
    first = one.facts["curve"]["losses"]["bce"][0]
    assert _loss(one) < 0.9 * first
    assert _loss(two) == pytest.approx(_loss(one), rel=0.03)


def _loss(trained: Trained) -> float:
    logits, labels = predict(trained, frame("stream"), frame("stream").items), labels_of(frame("stream"), SCHEMA)
    return float(masked_bce(torch.from_numpy(logits), torch.from_numpy(labels)))


@pytest.mark.slow
def test_torchrun_starts_freshrank_train_and_one_process_writes_it(tmp_path: Path) -> None:
    """Streamed; a second start finds it done."""
    home = Home.make(tmp_path)
    shared = ("--data", str(home.data), "--date", "2024-01-07")
    build = [sys.executable, "-m", "freshrank", "features", "build", *shared]
    subprocess.run(build, env=home.environment, check=True, capture_output=True)
    sets = [part for value in ("training.window_rows=2000", "windows.train_days=3") for part in ("--set", value)]
    train = ("-m", "freshrank", "train", *shared, *sets)
    _started(*train, "--out", str(tmp_path / "ranker"), environment=home.environment)
    _started(*train, "--out", str(tmp_path / "again"), environment=home.environment)
    assert sha256_of(tmp_path / "ranker" / "ranker.json") == sha256_of(tmp_path / "again" / "ranker.json")
    assert len(list((tmp_path / "home" / "steps").glob("*/train/*"))) == 1
