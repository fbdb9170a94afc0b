"""`freshrank import parquet --add`: new days beside those that are there, which are neither read nor written again."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import polars as pl
import pytest
from tiny_logs import SCHEMA, Tables, at, digests, shop

from freshrank.datasets.contract import MANIFEST, Dataset
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
    expected, found = digests(tmp_path / "whole"), digests(started)
    assert {name for name in expected | found if expected.get(name) != found.get(name)} <= {MANIFEST}
    whole = Dataset.open(tmp_path / "whole")
    assert added.fingerprint(added.days) == whole.fingerprint(whole.days)


def test_the_files_of_kept_days_are_the_same_files(started: Path) -> None:
    """Not copies: a day costs what that day costs, however long the log is."""
    before = Dataset.open(started).partition(FIRST).stat().st_ino
    assert add(of_day(shop(), 2), started).partition(FIRST).stat().st_ino == before


def test_a_day_that_comes_again_is_replaced_and_said_where_it_shrank(
    started: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """1 March had three impressions; the new tables have one of it."""
    again = Tables(shop().impressions.filter(pl.col("request_id").is_in(["r2", "r3"])), shop().items, shop().users)
    added = add(again, started)
    assert (added.rows(FIRST), added.rows(SECOND)) == (1, 1)
    assert "2024-03-01 had 3 impressions and has 1 now" in caplog.text


def test_into_an_empty_place_it_is_an_import_like_any_other(tmp_path: Path) -> None:
    shop().write(tmp_path / "whole")
    add(shop(), tmp_path / "added")
    assert digests(tmp_path / "added") == digests(tmp_path / "whole")


def test_an_item_that_kept_days_show_must_not_vanish(started: Path) -> None:
    """Pan was shown on 1 March only. Nothing is changed, unless unknown items are let in."""
    lost = of_day(shop(), 2)
    lost = Tables(lost.impressions.with_columns(pl.lit("cup").alias("query_item_id")),
                  lost.items.filter(pl.col("item_id") != "pan"), lost.users)  # fmt: skip
    before = digests(started)
    with pytest.raises(DataError, match="an item that a kept day shows is absent from items; bring the whole table"):
        add(lost, started)
    assert digests(started) == before
    assert add(lost, started, allow_unknown_items=True).days == [FIRST, SECOND]


def test_an_item_must_not_be_created_after_it_was_shown_on_a_kept_day(started: Path) -> None:
    """Cup was shown on 1 March at 9:00, and is said now to be of 2 March."""
    moved = of_day(shop(), 2).breaking("items", created_at=[at(2, 0), at(1, 0), at(1, 1)])
    with pytest.raises(DataError, match="it is later than an impression of the item on a day that is kept"):
        add(moved, started)


def test_another_shape_of_the_log_is_refused(started: Path) -> None:
    """The kept days were cut at another hour: a day would hold parts of two."""
    other = SCHEMA.model_copy(update={"utc_offset_hours": 8})
    with pytest.raises(DataError, match="expected the same; import the whole log without --add"):
        of_day(shop(), 2).write(started, other, add=True)


def test_numbers_must_not_become_text(tmp_path: Path) -> None:
    """User 7 of the kept day would be whoever gets the code 7."""
    numbers = of_day(shop(), 1).breaking("impressions", user_id=[7, 7, 8]).breaking("users", user_id=[7, 8])
    numbers.write(tmp_path / "out")
    with pytest.raises(DataError, match="holds text, but the log of the days that are kept holds numbers"):
        add(of_day(shop(), 2), tmp_path / "out")
