"""`freshrank bench serving`: the arithmetic of its ratios, and a small run of everything it starts."""

from pathlib import Path

import pytest
from rich.console import Console

from freshrank.bench.serving.latency import (
    FASTAPI,
    FLOORS,
    OURS,
    RANKER,
    SYSTEMS,
    UNCACHED,
    Round,
    Rounds,
    ServingPlan,
    ratios,
    serving,
)
from freshrank.bench.serving.load import draw
from freshrank.config import CalibrationConfig, ModelConfig, RunConfig, TrainingConfig, WindowConfig
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.storage.files import read_json

pytestmark = pytest.mark.integration

PLAN = ServingPlan(sizes=(500,), callers=(1, 2), rounds=2)


def measured(p99: dict[str, tuple[float, float]], rate: dict[str, tuple[float, float]]) -> Rounds:
    """Two rounds; ``p99`` with one caller, ``rate`` with two, twice that of one."""
    rounds: Rounds = {}
    for system in SYSTEMS:
        alone, busy = p99.get(system, (1.0, 1.0)), rate.get(system, (1.0, 1.0))
        for callers in PLAN.callers:
            rounds[system, 500, callers] = [
                Round(requests=1, p50_ms=1.0, p99_ms=a, per_second=b * callers / 2, caller_cores=0.1)
                for a, b in zip(alone, busy, strict=True)
            ]
    return rounds


def test_ratios_are_taken_within_a_round_against_the_better_floor() -> None:
    """Ours 8 and 30 ms; the floors 10 and 20, and 12 and 10: 8/10 and 30/10, so 1.9 in the middle, within 2."""
    one, both = FLOORS
    formed = ratios(
        measured(
            {OURS: (8, 30), one: (10, 20), both: (12, 10), RANKER: (4, 10), UNCACHED: (20, 20)},
            {OURS: (50, 70), one: (100, 90), both: (80, 100), FASTAPI: (10, 7)},
        ),
        PLAN,
    )
    values = [(ratio.value, ratio.lowest, ratio.highest, ratio.met) for ratio in formed]
    assert values[0] == (pytest.approx(1.9), pytest.approx(0.8), pytest.approx(3.0), True)
    assert values[1] == (pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0), None)
    assert values[2] == (pytest.approx(2.5), pytest.approx(2.0), pytest.approx(3.0), True)
    assert values[3] == (pytest.approx(0.6), pytest.approx(0.5), pytest.approx(0.7), True)
    assert values[-1] == (pytest.approx(7.5), pytest.approx(5.0), pytest.approx(10.0), None)


def test_a_target_that_is_missed_says_so() -> None:
    """Twice and a little more than the floor is not at most twice."""
    missed = ratios(measured({OURS: (21, 21), FLOORS[0]: (10, 10), FLOORS[1]: (10, 10)}, {}), PLAN)[0]
    assert (missed.met, missed.target) == (False, "at most 2")


def test_drawn_requests_repeat_and_hold_new_items(tmp_path: Path) -> None:
    """Same seed, same requests; one candidate in twenty is among the newest twentieth of the items."""
    dataset = simulate(tmp_path / "data", WorldConfig(users=40, days=3, items_at_start=190, new_items_per_day=5))
    first, again = (draw(dataset, 40, 3, seed=1, at_us=5) for _ in range(2))
    newest = set(dataset.items().sort("created_at", descending=True)["item_id"].head(10))
    for query, same in zip(first, again, strict=True):
        assert query.item_ids.tolist() == same.item_ids.tolist()
        assert len(query.item_ids) == 40
        assert set(query.item_ids[:2].tolist()) <= newest


@pytest.mark.slow
def test_a_small_run_measures_all_systems_and_writes_figures_and_picture(tmp_path: Path) -> None:
    """Real Redis, two Tritons, FastAPI: no wrong answer, a cell for each system, size and number of callers."""
    world = WorldConfig(users=150, days=6, items_at_start=200, new_items_per_day=15, impressions_per_day=4000)
    data = simulate(tmp_path / "data", world).path
    config = RunConfig(
        windows=WindowConfig(train_days=3),
        model=ModelConfig(item_id_dim=4, categorical_dim=4, sequence_dim=8, group_dim=8, mlp=(16, 8), expert_dim=8),
        training=TrainingConfig(batch_size=256, learning_rate=1e-2),
        calibration=CalibrationConfig(min_positives=1),
    )
    plan, out = ServingPlan(sizes=(5, 20), callers=(1, 2), seconds=0.3, rounds=1), tmp_path / "serving.json"
    result = serving(data, tmp_path / "home", plan, out, config, Console(quiet=True))
    assert result.wrong == 0
    assert {(cell.system, cell.candidates, cell.callers) for cell in result.cells} == {
        (system, *cell) for system in SYSTEMS for cell in ((5, 1), (20, 1), (5, 2))
    }
    assert read_json(out)["ratios"][0]["name"] == "p99 of ranking / floor, 5 candidates, 1 caller"
    assert out.with_suffix(".png").stat().st_size > 10_000
