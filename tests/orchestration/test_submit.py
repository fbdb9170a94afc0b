"""`freshrank submit`: what it prints, what it exits with, and what Ctrl-C does not do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from freshrank.cli import main
from freshrank.datasets.dataset import Dataset
from freshrank.orchestration.kubeflow import submit
from freshrank.pipeline import backup
from freshrank.settings import settings
from tests.orchestration.kfp_server import KfpServer


@pytest.fixture
def submitted(kfp: KfpServer, prepared: submit.Submission, monkeypatch: pytest.MonkeyPatch) -> KfpServer:
    """Compiled once for all tests, in an image."""
    monkeypatch.setenv("FRESHRANK_CLUSTER_IMAGE", "registry.example/freshrank:2")
    monkeypatch.setattr(submit, "prepare", lambda *_: prepared)
    return kfp


def run(*arguments: str) -> int:
    """Exit code of ``freshrank submit`` with these arguments."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["freshrank", "submit", *arguments])
        main.main()
    return int(end.value.code or 0)


def test_the_run_is_told_as_json(submitted: KfpServer, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For scripts: nothing else is on stdout."""
    assert run("--data", str(world), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run_id"], told["page"]) == ("run-0", f"{submitted.url}/#/runs/details/run-0")
    assert told["arguments"]["run_date"] == "2024-01-07"


def test_a_dry_run_prints_what_the_same_command_then_sends(
    kfp: KfpServer, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Package, arguments, names and key, placed by the cluster's settings; as a whole it is still a package.

    The data is named by its URL in a store: what is sent is where the workspace has its copy.
    """
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("FRESHRANK_STORAGE_URL", f"file://{tmp_path}/store")
    settings.cache_clear()
    url = backup.back_up_dataset(Dataset.open(world), backup.required_store())
    for name, value in {
        "IMAGE": "registry.example/freshrank:2",
        "HOME_CLAIM": "a-claim",
        "SERVICE_ACCOUNT": "steps",
        "NAMESPACE": "ranking",
        "GPUS": "2",
    }.items():
        monkeypatch.setenv(f"FRESHRANK_CLUSTER_{name}", value)
    command = ("--data", url, "--date", "2024-01-06", "--set", "windows.train_days=2")
    assert run(*command, "--dry-run") == 0
    assert kfp.requests == []
    printed = capsys.readouterr().out
    assert run(*command) == 0
    (sent,), (package,) = kfp.runs, kfp.packages
    assert printed.endswith(f"{package}\n")
    said = _said(printed.removesuffix(f"{package}\n"))
    assert said["arguments"]["data"] == str(settings().home / "data" / url.rpartition("/")[2])
    assert said.pop("arguments") == sent.runtime_config.parameters
    assert said == {
        "run_name": sent.display_name,
        "key": sent.display_name.rpartition("-")[2],
        "pipeline": kfp.pipelines[0].display_name,
        "version": kfp.versions[0].display_name,
        "experiment": kfp.experiments[0].display_name,
        "namespace": kfp.pipelines[0].namespace,
        "service_account": sent.service_account,
    }
    assert list(yaml.safe_load_all(printed)) == list(yaml.safe_load_all(package))


def _said(head: str) -> dict[str, Any]:
    """The comments before the package."""
    title, *lines = head.splitlines()
    assert title.endswith("not submitted; this is what would be sent")
    where = lines.index("# arguments:")
    pairs = (line.removeprefix("#").strip().split(": ", 1) for line in (*lines[:where], *lines[where + 1 :]))
    fields = [(name, value) for name, value in pairs]
    return dict(fields[:where]) | {"arguments": dict(fields[where:])}


def test_whoever_submits_from_a_workspace_of_his_own_is_told(
    kfp: KfpServer, home: Path, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr: steps would look for it in their volume; and that an image is missing."""
    monkeypatch.setenv("FRESHRANK_CLUSTER_HOME_CLAIM", "a-claim")
    assert run("--data", str(world), "--dry-run") == 0
    told = capsys.readouterr().err
    assert f"FRESHRANK_HOME: {settings().home} is a directory of this machine" in told
    assert "the steps mount a-claim there" in told
    assert f"--data: {world} is outside FRESHRANK_HOME" in told
    assert "FRESHRANK_CLUSTER_IMAGE: not set" in told


@pytest.fixture
def in_a_pod(prepared: submit.Submission, monkeypatch: pytest.MonkeyPatch) -> Iterator[submit.Submission]:
    """As in the pods of the chart; the workspace's volume is one that every Linux has."""
    for name, value in {
        "CLUSTER_IMAGE": "registry.example/freshrank:2",
        "HOME": "/dev/shm",
        "TRITON_REPLICAS_HOST": "freshrank-triton-control.ranking.svc",
    }.items():
        monkeypatch.setenv(f"FRESHRANK_{name}", value)
    settings.cache_clear()
    yield replace(prepared, arguments=prepared.arguments | {"data": "/dev/shm/data/my_log"})
    settings.cache_clear()


def test_what_a_pod_of_the_chart_submits_is_no_doubt(in_a_pod: submit.Submission) -> None:
    """Workspace, image, Triton and data are where the steps find them."""
    assert submit.preflight_warnings(in_a_pod) == []


@pytest.mark.parametrize(
    ("variables", "warning"),
    [
        ({"ONLINE_STORE": "redis"}, "FRESHRANK_REDIS_URL: a secret, which does not travel"),
        ({"TRITON_CONTROL_TOKEN": "hunter2"}, "FRESHRANK_TRITON_CONTROL_TOKEN: a secret, which does not travel"),
        ({"TRITON_REPLICAS_HOST": ""}, "FRESHRANK_TRITON_HOST: 127.0.0.1 is each step's own pod"),
        ({"CLUSTER_IMAGE": ""}, "FRESHRANK_CLUSTER_IMAGE: not set"),
    ],
)
def test_what_the_last_step_would_lack_is_told_before_the_first(
    in_a_pod: submit.Submission, variables: dict[str, str], warning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it came up after the training. A secret is not repeated; one that is referenced is no warning."""
    for name, value in variables.items():
        monkeypatch.setenv(f"FRESHRANK_{name}", value)
    settings.cache_clear()
    (told,) = submit.preflight_warnings(in_a_pod)
    assert told.startswith(warning)
    assert "hunter2" not in told
    secrets = {"FRESHRANK_REDIS_URL": "s:k", "FRESHRANK_TRITON_CONTROL_TOKEN": "s:k"}
    monkeypatch.setenv("FRESHRANK_CLUSTER_SECRET_ENV", json.dumps(secrets))
    assert bool(submit.preflight_warnings(in_a_pod)) == ("a secret" not in warning)


def test_preflight_warnings_come_before_the_run(
    kfp: KfpServer, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submission that does not arrive had told them."""
    monkeypatch.setenv("FRESHRANK_CLUSTER_IMAGE", "registry.example/freshrank:2")
    monkeypatch.setenv("FRESHRANK_KFP_HOST", "http://no-such-host.invalid")
    settings.cache_clear()
    assert run("--data", str(world)) == 7
    told = capsys.readouterr().err
    assert f"--data: {world} is outside FRESHRANK_HOME" in told
    assert told.index("--data:") < told.index("ClusterUnreachable")
    assert kfp.runs == []


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
    submitted: KfpServer, prepared: submit.Submission, capsys: pytest.CaptureFixture[str]
) -> None:
    """No data is needed for it."""
    submit.start(prepared)
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
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "run run-0 goes on; to cancel it: freshrank submit --cancel run-0" in errors
    assert submitted.terminated == []
