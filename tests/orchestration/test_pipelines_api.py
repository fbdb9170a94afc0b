"""What passes is tried again for a bounded time; what does not is said once, with what to do; no token is told."""

import logging
import time
from pathlib import Path

import pytest

from freshrank.errors import ClusterUnreachable, ConfigError, PipelineFailed
from freshrank.orchestration.pipelines_api import PipelinesApi, run_page
from tests.orchestration.kfp_server import Fault, KfpServer, api


@pytest.fixture
def run_id(kfp: KfpServer) -> str:
    kfp.runs.append(api.V2beta1Run(run_id="run-0", display_name="a run", state="RUNNING"))
    return "run-0"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET .*", status=503),
        Fault("GET .*", status=429, headers={"Retry-After": "1"}),
        Fault("GET .*", status=500),
        Fault("GET .*", reset=True),
    ],
    ids=["unavailable", "too many requests", "internal error", "connection reset"],
)
def test_what_passes_is_tried_again(kfp: KfpServer, run_id: str, fault: Fault) -> None:
    """One more request, and nobody notices."""
    kfp.faults = [fault]
    assert PipelinesApi().run(run_id).state == "RUNNING"
    assert len(kfp.requests) == 2


def test_the_pause_that_a_server_asks_for_is_kept(kfp: KfpServer, run_id: str) -> None:
    """An overloaded server is not asked earlier."""
    kfp.faults = [Fault("GET .*", status=429, headers={"Retry-After": "1"})]
    before = time.monotonic()
    PipelinesApi().run(run_id)
    assert time.monotonic() - before >= 1


def test_a_server_that_hangs_is_left_after_a_while(
    kfp: KfpServer, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kfp's own client would wait for ever."""
    monkeypatch.setenv("FRESHRANK_KFP_REQUEST_SECONDS", "0.3")
    kfp.faults = [Fault("GET .*", hang=1.5)]
    before = time.monotonic()
    assert PipelinesApi().run(run_id).state == "RUNNING"
    assert time.monotonic() - before < 1.5


def test_patience_is_bounded(kfp: KfpServer, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says who did not answer what; Airflow tries the task again on it."""
    monkeypatch.setenv("FRESHRANK_KFP_RETRY_SECONDS", "0.5")
    kfp.faults = [Fault("GET .*", status=503, times=1000)]
    with pytest.raises(ClusterUnreachable, match=f"run-0: {kfp.url} answered 503"):
        PipelinesApi().run(run_id)


def test_nobody_listening_is_unreachable(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is a name that does not resolve yet."""
    monkeypatch.setenv("FRESHRANK_KFP_RETRY_SECONDS", "0")
    kfp.shutdown()
    kfp.server_close()
    with pytest.raises(ClusterUnreachable, match="does not answer"):
        PipelinesApi().run("run-0")


def test_a_run_that_vanished_is_an_error_at_once(kfp: KfpServer) -> None:
    """Somebody deleted it: no patience brings it back."""
    with pytest.raises(PipelineFailed, match=r"run-9.*404.*deleted"):
        PipelinesApi().run("run-9")
    assert len(kfp.requests) == 1


def test_a_token_that_was_renewed_is_read_anew(
    kfp: KfpServer, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubelet replaces the file while the client is connected."""
    token = tmp_path / "token"
    token.write_text("of-this-hour")
    monkeypatch.setenv("FRESHRANK_KFP_TOKEN_PATH", str(token))
    connected = PipelinesApi()
    kfp.tokens = {"of-this-hour"}
    connected.run(run_id)
    kfp.tokens = {"of-the-next"}
    token.write_text("of-the-next")
    assert connected.run(run_id).state == "RUNNING"


def test_a_token_that_expires_between_reading_and_answer_is_no_error(
    kfp: KfpServer, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 401 is answered by one more try, with a new client."""
    (tmp_path / "token").write_text("renewed")
    monkeypatch.setenv("FRESHRANK_KFP_TOKEN_PATH", str(tmp_path / "token"))
    kfp.tokens = {"renewed"}
    kfp.faults = [Fault("GET .*", status=401)]
    assert PipelinesApi().run(run_id).state == "RUNNING"
    assert len(kfp.requests) == 2


def test_a_token_that_is_refused_says_where_it_came_from_and_not_what_it_is(
    kfp: KfpServer, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two requests, no more: who is locked out does not knock for two minutes."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FRESHRANK_KFP_TOKEN", "hunter2")
    kfp.tokens = {"another"}
    with pytest.raises(ConfigError, match=r"401.*the token \(FRESHRANK_KFP_TOKEN\)") as failure:
        PipelinesApi().run(run_id)
    assert len(kfp.requests) == 2
    assert "hunter2" not in str(failure.value) + caplog.text


def test_a_token_file_that_is_not_there_is_named(
    kfp: KfpServer, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent without it."""
    monkeypatch.setenv("FRESHRANK_KFP_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"FRESHRANK_KFP_TOKEN_PATH: .*none cannot be read"):
        PipelinesApi().run(run_id)
    assert kfp.requests == []


def test_a_host_that_is_not_the_api_is_said_to_be(kfp: KfpServer) -> None:
    """A log-in page answers everything with 200."""
    kfp.faults = [Fault("GET .*", page="<html>log in</html>")]
    with pytest.raises(PipelineFailed, match="expected the Kubeflow Pipelines API"):
        PipelinesApi().run("run-0")


def test_a_version_uploaded_by_somebody_else_meanwhile_is_used(kfp: KfpServer, tmp_path: Path) -> None:
    """Servers say 409, or 500, to the second of two equal uploads."""
    package = tmp_path / "pipeline.yaml"
    package.write_text("root: {}\n")
    first = PipelinesApi().version("train-ranker", "train-ranker-1", package)
    for status in (409, 500):
        kfp.versions[0].display_name = "train-ranker-1"
        kfp.faults = [Fault("POST .*/upload_version", status=status, after=True)]
        name = f"train-ranker-{status}"
        assert PipelinesApi().version("train-ranker", name, package) == (first[0], kfp.versions[-1].pipeline_version_id)
        assert kfp.versions[-1].display_name == name
    assert kfp.count("POST .*/upload_version") == 3


def test_links_are_for_browsers(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the cluster the API has another name than people know."""
    assert run_page("run-0") == f"{kfp.url}/#/runs/details/run-0"
    monkeypatch.setenv("FRESHRANK_KFP_UI_HOST", "https://kubeflow.example/pipeline/")
    assert run_page("run-0") == "https://kubeflow.example/pipeline/#/runs/details/run-0"
