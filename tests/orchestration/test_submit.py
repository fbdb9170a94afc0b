"""`freshrank submit`: what it prints, what it exits with, and what Ctrl-C does not do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from freshrank import cli
from freshrank.orchestration import cluster
from tests.orchestration.kfp_server import KfpServer


@pytest.fixture
def submitted(kfp: KfpServer, prepared: cluster.Submission, monkeypatch: pytest.MonkeyPatch) -> KfpServer:
    """Compiled once for all tests, in an image."""
    monkeypatch.setenv("FRESHRANK_CLUSTER_IMAGE", "registry.example/freshrank:2")
    monkeypatch.setattr(cluster, "prepare", lambda *_: prepared)
    return kfp


def run(*arguments: str) -> int:
    """Exit code of ``freshrank submit`` with these arguments."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["freshrank", "submit", *arguments])
        cli.main()
    return int(end.value.code or 0)


def test_the_run_is_told_as_json(submitted: KfpServer, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For scripts: nothing else is on stdout."""
    assert run("--data", str(world), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run_id"], told["page"]) == ("run-0", f"{submitted.url}/#/runs/details/run-0")
    assert told["arguments"]["run_date"] == "2024-01-07"


def test_waiting_ends_well_with_a_run_that_succeeds(submitted: KfpServer, world: Path) -> None:
    """Exit code 0."""
    submitted.script = [{"state": "SUCCEEDED"}]
    assert run("--data", str(world), "--wait") == 0


def test_waiting_ends_with_code_7_and_the_step_when_the_run_fails(
    submitted: KfpServer, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As every failure of the pipeline."""
    submitted.script = [{"state": "FAILED"}]
    assert run("--data", str(world), "--wait") == 7
    assert "ended as FAILED" in capsys.readouterr().err


def test_a_run_can_be_cancelled_by_its_id(
    submitted: KfpServer, prepared: cluster.Submission, capsys: pytest.CaptureFixture[str]
) -> None:
    """No data is needed for it."""
    cluster.start(prepared)
    assert run("--cancel", "run-0") == 0
    assert submitted.terminated == ["run-0"]
    assert "run run-0: cancelled" in capsys.readouterr().out


def test_without_data_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, a configuration error."""
    assert run() == 2
    assert "--data" in capsys.readouterr().err


def test_ctrl_c_stops_the_waiting_and_not_the_run(submitted: KfpServer, world: Path) -> None:
    """It says so, and how to cancel it."""
    command = [sys.executable, "-m", "freshrank", "submit", "--data", str(world), "--wait"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
    try:
        while not submitted.count("GET .*/runs/run-0"):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "run run-0 goes on; to cancel it: freshrank submit --cancel run-0" in errors
    assert submitted.terminated == []
