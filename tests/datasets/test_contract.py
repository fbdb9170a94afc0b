"""What an import leaves on disk: codes that never change, sorted days, the same bytes for the same input."""

import errno
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_logs import SCHEMA, Tables, at, digests, shop

from freshrank.datasets.dataset import Dataset, Frame
from freshrank.datasets.mappings import Mappings
from freshrank.datasets.writer import write_dataset
from freshrank.errors import DataError
from freshrank.schema import load_schema


def mapping(dataset: Dataset, name: str) -> dict[str, int]:
    return dict(pl.read_parquet(dataset.path / "mappings" / f"{name}.parquet").rows())


def test_a_day_is_sorted_by_time_user_and_item_with_the_types_of_the_contract(tmp_path: Path) -> None:
    """Codes follow sorted order of first appearance: items first, then users, so cup < pan < pot and ann < bob."""
    dataset = shop().write(tmp_path / "out")
    assert [str(day) for day in dataset.days] == ["2024-03-01", "2024-03-02"]
    log = dataset.impressions().collect()
    assert log.drop("request_id", "day").rows() == [
        (at(1, 8), 0, 1, None, None, 0, "all"),
        (at(1, 9), 1, 0, None, 0, 1, "all"),
        (at(1, 9), 1, 2, 0, 1, 1, "all"),
        (at(2, 7), 0, 0, 1, 1, None, "all"),
    ]
    types = {name: str(dtype) for name, dtype in log.schema.items()}
    assert types == {
        "request_id": "Int64",
        "event_timestamp": "Datetime(time_unit='us', time_zone='UTC')",
        "user_id": "Int64",
        "item_id": "Int64",
        "query_item_id": "Int64",
        "click": "Int8",
        "device": "Int64",
        "usage": "String",
        "day": "Date",
    }


def test_content_is_coded_tokenised_and_cut(tmp_path: Path) -> None:
    """Tags keep their first two values, titles their lower-case words; a vector with NaN is missing as a whole."""
    items = shop().write(tmp_path / "out").items()
    assert items.drop("created_at").rows() == [
        (0, 1, [2, 1], [0, 1, 0, 1], 1.5, [0.5, 1.0]),
        (1, 0, [2, 0], [2], None, None),
        (2, None, None, None, None, None),
    ]
    assert items.schema["price"] == pl.Float32
    assert items.schema["vector"] == pl.List(pl.Float32)


def test_a_request_keeps_its_id_and_ids_of_others_differ(tmp_path: Path) -> None:
    """Text request ids become digests, so they need no mapping."""
    dataset = shop().write(tmp_path / "out")
    requests = dataset.impressions().collect()["request_id"]
    assert requests.n_unique() == 3
    assert requests.min() >= 0  # type: ignore[operator]
    assert not (dataset.path / "mappings" / "request_id.parquet").exists()


def test_importing_again_extends_the_mappings_and_renumbers_nothing(tmp_path: Path) -> None:
    """A new item that sorts first still gets the last code."""
    first = mapping(shop().write(tmp_path / "out"), "item_id")
    tables = shop()
    more = tables.items.head(1).with_columns(item_id=pl.lit("ax"))
    again = Tables(tables.impressions, pl.concat([more, tables.items]), tables.users).write(tmp_path / "out")
    assert mapping(again, "item_id") == first | {"ax": 3}


def test_the_same_input_gives_the_same_bytes_in_any_row_order(tmp_path: Path) -> None:
    """Neither the order of rows nor the split into files is seen in the result."""
    tables = shop()
    tables.write(tmp_path / "a")
    shuffled = Tables(tables.impressions.reverse(), tables.items.reverse(), tables.users.reverse())
    shuffled.write(tmp_path / "b")
    parts: list[Frame] = [tables.impressions.slice(2), tables.impressions.head(2).lazy()]
    write_dataset(tmp_path / "c", SCHEMA, parts, tables.items, tables.users, {"adapter": "test"})
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")


def test_importing_the_same_data_twice_changes_no_byte(tmp_path: Path) -> None:
    """Idempotent, and nothing is left beside the dataset."""
    before = digests(shop().write(tmp_path / "out").path)
    assert digests(shop().write(tmp_path / "out").path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_manifest_accounts_for_every_row_and_file(tmp_path: Path) -> None:
    """Rows and sha256 per table and day."""
    dataset = shop().write(tmp_path / "out")
    written = digests(dataset.path)
    assert {day: entry["rows"] for day, entry in dataset.manifest["days"].items()} == {"2024-03-01": 3, "2024-03-02": 1}
    for day in dataset.days:
        name = str(dataset.partition(day).relative_to(dataset.path))
        assert dataset.manifest["days"][day.isoformat()]["sha256"] == written[name]
    assert {name: entry["sha256"] for name, entry in dataset.manifest["files"].items()} == {
        name: written[name] for name in ("items.parquet", "users.parquet")
    }


def test_the_day_of_an_impression_follows_the_schemas_clock(tmp_path: Path) -> None:
    """07:00 UTC is still the day before at UTC-8."""
    dataset = shop().write(tmp_path / "out", SCHEMA.model_copy(update={"utc_offset_hours": -8}))
    assert [str(day) for day in dataset.days] == ["2024-03-01"]
    log = shop().breaking("impressions", event_timestamp=[at(1, 9), at(1, 9), at(1, 7), at(2, 7)])
    assert str(log.write(tmp_path / "b", SCHEMA.model_copy(update={"utc_offset_hours": -8})).days[0]) == "2024-02-29"


def test_timestamps_of_another_zone_are_written_as_utc(tmp_path: Path) -> None:
    """The instant counts, not the clock it was written with."""
    tokyo = pl.col("event_timestamp").dt.convert_time_zone("Asia/Tokyo").dt.cast_time_unit("ms")
    shop().write(tmp_path / "a")
    shop().breaking("impressions", tokyo).write(tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_usage_and_judged_created_at_are_kept_though_no_schema_names_them(tmp_path: Path) -> None:
    """Null usage means all."""
    tables = shop().breaking("impressions", usage=["history", None, "evaluation", "all"])
    tables = tables.breaking("items", judged_created_at=[at(1), at(2), None])
    dataset = tables.write(tmp_path / "out")
    assert dataset.impressions().collect()["usage"].to_list() == ["evaluation", "all", "history", "all"]
    assert dataset.items()["judged_created_at"].to_list() == [at(1), at(2), None]


def test_the_written_schema_reads_back_without_source_names(tmp_path: Path) -> None:
    """The written tables carry the contract's names, so importing them again would not find the source's."""
    click = SCHEMA.impressions["click"].model_copy(update={"source": "is_click"})
    schema = SCHEMA.model_copy(update={"impressions": SCHEMA.impressions | {"click": click}})
    dataset = shop().write(tmp_path / "out", schema)
    assert load_schema(dataset.path / "schema.yaml") == SCHEMA


def test_a_refused_import_leaves_the_previous_dataset(tmp_path: Path) -> None:
    """Byte for byte."""
    before = digests(shop().write(tmp_path / "out").path)
    with pytest.raises(DataError):
        shop().breaking("impressions", click=[9, 9, 9, 9]).write(tmp_path / "out")
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        pl.exceptions.ComputeError("underlying IO error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_so_and_leaves_the_previous_dataset(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both as Python and as polars report it."""

    def full(*_: object, **__: object) -> None:
        raise error

    before = digests(shop().write(tmp_path / "out").path)
    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(DataError, match="the disk is full"):
        shop().write(tmp_path / "out")
    assert digests(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_polars_still_words_a_full_disk_as_we_read_it() -> None:
    """The number in the text is all there is to go by."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises((pl.exceptions.ComputeError, OSError), match=r"os error 28|Errno 28"):
        pl.DataFrame({"a": range(1_000)}).write_parquet("/dev/full")


def test_a_killed_import_leaves_the_previous_dataset_and_a_second_one_completes(tmp_path: Path) -> None:
    """SIGKILL after the days are written and before the manifest is."""
    before = digests(shop().write(tmp_path / "out").path)
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "import freshrank.datasets.writer as contract\nfrom pathlib import Path\nfrom tiny_logs import shop\n"
        "contract.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "shop().write(Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -9
    assert digests(tmp_path / "out") == before
    assert digests(shop().write(tmp_path / "out").path) == before


def test_a_directory_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    """A mistyped --out must not delete a home directory."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not an imported dataset"):
        shop().write(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_numbers_after_text_in_the_same_place_are_refused(tmp_path: Path) -> None:
    """Their codes would collide with those the mapping gave."""
    shop().write(tmp_path / "out")
    with pytest.raises(DataError, match=r"items.brand: holds numbers, but mappings/brand.parquet"):
        shop().breaking("items", brand=[1, 2, 3]).write(tmp_path / "out")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), max_size=6))
def test_a_code_never_changes_whatever_comes_after(batches: list[list[str]]) -> None:
    """Append-only: each value keeps the first code it got, and codes are 0 .. n - 1."""
    mappings, seen = Mappings(Path("nowhere")), dict[str, int]()
    for batch in batches:
        codes = mappings.encode("brand", pl.Series("brand", batch, dtype=pl.String)).to_list()
        for value, code in zip(batch, codes, strict=True):
            assert seen.setdefault(value, code) == code
    assert sorted(seen.values()) == list(range(len(seen)))
