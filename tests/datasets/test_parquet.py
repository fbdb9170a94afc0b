"""A user's own Parquet files, whatever their columns are called and however they are split."""

from pathlib import Path

import polars as pl
import pytest
from tiny_logs import SCHEMA, digests, shop

from freshrank.datasets.parquet import import_parquet
from freshrank.errors import ConfigError, DataError
from freshrank.schema import Schema, dump_schema


def keep(src: Path, schema: Schema = SCHEMA) -> Path:
    """The shop's tables as a user would keep them, one file each."""
    src.mkdir()
    (src / "schema.yaml").write_text(dump_schema(schema))
    for table in ("impressions", "items", "users"):
        getattr(shop(), table).write_parquet(src / f"{table}.parquet")
    return src


def split_by_day(src: Path) -> None:
    """Replace the log by a directory of hive partitions, whose names are a day off."""
    log = pl.read_parquet(src / "impressions.parquet")
    (src / "impressions.parquet").unlink()
    for name, rows in (("2024-03-02", log.head(3)), ("2024-03-03", log.tail(1))):
        (src / "impressions" / f"date={name}").mkdir(parents=True)
        rows.write_parquet(src / "impressions" / f"date={name}" / "x.parquet")


def test_single_files_and_partitions_give_the_same_dataset(tmp_path: Path) -> None:
    """A row's day is its timestamp's, not its directory's."""
    src = keep(tmp_path / "src")
    one = import_parquet(src, tmp_path / "one")
    split_by_day(src)
    many = import_parquet(src, tmp_path / "many")
    assert many.manifest.pop("source")["files"]["impressions"] == 2
    assert one.manifest.pop("source")["files"]["impressions"] == 1
    assert many.manifest == one.manifest


def test_an_imported_dataset_is_what_writing_the_tables_gives(tmp_path: Path) -> None:
    """The adapter adds nothing but the reading."""
    imported = import_parquet(keep(tmp_path / "src"), tmp_path / "out")
    written = shop().write(tmp_path / "written")
    assert imported.manifest["days"] == written.manifest["days"]
    assert imported.manifest["files"] == written.manifest["files"]


def test_columns_are_found_under_their_source_names(tmp_path: Path) -> None:
    """A column of the contract's name that means something else is set aside."""
    click = SCHEMA.impressions["click"].model_copy(update={"source": "is_click"})
    src = keep(tmp_path / "src", SCHEMA.model_copy(update={"impressions": SCHEMA.impressions | {"click": click}}))
    log = shop().impressions.with_columns(is_click=pl.col("click"), click=pl.lit("not the label"))
    log.write_parquet(src / "impressions.parquet")
    renamed = import_parquet(src, tmp_path / "out")
    assert renamed.impressions().collect()["click"].to_list() == [None, 0, 1, 1]


def test_a_source_name_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    """The reader sees both lists in one line."""
    click = SCHEMA.impressions["click"].model_copy(update={"source": "clicked"})
    src = keep(tmp_path / "src", SCHEMA.model_copy(update={"impressions": SCHEMA.impressions | {"click": click}}))
    with pytest.raises(DataError, match=r"names source column\(s\) \['clicked'\].*'click', 'device'.*correct 'source'"):
        import_parquet(src, tmp_path / "out")


def test_files_of_other_number_types_are_stacked(tmp_path: Path) -> None:
    """A day written as Int8 and one as Float64 hold the same labels."""
    src = keep(tmp_path / "src")
    split_by_day(src)
    path = src / "impressions" / "date=2024-03-02" / "x.parquet"
    log = pl.read_parquet(path).with_columns(pl.col("click").cast(pl.Float64), pl.lit(None).alias("device"))
    log.write_parquet(path)
    imported = import_parquet(src, tmp_path / "out").impressions().collect()
    assert imported["click"].to_list() == [None, 0, 1, 1]
    assert imported["device"].dtype == pl.Int64


@pytest.mark.parametrize("table", ["impressions", "items"])
def test_a_file_without_a_parquet_footer_is_named(table: str, tmp_path: Path) -> None:
    """A copy that was cut off."""
    src = keep(tmp_path / "src")
    path = src / f"{table}.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{table}.parquet: not a readable Parquet file"):
        import_parquet(src, tmp_path / "out")


@pytest.mark.parametrize("table", ["impressions", "users"])
def test_a_file_with_a_damaged_page_is_named(table: str, tmp_path: Path) -> None:
    """Its footer is sound, so the damage shows only while rows are read; the previous dataset stays."""
    src = keep(tmp_path / "src")
    before = digests(import_parquet(src, tmp_path / "out").path)
    path = src / f"{table}.parquet"
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"{table}.parquet: not a readable Parquet file"):
        import_parquet(src, tmp_path / "out")
    assert digests(tmp_path / "out") == before


def test_an_absent_table_is_named_with_what_is_there(tmp_path: Path) -> None:
    """And what it may be called."""
    src = keep(tmp_path / "src")
    (src / "users.parquet").unlink()
    with pytest.raises(DataError, match=r"no table 'users'; expected users.parquet .* found \['impressions.parquet'"):
        import_parquet(src, tmp_path / "out")


def test_importing_a_directory_into_itself_is_refused(tmp_path: Path) -> None:
    """It would replace its own source."""
    src = keep(tmp_path / "src")
    with pytest.raises(ConfigError, match="the directory that is read"):
        import_parquet(src, src)


def test_an_imported_dataset_can_be_imported_again(tmp_path: Path) -> None:
    """Its layout is one of those accepted, and its rows stay as they are."""
    first = import_parquet(keep(tmp_path / "src"), tmp_path / "first")
    second = import_parquet(first.path, tmp_path / "second")
    assert second.impressions().collect().equals(first.impressions().collect())
