"""The daily run as its user starts it: `freshrank run` in its own processes, real Kubeflow runner, Feast and Triton.

One small simulated world is run for two days; the tests read what is left behind.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest

from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.storage import read_json, sha256_of

WORLD = WorldConfig(users=400, days=7, items_at_start=250, new_items_per_day=25, impressions_per_day=4000)
DAY_1, DAY_2 = date(2024, 1, 7), date(2024, 1, 8)
LENIENT = ["gate.fresh_margin=0.5", "gate.overall_margin=0.5", "gate.max_ece=0.5", "gate.max_score_gap=1",
           "gate.min_lists=10", "gate.min_fresh_lists=5", "gate.max_calibration_ratio=10",
           "model.mlp=[32, 16]", "training.batch_size=256"]  # fmt: skip
"""The tiny world's intervals are wide: bounds under which an honest model passes."""


@dataclass
class Home:
    """One workspace with a Triton of its own."""

    path: Path
    data: Path
    environment: dict[str, str]

    @classmethod
    def make(cls, path: Path) -> "Home":
        ports = [_free_port() for _ in range(3)]
        names = ("FRESHRANK_TRITON_GRPC_PORT", "FRESHRANK_TRITON_HTTP_PORT", "FRESHRANK_TRITON_METRICS_PORT")
        own = {"FRESHRANK_HOME": str(path / "home"), **{n: str(p) for n, p in zip(names, ports, strict=True)}}
        data = simulate(path / "world", WORLD).path
        return cls(path, data, os.environ | own)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "freshrank", arguments[0], "--data", str(self.data), *arguments[1:]]

    def freshrank(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), env=self.environment, capture_output=True, text=True,
                              check=False)  # fmt: skip

    def run_arguments(self, day: date, *overrides: str) -> list[str]:
        sets = [part for override in (*LENIENT, *overrides) for part in ("--set", override)]
        return ["run", "--date", day.isoformat(), *sets]

    def run(self, day: date, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self.freshrank(*self.run_arguments(day, *overrides))

    def folder(self, day: date) -> Path:
        return self.path / "home" / "runs" / "simulated" / day.isoformat()

    @property
    def triton(self) -> Path:
        return self.path / "home" / "triton" / "simulated"

    @property
    def served(self) -> dict[str, object]:
        pointer: dict[str, object] = read_json(self.triton / "served.json")
        return pointer

    def versions(self) -> list[str]:
        return sorted(entry.name for entry in (self.triton / "models" / "ranker").iterdir() if entry.name.isdigit())

    def state(self) -> dict[str, object]:
        """What a user can see of how the days ended."""
        files = (path for path in (self.triton / "models" / "ranker").rglob("*") if path.is_file())
        kept = {str(p.relative_to(self.triton)): sha256_of(p) for p in files if p.suffix in (".onnx", ".safetensors")}
        verdicts = {p.parent.name: read_json(p) for p in (self.path / "home" / "runs").rglob("verdict.json")}
        return {"served": self.served, "files": kept, "verdicts": verdicts}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
    assert baselines == ["popularity (nothing served yet)", f"version 1 of {DAY_1}"]


def test_a_blessed_day_is_served_and_says_so(home: Home) -> None:
    """The record of the day names the version; the pointer agrees."""
    record = read_json(home.folder(DAY_2) / "run.json")
    assert record["verdict"] == "blessed"
    assert record["deployed"]
    assert record["served_version"] == home.served["version"] == 2
    assert (home.folder(DAY_2) / "report.html").read_text().startswith("<!doctype html>")


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


def test_a_run_killed_at_every_step_ends_like_an_undisturbed_one(
    home: Home, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """kill -9 of the whole process group at each step in turn; the last start runs through."""
    disturbed = Home.make(tmp_path_factory.mktemp("killed"))
    try:
        assert disturbed.freshrank("serve").returncode == 0
        for marker in ("'validate-data'", "step=train", "step=calibrate", "step=evaluate",
                       "'deploy'"):  # fmt: skip
            _run_and_kill_at(disturbed, marker)
        assert disturbed.run(DAY_1).returncode == 0
        assert disturbed.run(DAY_2).returncode == 0
        home.run(DAY_2)
        assert disturbed.state() == home.state()
    finally:
        disturbed.freshrank("stop")


def _run_and_kill_at(home: Home, marker: str) -> None:
    with subprocess.Popen(home.command(*home.run_arguments(DAY_1)), env=home.environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, start_new_session=True) as process:  # fmt: skip
        assert process.stdout is not None
        timer = threading.Timer(300, process.kill)
        timer.start()
        for line in process.stdout:
            if marker in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
        else:
            pytest.fail(f"the run ended before {marker!r}")
        timer.cancel()
