"""`freshrank bench validation`: the faults it puts in, how engines are held against ours, and a small run."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from freshrank.bench.data.validation import FAULTS, OURS, ValidationPlan, compare, engines, validation, with_faults
from freshrank.config import Severity
from freshrank.storage.files import read_json
from freshrank.validation.expectations import Check, Sheet

pytestmark = pytest.mark.integration

NOON = datetime(2024, 1, 2, 12, tzinfo=UTC)
DAY = datetime(2024, 1, 2, tzinfo=UTC)


def sheet(checks: list[Check]) -> Sheet:
    """Twenty sound impressions."""
    rows = range(20)
    frame = pl.DataFrame(
        {
            "request_id": rows,
            "user_id": rows,
            "item_id": rows,
            "event_timestamp": [NOON] * 20,
            "click": pl.Series([row % 2 for row in rows], dtype=pl.Int8),
        }
    )
    return Sheet("impressions", frame, checks)


CHECKS = [
    Check(
        "no_duplicates",
        Severity.BLOCKING,
        "",
        "",
        "ExpectCompoundColumnsToBeUnique",
        {"column_list": ["request_id", "user_id", "item_id", "event_timestamp"]},
    ),
    Check(
        "click_is_label",
        Severity.BLOCKING,
        "",
        "",
        "ExpectColumnValuesToBeInSet",
        {"column": "click", "value_set": [0, 1]},
    ),
    Check("user_id_present", Severity.BLOCKING, "", "", "ExpectColumnValuesToNotBeNull", {"column": "user_id"}),
    Check(
        "inside_the_day",
        Severity.BLOCKING,
        "",
        "",
        "ExpectColumnValuesToBeBetween",
        {"column": "event_timestamp", "min_value": DAY, "max_value": DAY + timedelta(days=1)},
    ),
]


def test_the_faults_are_those_that_are_named() -> None:
    """Five rows twice, three labels of 7, two rows without a user, ten of the day before."""
    before, after = sheet([]).frame, with_faults(sheet([])).frame
    assert len(after) - len(before) == 5 == len(after) - len(after.unique())
    assert (after["click"] == 7).sum() == 3
    assert after["user_id"].null_count() == 2
    assert (after["event_timestamp"] < DAY).sum() == 10


def test_engines_are_held_against_ours_on_a_faulty_log() -> None:
    """Every engine finds what was put in; only BOOLEAN_ONLY cannot say which values broke an expectation."""
    quick = {name: engine for name, engine in engines().items() if not name.startswith("Spark")}
    by_engine = compare(quick, [sheet(CHECKS)], 1, Console(quiet=True))
    assert set(by_engine) == {"pandas, BOOLEAN_ONLY", OURS, "pandas, COMPLETE", "SQLite, SUMMARY"}
    for name, engine in by_engine.items():
        assert (len(engine.seconds), engine.agreeing, engine.errors) == (1, 4, 0)
        assert engine.found == list(FAULTS)
        assert engine.shows_values == ("BOOLEAN_ONLY" not in name)


def test_an_expectation_that_cannot_run_is_an_error_and_finds_nothing() -> None:
    """A column that is not there: no engine may count its exception as a fault that was found."""
    broken = Check(
        "click_is_label",
        Severity.BLOCKING,
        "",
        "",
        "ExpectColumnValuesToBeInSet",
        {"column": "clicked", "value_set": [0, 1]},
    )
    result = compare({OURS: engines()[OURS]}, [sheet([broken])], 1, Console(quiet=True))[OURS]
    assert (result.errors, result.found) == (1, [])


@pytest.mark.slow
def test_a_small_run_writes_its_evidence(tmp_path: Path) -> None:
    """World, whole days, engines, JSON and picture; the workspace is its own."""
    out = tmp_path / "validation.json"
    result = validation(
        tmp_path / "home", ValidationPlan(rows=2_400, trailing_days=2, repeats=1), out, Console(quiet=True)
    )
    assert result.tables["impressions"] == 2_400
    assert len(result.engines[OURS].found) == len(FAULTS)
    assert read_json(out)["expectations"] == result.expectations > 80
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "home" / "workspace" / "features" / "simulated").is_dir()
