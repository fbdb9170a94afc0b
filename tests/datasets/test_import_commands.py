"""What `freshrank import parquet`, `simulate` and `features get` print and how they refuse."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from tiny_logs import SCHEMA, Tables, shop

from freshrank.cli import main
from freshrank.feature_store import FeatureStore
from freshrank.history import build_history
from freshrank.schema import dump_schema
from freshrank.steps import Run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESHRANK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "400")


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
    [(0, ""), (1, "; no impressions on 2024-03-02"), (2, "; no impressions on 2024-03-02, 2024-03-03"),
     (15, "2024-03-11 and 5 more")],
)  # fmt: skip
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
    decoder, found, text = json.JSONDecoder(), [], output.strip()
    while text:
        row, end = decoder.raw_decode(text)
        found.append(row)
        text = text[end:].strip()
    return found


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
    """Ann is 40, a cup costs 1.5, and nobody knows a mug: its row is all null."""
    data = materialized(tmp_path / "data", shop())
    assert freshrank(monkeypatch, "features", "get", "--data", data, "--user", "ann", "--item", "cup", "--item",
                     "mug") == 0  # fmt: skip
    ann, cup, mug = read(capsys.readouterr().out)
    assert (ann["user_id"], ann["age"]) == ("ann", 40.0)
    assert (cup["item_id"], cup["price"]) == ("cup", 1.5)
    assert mug.pop("item_id") == "mug"
    assert set(mug.values()) == {None}


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
