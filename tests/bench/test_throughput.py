"""What `freshrank bench train` compares: the same rows, the same shape, memory of one process each."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from freshrank.bench.measure import peak_mib, ratio
from freshrank.bench.paper.evidence_data import Prepared, load_evidence
from freshrank.bench.paper.rows import BASELINE, ROWS, config_of
from freshrank.bench.training import peers
from freshrank.bench.training.throughput import (
    NUMERICS,
    READY,
    STREAMED,
    FirstBatches,
    Measurement,
    NumericsSpeed,
    PreparedBatches,
    TrainPlan,
    _ratios,
    advice,
    train,
)
from freshrank.config import ModelConfig, TrainingConfig
from freshrank.errors import ConfigError
from freshrank.models.ranker import Ranker
from freshrank.recipes import recipe
from freshrank.storage.files import read_json
from freshrank.training.batches import Encoded, TensorFrame

IN_BOTH_PRECISIONS = tuple(each for each in NUMERICS if not each[1])
"""Without compilers, which take a minute."""
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def encoded(world: Prepared) -> Encoded[TensorFrame]:
    config = config_of(ROWS[BASELINE], 0, windows=world.source.windows)
    return load_evidence(world.source).encoded(config).train


def test_batches_held_ready_are_those_a_source_gives(encoded: Encoded[TensorFrame]) -> None:
    """The first three of an epoch."""
    first, ready = FirstBatches(encoded.data, 3), PreparedBatches(encoded.data, 3, TrainingConfig(batch_size=64))
    pairs = list(zip(first.feed(64, 1, 0), ready.feed(64, 1, 0), strict=True))
    assert len(pairs) == 3
    assert all(torch.equal(a.batch.inputs["item_id"], b.batch.inputs["item_id"]) for a, b in pairs)


def test_a_peers_row_is_an_impression_with_its_users_features_beside_it(encoded: Encoded[TensorFrame]) -> None:
    """Every vocabulary's feature is a column; a sequence stands in every row of its user."""
    batch = encoded.data.batch(torch.arange(64))
    rows, labels = peers.rows_of(batch, encoded.encoder, Ranker(encoded.encoder, ModelConfig()))
    columns = peers.Fields.of(encoded.encoder, ModelConfig(), rows[peers.DENSE].shape[1])
    assert set(rows) == {*columns.single, *columns.several, *columns.sequence, "action", peers.DENSE}
    assert {len(block) for block in rows.values()} == {64} == {len(labels)}
    assert torch.equal(rows["seen_id"], batch.inputs["sequence_items"][batch.inputs["user_index"]])
    assert torch.isfinite(rows[peers.DENSE]).all()
    assert all(int(rows[name].max()) < size for name, (size, _) in columns.single.items())


@pytest.mark.parametrize("name", ["torch-rechub", "FuxiCTR"])
def test_a_peer_learns_from_the_rows(encoded: Encoded[TensorFrame], name: str) -> None:
    """Twenty times the same 64 rows: a lower loss."""
    batch = encoded.data.batch(torch.arange(64))
    rows, labels = peers.rows_of(batch, encoded.encoder, Ranker(encoded.encoder, ModelConfig()))
    columns = peers.Fields.of(encoded.encoder, ModelConfig(), rows[peers.DENSE].shape[1])
    with peers.silent():
        peer = peers.PEERS[name](columns, ModelConfig(), 1e-2)
        first, *_, last = [sum(peer.train([(rows, labels)])) for _ in range(20)]
    assert last < 0.9 * first
    assert peer.parameters > 10_000


def test_a_ratio_is_the_median_of_those_of_each_round_against_the_better_peer() -> None:
    """Streamed 90, 80, 70 rows/s against 100, 100, 50 ready; peers at 20 and 30."""
    turns = [
        {STREAMED: speed(ours), READY: speed(ready), "torch-rechub": speed(20), "FuxiCTR": speed(30)}
        for ours, ready in ((90, 100), (80, 100), (70, 50))
    ]
    memory, better = _ratios(turns, ("torch-rechub", "FuxiCTR"))
    assert (memory.value, memory.lowest, memory.highest, memory.met) == (0.9, 0.8, 1.4, True)
    assert better.value == pytest.approx(80 / 30)
    assert not better.met


def numerics(precision: str, compiled: bool, *speed_ups: float, failure: str = "") -> NumericsSpeed:
    found = ratio("speed-up", speed_ups, [1.0] * len(speed_ups)) if speed_ups else None
    return NumericsSpeed(precision=precision, compile=compiled, speed_up=found, failure=failure)


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        (
            [numerics("float32", True, 1.2, 1.3), numerics("bfloat16", True, 1.9, 1.7)],
            "cuda (H): the fastest is --set training.precision=bfloat16 --set training.compile=true",
        ),
        (
            [numerics("float32", True, failure="no compiler"), numerics("bfloat16", False, 2.0, 0.9)],
            "cuda (H): nothing is faster than the defaults in every round",
        ),
    ],
)
def test_the_configuration_to_set_is_the_fastest_that_is_faster_in_every_round(
    speeds: list[NumericsSpeed], expected: str
) -> None:
    """And its name is what `--set` takes."""
    assert advice("cuda (H)", speeds).startswith(expected)
    flags = [part for part in advice("cuda (H)", speeds).replace(";", " ").split() if "=" in part]
    assert recipe("baseline", flags).training.compile == bool(flags)


def speed(rows: int) -> Measurement:
    return Measurement(rows=rows, seconds=1.0, cpu_seconds=1.0, peak_mib=1.0)


def test_peak_memory_counts_what_was_let_go() -> None:
    """64 MiB."""
    before = peak_mib()
    torch.ones(16 * 2**20).sum()
    assert peak_mib() >= before
    assert peak_mib() > 64


def test_a_peer_that_is_not_installed_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An import of it fails."""
    monkeypatch.setitem(__import__("sys").modules, "torch_rechub.trainers", None)
    with pytest.raises(ConfigError, match=r"torch-rechub cannot be imported.*pip install 'freshrank\[bench\]'"):
        peers.require(["torch-rechub"])


def test_rows_that_all_fit_a_window_are_refused_before_anything_is_measured(world: Prepared, tmp_path: Path) -> None:
    """Nothing would be streamed, and the comparison would be of one thing with itself."""
    plan = TrainPlan(days=3, window_rows=10**6, peers=())
    with pytest.raises(
        ConfigError, match=r"--window-rows: received 1000000, expected fewer than the \d+ training rows"
    ):
        train(world.source.path, world.source.run_date, plan, tmp_path / "train.json", Console(quiet=True))


@pytest.mark.slow
def test_the_whole_measurement_ends_with_the_same_losses_and_its_files(world: Prepared, tmp_path: Path) -> None:
    """Ten batches of 256 rows, one round, torch-rechub; streamed in windows of 1,000 rows."""
    plan = TrainPlan(
        days=3,
        batch_size=256,
        window_rows=1000,
        steps=10,
        peer_steps=4,
        rounds=1,
        peers=("torch-rechub",),
        numerics=IN_BOTH_PRECISIONS,
    )
    result = train(world.source.path, world.source.run_date, plan, tmp_path / "train.json", Console(quiet=True))
    assert result.same_losses
    assert read_json(tmp_path / "train.json") == result.model_dump()
    assert (tmp_path / "train.png").stat().st_size > 10_000
    assert [(each.precision, each.compile, each.failure) for each in result.numerics] == [("bfloat16", False, "")]
    assert result.advice.startswith("cpu")
    assert set(result.systems) == {STREAMED, READY, "torch-rechub", "torch-rechub, its own loader"}
