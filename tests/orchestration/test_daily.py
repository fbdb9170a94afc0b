"""The daily run as its user starts it: `freshrank run` in its own processes, real Kubeflow runner, Feast and Triton.

One small simulated world is run for two days; the tests read what is left behind.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from freshrank.storage.files import read_json
from tests.homes import DAY_1, DAY_2, LENIENT, Home

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Day 1, then day 2, as they come."""
    made = Home.make(tmp_path_factory.mktemp("daily"))
    for day in (DAY_1, DAY_2):
        result = made.run(day)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    yield made
    made.freshrank("stop")


def test_day_one_is_compared_with_popularity_and_day_two_with_the_model_of_day_one(home: Home) -> None:
    """There is no champion before the first day."""
    baselines = [read_json(home.folder(day) / "headline.json")["baseline"] for day in (DAY_1, DAY_2)]
    assert baselines == ["popularity (nothing served before)", f"version 1 of {DAY_1}"]


def test_a_blessed_day_is_served_and_says_so(home: Home) -> None:
    """The record of the day names the version; the pointer agrees."""
    record = read_json(home.folder(DAY_2) / "run.json")
    assert record["verdict"] == "blessed"
    assert record["deployed"]
    assert record["served_version"] == home.served["version"] == 2
    assert (home.folder(DAY_2) / "report.html").read_text().startswith("<!doctype html>")


def test_each_version_that_served_has_a_feature_service_of_its_own(home: Home) -> None:
    """Of what its model reads; by Feast's own command line."""
    settings = home.path / "home" / "feast" / "simulated" / "feature_store.yaml"
    command = [Path(sys.executable).with_name("feast"), "-f", settings, "feature-services", "list"]
    listed = subprocess.run(command, env=home.environment, capture_output=True, text=True, check=True).stdout
    assert [name for name in ("ranking ", "ranking_1 ", "ranking_2 ") if name not in listed] == []


def test_the_same_date_run_again_makes_no_second_version(home: Home) -> None:
    """Same inputs, same config: same artifacts, same pointer."""
    before = home.state()
    again = home.run(DAY_2)
    assert again.returncode == 0, again.stdout[-2000:]
    assert home.state() == before


def test_an_older_date_run_again_does_not_take_the_newer_model_out_of_service(home: Home) -> None:
    """Clearing yesterday's run in Airflow must not move the pointer back."""
    before = home.served
    result = home.run(DAY_1)
    assert result.returncode == 0, result.stdout[-2000:]
    assert home.served == before


def test_a_rejected_day_leaves_the_served_version_untouched_and_says_why(home: Home) -> None:
    """Bounds nobody can hold: the run succeeds, the verdict is rejected, the champion stays."""
    before = home.served, home.versions()
    result = home.run(DAY_2, "gate.max_parameter_increase=0.0001")
    assert result.returncode == 0, result.stdout[-2000:]
    verdict = read_json(home.folder(DAY_2) / "verdict.json")
    assert verdict["verdict"] == "rejected"
    assert any("parameters; at most +0.01% is allowed" in reason["sentence"] for reason in verdict["reasons"])
    assert (home.served, home.versions()) == before


def test_rank_answers_after_a_restart_of_the_server_with_the_same_scores(home: Home) -> None:
    """Unknown user and item included; the state of service is on disk."""
    ask = ["rank", "--user", "999999", "--candidates", "1,2,99999999", "--at", f"{DAY_2}T12:00:00Z", "--json"]
    before = home.freshrank(*ask)
    assert home.freshrank("stop").returncode == 0
    assert home.freshrank("serve").returncode == 0
    after = home.freshrank(*ask)
    assert before.returncode == after.returncode == 0, before.stderr + after.stderr
    rows = [json.loads(line) for line in after.stdout.splitlines()]
    assert {str(row["item"]) for row in rows} == {"1", "2", "99999999"}
    assert all(0 < row["p_click"] < 1 for row in rows)
    assert after.stdout == before.stdout


def test_publishing_without_a_server_changes_nothing_and_names_the_mend(home: Home) -> None:
    """Exit code 5 and a sentence."""
    before = home.served
    assert home.freshrank("stop").returncode == 0
    sections = [part for override in LENIENT for part in ("--set", override)]
    for step in ("train", "calibrate", "evaluate"):
        assert home.freshrank(step, "--date", DAY_2.isoformat(), *sections).returncode == 0, step
    result = home.freshrank("publish", "--date", DAY_2.isoformat())
    assert result.returncode == 5
    assert "freshrank serve" in result.stderr
    assert home.served == before
    assert home.freshrank("serve").returncode == 0


def test_the_server_of_another_dataset_gives_way_and_is_named(home: Home, tmp_path: Path) -> None:
    """One set of ports, two datasets: serving the second stops the first, and serving the first brings it back."""
    schema = (home.data / "schema.yaml").read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "schema.yaml").write_text(schema.replace("name: simulated", "name: other"))
    for table in ("items", "users"):
        (other / f"{table}.parquet").write_bytes((home.data / f"{table}.parquet").read_bytes())
    (other / "manifest.json").write_bytes((home.data / "manifest.json").read_bytes())
    command = [sys.executable, "-m", "freshrank", "serve", "--data", str(other)]
    result = subprocess.run(command, env=home.environment, capture_output=True, text=True, check=True)
    assert "stopped the Triton of dataset 'simulated'" in result.stdout
    assert "no ranker is loaded yet" in result.stdout
    assert "stopped the Triton of dataset 'other'" in home.freshrank("serve").stdout
