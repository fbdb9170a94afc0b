"""`freshrank bench swap`: its arithmetic, and a small run of all it starts."""

from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from freshrank.bench.serving.steady_load import draw
from freshrank.bench.serving.swap import Change, SwapPlan, moments, swap, wrong_answers
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.settings import settings
from freshrank.storage.files import read_json

pytestmark = pytest.mark.integration

WORLD = WorldConfig(users=80, days=6, items_at_start=120, new_items_per_day=10, impressions_per_day=1500)


def test_roll_backs_are_spread_evenly_each_after_a_swap() -> None:
    """4 swaps and 2 roll-backs: one after every second swap."""
    swaps = ["swap", "swap", "roll-back"]
    assert SwapPlan(swaps=4, rollbacks=2).changes() == swaps + swaps
    assert SwapPlan(swaps=100, rollbacks=20).changes().count("roll-back") == 20
    assert SwapPlan(swaps=1, rollbacks=0).changes() == ["swap"]


def test_a_request_belongs_to_the_moment_it_was_due_in() -> None:
    """A swap from 10 to 13 s, a second of settling, then as long a quiet time as the swap took."""
    changes = [Change(kind="swap", start=10, end=13, version=3)]
    due = {
        1.0: "between",
        10.0: "swap",
        12.9: "swap",
        13.5: "settling",
        14.1: "steady",
        16.9: "steady",
        17.1: "between",
    }
    requests = pl.DataFrame({"due": list(due)}).with_columns(moment=moments(changes))
    assert requests["moment"].to_list() == list(due.values())


def test_an_answer_with_the_scores_of_another_version_iswrong_answers() -> None:
    """So is one with nobody's scores, or of a version that was never published; a failed request is counted apart."""
    rows = pl.DataFrame(
        {
            "version": [1, 2, 1, 2, 9, 0],
            "model": ["one", "other", "other", "", "one", ""],
            "error": ["", "", "", "", "", "lost"],
        }
    )
    assert wrong_answers(rows, {1: "one", 2: "other"}) == 3


def test_requests_name_unknown_items_among_known_ones(tmp_path: Path) -> None:
    """5 of 100 are items that no import has seen."""
    dataset = simulate(tmp_path / "world", WORLD)
    known = set(dataset.items()["item_id"])
    requests = draw(dataset, candidates=100, count=3)
    assert [sum(item not in known for item in request.item_ids) for request in requests] == [5, 5, 5]
    assert requests == draw(dataset, candidates=100, count=3)


@pytest.mark.slow
def test_swaps_under_load_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real servers, real load: no request fails, every answer is its version's, and nothing piles up."""
    monkeypatch.setenv("FRESHRANK_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    data = simulate(tmp_path / "world", WORLD).path
    result = swap(
        data, SwapPlan(swaps=4, rollbacks=1, rate=20, candidates=50), tmp_path / "swap.json", Console(quiet=True)
    )
    settings.cache_clear()
    assert (result.failed, result.wrong, result.errors) == (0, 0, [])
    assert result.sent == sum(each.requests for each in result.latency.values()) > 100
    assert result.sent == sum(result.answered_by.values())
    assert len(result.answered_by) >= 4
    assert (result.after.processes, result.after.shared_memory) == (
        result.before.processes,
        result.before.shared_memory,
    )
    assert read_json(tmp_path / "swap.json")["sent"] == result.sent
    assert (tmp_path / "swap.png").read_bytes().startswith(b"\x89PNG")
    assert Dataset.open(data).schema.name == result.dataset
