"""Who is judged against whom when the schema changes between two days."""

from pathlib import Path

from freshrank.judged import Champion, lacking_inputs
from freshrank.schema import Schema
from tests.worlds import tiny_schema


def _with(table: str, **columns: dict[str, object] | None) -> Schema:
    """The tiny schema with columns added, changed, or (None) removed."""
    tree = tiny_schema().model_dump(mode="json")
    tree[table] = {name: column for name, column in (tree[table] | columns).items() if column is not None}
    return Schema.model_validate(tree)


def test_a_champion_fits_a_schema_that_has_gained_columns() -> None:
    """It reads its own features and does not see the new one."""
    grown = _with("items", colour={"role": "content", "kind": "categorical"})
    assert lacking_inputs(tiny_schema(), grown) == []


def test_a_champion_does_not_fit_a_schema_that_lost_or_reshaped_one_of_its_columns() -> None:
    """Both are named."""
    changed = _with("items", duration=None, vector={"role": "content", "kind": "embedding", "dim": 8})
    assert lacking_inputs(tiny_schema(), changed) == ["duration", "vector"]


def test_a_champion_with_other_actions_cannot_be_compared() -> None:
    """Its probabilities are of something else; its action counters are missing as well."""
    lacking = lacking_inputs(tiny_schema(), _with("impressions", save=None))
    assert lacking[0] == "actions"
    assert "item_save_1d" in lacking


def test_the_report_says_why_popularity_stands_in_for_the_champion() -> None:
    """Nobody must believe that nothing serves."""
    champion = Champion(3, "2024-01-07", "f", bundle=Path(), lacking=("duration",))
    assert str(champion) == "popularity (version 3 of 2024-01-07 needs duration)"
