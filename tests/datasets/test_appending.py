"""`freshrank import parquet --add`: new days beside those that are there, which are neither read nor written again."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import polars as pl
import pytest
from tiny_logs import SCHEMA, Tables, at, digests, shop

from freshrank.datasets.dataset import MANIFEST, Dataset
from freshrank.errors import DataError

FIRST, SECOND = date(2024, 3, 1), date(2024, 3, 2)


def of_day(tables: Tables, day: int) -> Tables:
    """The tables with the impressions of one day of March."""
    return replace(tables, impressions=tables.impressions.filter(pl.col("event_timestamp").dt.day() == day))


def add(tables: Tables, out: Path, allow_unknown_items: bool = False) -> Dataset:
    return tables.write(out, allow_unknown_items=allow_unknown_items, add=True)


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """Holds 1 March."""
    of_day(shop(), 1).write(tmp_path / "out")
    return tmp_path / "out"


def test_a_day_that_is_added_gives_what_the_whole_log_gives(started: Path, tmp_path: Path) -> None:
    """File by file, but for the manifest, which says where the rows came from."""
    of_day(shop(), 1).write(tmp_path / "whole")
    shop().write(tmp_path / "whole")
    added = add(of_day(shop(), 2), started)
    assert added.days == [FIRST, SECOND]
    expected, actual = digests(tmp_path / "whole"), digests(started)
    assert {name for name in expected | actual if expected.get(name) != actual.get(name)} <= {MANIFEST}
    whole = Dataset.open(tmp_path / "whole")
    assert added.fingerprint(added.days) == whole.fingerprint(whole.days)


def test_the_files_of_kept_days_are_the_same_files(started: Path) -> None:
    """Not copies: a day costs what that day costs, however long the log is."""
    before = Dataset.open(started).partition(FIRST).stat().st_ino
    assert add(of_day(shop(), 2), started).partition(FIRST).stat().st_ino == before


def test_a_few_late_rows_do_not_replace_their_day_unasked(started: Path) -> None:
    """1 March had three impressions; the new tables have one of it."""
    late = replace(shop(), impressions=shop().impressions.filter(pl.col("request_id").is_in(["r2", "r3"])))
    before = digests(started)
    with pytest.raises(DataError, match=r"holds 1 rows of 2024-03-01, of which 3 are there; .*--replace-days"):
        add(late, started)
    assert digests(started) == before
    added = late.write(started, add=True, replace_days=True)
    assert (added.rows(FIRST), added.rows(SECOND)) == (1, 1)


def test_a_whole_day_that_comes_again_is_replaced(started: Path) -> None:
    """As many rows, another label: the day is the new one."""
    again = of_day(shop(), 1).breaking("impressions", click=[0, 0, 0])
    assert add(again, started).impressions().select("click").collect()["click"].to_list() == [0, 0, 0]


def test_into_an_empty_place_it_is_an_import_like_any_other(tmp_path: Path) -> None:
    shop().write(tmp_path / "whole")
    add(shop(), tmp_path / "added")
    assert digests(tmp_path / "added") == digests(tmp_path / "whole")


def test_an_item_that_kept_days_show_must_not_vanish(started: Path) -> None:
    """Pan was shown on 1 March only. Nothing is changed, unless unknown items are let in."""
    lost = of_day(shop(), 2)
    lost = Tables(
        lost.impressions.with_columns(pl.lit("cup").alias("query_item_id")),
        lost.items.filter(pl.col("item_id") != "pan"),
        lost.users,
    )
    before = digests(started)
    with pytest.raises(DataError, match="pan: an item that a kept day shows is absent from items; bring the whole"):
        add(lost, started)
    assert digests(started) == before
    assert add(lost, started, allow_unknown_items=True).days == [FIRST, SECOND]


def test_an_item_must_not_be_created_after_it_was_shown_on_a_kept_day(started: Path) -> None:
    """Cup was shown on 1 March at 9:00, and is said now to be of 2 March."""
    moved = of_day(shop(), 2).breaking("items", created_at=[at(2, 0), at(1, 0), at(1, 1)])
    with pytest.raises(DataError, match=r"item_id=cup, .*: it is later than an impression of the item on a day"):
        add(moved, started)


@pytest.mark.parametrize("change", [{"utc_offset_hours": 8}, {"name": "other"}])
def test_another_log_is_refused(started: Path, change: dict[str, object]) -> None:
    """Days cut at another hour would hold parts of two; another name has features and models of its own."""
    other = SCHEMA.model_copy(update=change)
    with pytest.raises(DataError, match="expected the same; import the whole log without --add"):
        of_day(shop(), 2).write(started, other, add=True)


def test_numbers_must_not_become_text(tmp_path: Path) -> None:
    """User 7 of the kept day would be whoever gets the code 7."""
    numbers = of_day(shop(), 1).breaking("impressions", user_id=[7, 7, 8]).breaking("users", user_id=[7, 8])
    numbers.write(tmp_path / "out")
    with pytest.raises(DataError, match="holds text, but the log of the days that are kept holds numbers"):
        add(of_day(shop(), 2), tmp_path / "out")


def test_users_that_are_gone_are_counted_aloud(started: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Unknown users are let pass everywhere, so a table that is not whole is no refusal."""
    tables = of_day(shop(), 2)
    add(replace(tables, users=tables.users.filter(pl.col("user_id") == "ann")), started)
    assert "1 of the 2 users that were there are not in this table" in caplog.text
