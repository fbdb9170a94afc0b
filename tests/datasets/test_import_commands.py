"""What `freshrank import parquet`, `simulate` and `features get` print and how they refuse."""

import json
import sys
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
from tiny_logs import SCHEMA, Tables, shop

from freshrank.cli.main import main
from freshrank.errors import DataError, MissingArtifact
from freshrank.features.snapshots import build_history
from freshrank.features.store import FeatureStore
from freshrank.pipeline.deploy import require_bundle
from freshrank.pipeline.run import Run
from freshrank.pipeline.steps import materialize
from freshrank.schema import dump_schema
from freshrank.storage.files import write_json
from freshrank.validation.validate import validate_day

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def narrow(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace of its own for each test, and a terminal too narrow for any sentence: they are printed whole."""
    monkeypatch.setenv("COLUMNS", "40")


def freshrank(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["freshrank", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def kept(src: Path, tables: Tables) -> Path:
    src.mkdir()
    (src / "schema.yaml").write_text(dump_schema(SCHEMA))
    for table in ("impressions", "items", "users"):
        getattr(tables, table).write_parquet(src / f"{table}.parquet")
    return src


def later(request: str, days: int) -> Tables:
    """The shop with the impressions of one request moved by whole days."""
    moved = pl.when(pl.col("request_id") == request).then(timedelta(days=days)).otherwise(timedelta(0))
    return shop().breaking("impressions", pl.col("event_timestamp") + moved)


@pytest.mark.parametrize("option, value", [("--days", "0"), ("--users", "-5")])
def test_an_impossible_world_is_refused_in_one_sentence(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Field, value and bound; exit code 2; nothing is written."""
    assert freshrank(monkeypatch, "simulate", "--out", tmp_path / "world", option, value) == 2
    expected = f"{option[2:]}: received {value}, expected a value greater than or equal to 1"
    assert capsys.readouterr().err.strip() == f"ConfigError: {expected}"
    assert not (tmp_path / "world").exists()


def test_unknown_items_are_imported_where_the_command_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal names the option that lets them pass."""
    src = kept(tmp_path / "src", shop().breaking("impressions", item_id=["mug", "cup", "pan", "cup"]))
    command: list[str | Path] = ["import", "parquet", src, "--out", tmp_path / "out"]
    assert freshrank(monkeypatch, *command) == 3
    assert "--allow-unknown-items" in capsys.readouterr().err
    assert freshrank(monkeypatch, *command, "--allow-unknown-items") == 0


@pytest.mark.parametrize(
    "days, named",
    [
        (0, ""),
        (1, "; no impressions on 2024-03-02"),
        (2, "; no impressions on 2024-03-02, 2024-03-03"),
        (15, "2024-03-11 and 5 more"),
    ],
)
def test_days_without_impressions_are_named(
    days: int, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 March, and 2 March or so many days later; a whole log is not commented on."""
    src = kept(tmp_path / "src", later("r3", days))
    assert freshrank(monkeypatch, "import", "parquet", src, "--out", tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.endswith(named)
    assert ("no impressions" in printed) == (days > 0)


def read(output: str) -> list[dict[str, object]]:
    """The JSON objects printed one after the other."""
    decoder, rows, text = json.JSONDecoder(), [], output.strip()
    while text:
        row, end = decoder.raw_decode(text)
        rows.append(row)
        text = text[end:].strip()
    return rows


def materialized(data: Path, tables: Tables) -> Path:
    """The online store of the day after the log's last."""
    tables.write(data)
    run = Run(data, "2024-03-03")
    build_history(run.dataset, run.workspace, [run.date])
    store = FeatureStore(run.dataset, run.workspace)
    store.apply()
    store.materialize(run.date)
    return data


def test_features_are_asked_for_by_the_ids_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ann is 40 and clicked a cup, which costs 1.5, and nobody knows a mug: its row is all null. No code is shown."""
    data = materialized(tmp_path / "data", shop())
    assert (
        freshrank(monkeypatch, "features", "get", "--data", data, "--user", "ann", "--item", "cup", "--item", "mug")
        == 0
    )
    ann, cup, mug = read(capsys.readouterr().out)
    assert (ann["user_id"], ann["age"], ann["sequence_item_ids"]) == ("ann", 40.0, ["cup"])
    assert (cup["item_id"], cup["price"], cup["brand"], cup["tags"]) == ("cup", 1.5, "b", ["red", "hot"])
    assert mug.pop("item_id") == "mug"
    assert set(mug.values()) == {None}


def test_offending_rows_are_named_by_the_ids_of_the_log(tmp_path: Path) -> None:
    """A mug is in no table of items: validation says mug, not its code."""
    shown = shop().breaking("impressions", item_id=["mug", "cup", "pan", "cup"])
    report = validate_day(shown.write(tmp_path / "data", allow_unknown_items=True), date(2024, 3, 2))
    assert {result.examples for result in report.results if result.name == "items_known"} == {("mug",)}


def test_features_of_a_log_with_integer_ids_are_asked_for_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Users 7 and 8; text is no id of that log."""
    tables = shop().breaking("impressions", user_id=[7, 7, 8, 8]).breaking("users", user_id=[7, 8])
    data = materialized(tmp_path / "data", tables)
    for user, age in (("8", 40.0), ("bob", None)):
        assert freshrank(monkeypatch, "features", "get", "--data", data, "--user", user) == 0
        (row,) = read(capsys.readouterr().out)
        assert (row["user_id"], row["age"]) == (user, age)


def test_features_of_a_date_that_the_log_does_not_reach_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log ends on 2 March. Neither command nor step lets 5 March in, so 3 March goes online afterwards."""
    data = tmp_path / "data"
    shop().write(data)
    assert freshrank(monkeypatch, "features", "build", "--data", data, "--date", "2024-03-05") == 3
    assert "date: received 2024-03-05, expected 2024-03-03 at the latest" in capsys.readouterr().err
    with pytest.raises(DataError, match="import the log up to 2024-03-04 first"):
        materialize(data, "2024-03-05")
    assert freshrank(monkeypatch, "features", "build", "--data", data) == 0
    assert capsys.readouterr().out.strip() == "features of 2024-03-03 are built and materialized"


def test_a_build_of_an_earlier_date_says_what_stays_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Online is 3 March; a build of 2 March does not claim to have put it there."""
    data = materialized(tmp_path / "data", shop())
    assert freshrank(monkeypatch, "features", "build", "--data", data, "--date", "2024-03-02") == 0
    said = capsys.readouterr().out
    assert "the online store holds the later state of 2024-03-03" in said
    assert "materialized" not in said


def test_features_that_nobody_built_are_a_missing_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 6 and the command to run, for users and for items."""
    data = tmp_path / "data"
    shop().write(data)
    for asked in (("--user", "ann"), ("--item", "cup")):
        assert freshrank(monkeypatch, "features", "get", "--data", data, *asked) == 6
        assert "run `freshrank features build` first" in " ".join(capsys.readouterr().err.split())


def test_a_time_without_an_item_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of a user depends on it."""
    shop().write(tmp_path / "data")
    assert (
        freshrank(
            monkeypatch, "features", "get", "--data", tmp_path / "data", "--user", "ann", "--at", "2024-03-03T00:00:00Z"
        )
        == 2
    )
    assert "--at: received" in capsys.readouterr().err


def test_days_that_an_import_takes_away_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two days stood there and the second alone is imported: it is done, and said; the whole log again is silent."""
    whole, newest = kept(tmp_path / "whole", shop()), kept(tmp_path / "newest", shop())
    shop().impressions.filter(pl.col("request_id") == "r3").write_parquet(newest / "impressions.parquet")
    for src in (whole, whole):
        assert freshrank(monkeypatch, "import", "parquet", src, "--out", tmp_path / "out") == 0
    assert "there before" not in caplog.text
    assert freshrank(monkeypatch, "import", "parquet", newest, "--out", tmp_path / "out") == 0
    assert "1 day that was there before is not in this import (2024-03-01 .. 2024-03-01)" in caplog.text
    assert "impressions on 1 day, 2024-03-02" in capsys.readouterr().out


def test_a_column_that_is_not_declared_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left out, in one line; declared columns are not mentioned."""
    src = kept(tmp_path / "src", shop().breaking("items", colour=["red", "red", "blue"]))
    assert freshrank(monkeypatch, "import", "parquet", src, "--out", tmp_path / "out") == 0
    assert "items: columns ['colour'] are not declared" in caplog.text
    assert "users: columns" not in caplog.text


def test_validation_prints_its_warnings_and_what_it_did_not_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One day of log, nobody clicked a pot, no features: nothing is compared, the leak detector is not asked."""
    src = kept(tmp_path / "src", shop())
    shop().impressions.filter(pl.col("request_id") == "r3").write_parquet(src / "impressions.parquet")
    old = shop().items.with_columns(pl.col("created_at") - timedelta(days=300))
    old.write_parquet(src / "items.parquet")
    assert freshrank(monkeypatch, "import", "parquet", src, "--out", tmp_path / "out") == 0
    assert freshrank(monkeypatch, "validate", "--data", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "warning click_has_fresh_positives: impressions.click on fresh items: somebody did click" in said
    assert "so nothing was compared" in said
    assert "expectations about features were not asked" in said
    assert "run `freshrank features build` first" in said


def test_a_day_that_was_judged_and_not_deployed_is_published_step_by_step(tmp_path: Path) -> None:
    """The pipeline leaves no bundle of it, but a report in the run's folder: 'evaluate first' would be no help."""
    shop().write(tmp_path / "data")
    require_bundle(tmp_path / "data", "2024-03-03")
    write_json(Run(tmp_path / "data", "2024-03-03").directory / "run.json", {})
    with pytest.raises(MissingArtifact, match="left its report and no bundle"):
        require_bundle(tmp_path / "data", "2024-03-03")
