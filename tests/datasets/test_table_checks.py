"""Whatever breaks the contract is refused by name, with what to do about it; nothing is written then."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_logs import SCHEMA, Tables, at, shop

from freshrank.datasets.checks import Findings, check_rows, check_unique
from freshrank.errors import DataError
from freshrank.schema import Column, Kind, Role


def refusal(tables: Tables, tmp_path: Path) -> str:
    """The error's text; asserts that nothing was left at the target."""
    with pytest.raises(DataError) as refused:
        tables.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    return str(refused.value)


CREATED_LATE = shop().breaking("items", created_at=[at(1, 0), at(1, 0), at(1, 10)])
BROKEN = {
    "label outside 0 and 1": (
        shop().breaking("impressions", click=[1, 2, -1, 0]),
        ["impressions.click", "2 row(s), e.g. 2, -1: ", "outside {0, 1, null}"],
    ),
    "half a label": (shop().breaking("impressions", click=[1.0, 0.5, None, 0.0]), ["1 row(s), e.g. 0.5"]),
    "label of the wrong type": (
        shop().breaking("impressions", click=["y", "n", "n", "n"]),
        ["impressions.click", "the type is text (String), expected integer or boolean or float"],
    ),
    "impression before its item": (
        CREATED_LATE,
        ["impressions.event_timestamp", "1 row(s)", "item_id=pot", "precedes its item's created_at"],
    ),
    "unknown item": (
        shop().breaking("impressions", item_id=["mug", "cup", "pan", "cup"]),
        ["impressions.item_id", "1 row(s), e.g. mug", "absent from items", "--allow-unknown-items"],
    ),
    "naive timestamps": (
        shop().breaking("impressions", pl.col("event_timestamp").dt.replace_time_zone(None)),
        ["impressions.event_timestamp", "timestamp without zone", "replace_time_zone"],
    ),
    "date as creation time": (
        shop().breaking("items", pl.col("created_at").dt.date()),
        ["items.created_at", "the type is date", "expected timestamp"],
    ),
    "infinite number": (shop().breaking("items", price=[1.0, float("inf"), 2.0]), ["items.price", "infinite"]),
    "number too large for float32": (shop().breaking("items", price=[1.0, 1e300, 2.0]), ["items.price", "e.g. 1e+300"]),
    "short embedding": (
        shop().breaking("items", vector=[[1.0], [1.0, 2.0], None]),
        ["items.vector", "1 row(s), e.g. 1", "not dim = 2"],
    ),
    "infinite embedding": (
        shop().breaking("items", vector=[[1.0, float("inf")], [1.0, 2.0], None]),
        ["items.vector", "infinite element"],
    ),
    "null key": (
        shop().breaking("impressions", user_id=[None, "bob", "ann", "ann"]),
        ["impressions.user_id", "user_id=null, item_id=pot", "the key is null"],
    ),
    "null timestamp": (
        shop().breaking("impressions", event_timestamp=[None, at(1, 9), at(1, 8), at(2, 7)]),
        ["impressions.event_timestamp", "1 row(s)", "the key is null"],
    ),
    "null creation time": (
        shop().breaking("items", created_at=[None, at(1, 0), at(1, 0)]),
        ["items.created_at", "item_id=cup", "null"],
    ),
    "repeated item": (
        replace(shop(), items=pl.concat([shop().items, shop().items.head(1)])),
        ["items.item_id", "1 row(s), e.g. item_id=cup", "repeated"],
    ),
    "repeated user": (shop().breaking("users", user_id=["ann", "ann"]), ["users.user_id", "e.g. user_id=ann"]),
    "unknown usage": (
        shop().breaking("impressions", usage=["all", "test", None, "history"]),
        ["impressions.usage", "1 row(s), e.g. test", "'evaluation'"],
    ),
    "fractional category": (shop().breaking("items", brand=[1.0, 2.5, None]), ["items.brand", "not a whole number"]),
    "ids beyond int64": (
        shop().breaking("items", brand=pl.Series([1, 2**63, None], dtype=pl.UInt64)),
        ["items.brand", "does not fit into int64"],
    ),
    "text ids here, numbers there": (
        shop().breaking("impressions", query_item_id=[1, 2, 3, 4]),
        ["impressions.query_item_id", "holds numbers", "holds text"],
    ),
    "empty log": (
        replace(shop(), impressions=shop().impressions.clear()),
        ["impressions", "the log is empty"],
    ),
}


@pytest.mark.parametrize("tables, expected", BROKEN.values(), ids=BROKEN.keys())
def test_a_breach_is_refused_by_table_column_rows_and_examples(
    tables: Tables, expected: list[str], tmp_path: Path
) -> None:
    """Each breach alone gives one line with all a reader needs to find and mend it."""
    text = refusal(tables, tmp_path)
    assert "breaks the contract in 1 way(s)" in text
    for part in expected:
        assert part in text


@pytest.mark.parametrize("repeats", [1, 2, 5])
@pytest.mark.parametrize("known", [["itm-1", "itm-2", "an-identifier-longer-than-a-view"], [11, 12, 13]])
@pytest.mark.parametrize("rechunk", [True, False], ids=["one chunk", "chunk per row"])
def test_every_repeated_id_is_counted_and_the_first_are_quoted(
    known: list[str | int], repeats: int, rechunk: bool
) -> None:
    """However many there are, as text or numbers, in a table of one file or of many."""
    repeated = [known[number % 3] for number in range(repeats)]
    rows = [pl.DataFrame({"item_id": [each]}) for each in known + repeated]
    findings = Findings()
    check_unique(pl.concat(rows, rechunk=rechunk), "items", ["item_id"], findings)
    examples = ", ".join(f"item_id={each}" for each in repeated[:3])
    with pytest.raises(DataError) as refused:
        findings.raise_refusals()
    assert f"items.item_id: {repeats} row(s), e.g. {examples}: the key is repeated" in str(refused.value)


def test_users_without_an_id_are_counted(tmp_path: Path) -> None:
    """The key of the users table is one column, so nothing else tells the rows apart."""
    text = refusal(shop().breaking("users", user_id=pl.Series([None, None], dtype=pl.String)), tmp_path)
    assert "users.user_id: 2 row(s), e.g. user_id=null: the key is null" in text


def test_an_exactly_repeated_impression_is_refused(tmp_path: Path) -> None:
    """Same request, user, item and instant; the same pair at another instant would be fine."""
    log = shop().impressions
    text = refusal(Tables(pl.concat([log, log.head(1)]), shop().items, shop().users), tmp_path)
    assert "impressions.request_id+user_id+item_id+event_timestamp: 1 row(s), e.g. request_id=r1" in text


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    """The reader sees at once which column to rename."""
    tables = shop()
    text = refusal(Tables(tables.impressions, tables.items.rename({"brand": "maker"}), tables.users), tmp_path)
    assert "items.brand: the column is missing" in text
    assert "'maker'" in text


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    """One line per problem, over all tables and days."""
    tables = shop().breaking("impressions", click=[2, 0, 0, 3], usage=["x", None, None, None])
    tables = tables.breaking("items", price=[float("-inf")] * 3).breaking("users", user_id=["ann", "ann"])
    lines = refusal(tables, tmp_path).splitlines()
    assert lines[0] == "the data breaks the contract in 4 way(s):"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "items.price",
        "users.user_id",
        "impressions.click",
        "impressions.usage",
    ]
    assert "2 row(s), e.g. 2, 3: " in lines[3]


def test_unknown_items_pass_counted_where_allowed(tmp_path: Path) -> None:
    """A cold-complete model scores them."""
    tables = shop().breaking("impressions", item_id=["mug", "cup", "pan", "cup"])
    dataset = tables.write(tmp_path / "out", allow_unknown_items=True)
    assert dataset.manifest["counts"]["impressions of items absent from items"] == 1


def test_unknown_users_and_nans_pass_counted(tmp_path: Path) -> None:
    """A user without a row is a cold user; NaN means missing."""
    counts = shop().breaking("users", user_id=["ann", "eve"]).write(tmp_path / "out").manifest["counts"]
    assert counts == {
        "impressions of users absent from users": 2,
        "items.price: NaN read as null": 1,
        "items.vector: vectors with NaN read as null": 1,
    }


def test_an_impression_at_the_instant_of_creation_is_sound(tmp_path: Path) -> None:
    """One microsecond earlier is not."""
    exact = shop().breaking("items", created_at=[at(1, 0), at(1, 0), at(1, 9)])
    assert exact.write(tmp_path / "ok").days
    early = exact.breaking("items", created_at=[at(1, 0), at(1, 0), at(1, 9) + timedelta(microseconds=1)])
    with pytest.raises(DataError, match="item_id=pot"):
        early.write(tmp_path / "bad")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=True)), max_size=20))
def test_a_numeric_column_is_refused_exactly_when_float32_holds_an_infinity(values: list[float | None]) -> None:
    """NaN and null never refuse, whatever stands beside them."""
    findings = Findings()
    frame = pl.DataFrame({"price": pl.Series(values, dtype=pl.Float64)})
    check_rows(frame, "users", {"price": Column(role=Role.PROFILE, kind=Kind.NUMERIC)}, findings)
    assert findings.sound == (not frame["price"].cast(pl.Float32).is_infinite().any())


def test_the_tiny_log_itself_is_sound(tmp_path: Path) -> None:
    """Otherwise the cases above would prove nothing."""
    assert shop().write(tmp_path / "out").schema == SCHEMA
