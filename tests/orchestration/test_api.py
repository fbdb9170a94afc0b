"""What passes is tried again for a bounded time; what does not is said once, with what to do; no token is told."""

import logging
import re
from pathlib import Path

import pytest

from freshrank.errors import ClusterUnreachable, ConfigError, PipelineFailed
from freshrank.orchestration.kubeflow.api import PipelinesApi, run_page
from freshrank.settings import settings
from tests.orchestration.kfp_server import Fault, KfpServer, api, speaking_tls


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


def pauses(messages: list[str]) -> list[float]:
    """Seconds that each of these lines says the next try is away."""
    return [float(re.findall(r"next try in (\d+\.\d) s", line)[0]) for line in messages]


def test_the_pause_that_a_server_asks_for_is_kept(
    kfp: KfpServer, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An overloaded server is not asked earlier."""
    kfp.faults = [Fault("GET .*", status=429, headers={"Retry-After": "1"})]
    PipelinesApi().run(run_id)
    (pause,) = pauses(caplog.messages)
    assert pause >= 1


def test_a_server_that_hangs_is_left_after_a_while(
    kfp: KfpServer, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kfp's own client would wait for ever."""
    monkeypatch.setenv("FRESHRANK_KFP_REQUEST_SECONDS", "0.3")
    kfp.faults = [Fault("GET .*", hang=True)]
    assert PipelinesApi().run(run_id).state == "RUNNING"
    assert kfp.hanging == 1


def test_patience_is_bounded(kfp: KfpServer, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says who did not answer what; Airflow tries the task again on it."""
    monkeypatch.setenv("FRESHRANK_KFP_RETRY_SECONDS", "0.5")
    kfp.faults = [Fault("GET .*", status=503, times=1000)]
    with pytest.raises(ClusterUnreachable, match=f"run-0: {kfp.url} answered 503"):
        PipelinesApi().run(run_id)


def test_nobody_listening_is_unreachable(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the setting that may be wrong."""
    monkeypatch.setenv("FRESHRANK_KFP_RETRY_SECONDS", "0")
    kfp.shutdown()
    kfp.server_close()
    with pytest.raises(ClusterUnreachable, match=r"does not answer \(Connection refused\); .*FRESHRANK_KFP_HOST"):
        PipelinesApi().run("run-0")


def test_no_try_is_made_after_the_patience_and_each_is_told_in_a_short_line(
    kfp: KfpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pause that would go beyond it is not begun; nothing else is logged, by whatever library."""
    monkeypatch.setenv("FRESHRANK_KFP_RETRY_SECONDS", "1.5")
    kfp.faults = [Fault("GET .*", status=503, times=1000, page="<html>" + "x" * 5000)]
    with pytest.raises(ClusterUnreachable):
        PipelinesApi().live("a run")
    assert sum(pauses(caplog.messages)) <= 1.5
    assert len(caplog.messages) == len(kfp.requests) - 1 >= 1
    told = rf"{kfp.url} answered 503 Service Unavailable .*; next try in \d+\.\d s"
    assert all(re.fullmatch(told, line) and len(line) < 200 for line in caplog.messages)


UNKNOWN = "http://nobody-has-this-name.invalid"
"""That no name server knows such a name is a promise of the Internet's (RFC 2606)."""


def test_a_name_that_nobody_knows_ends_the_first_contact(
    kfp: KfpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No patience brings a misspelt name into being. Airflow tries the task again: its name server may be young."""
    _point_to(monkeypatch, UNKNOWN)
    with pytest.raises(ClusterUnreachable, match=rf"^FRESHRANK_KFP_HOST: {UNKNOWN} does not answer \(Name or service"):
        PipelinesApi().live("a run")
    assert "next try" not in caplog.text


def test_a_name_that_was_known_a_moment_ago_is_waited_for(
    kfp: KfpServer, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Name servers restart too."""
    connected = PipelinesApi()
    connected.run(run_id)
    connected._client._run_api.api_client.configuration.host = UNKNOWN
    monkeypatch.setattr(connected._settings, "retry_seconds", 1)
    with pytest.raises(ClusterUnreachable):
        connected.run(run_id)
    assert "next try" in caplog.text


@pytest.mark.parametrize(
    ("fault", "received"),
    [
        (Fault("GET .*", status=404, page="<html><title>Error 404</title>"), "answered 404 Not Found with a page 'Err"),
        (Fault("GET .*", page="<html><body>Log in"), "answered 200 OK with a page 'Log in'"),
        (Fault("GET .*", page="pong"), "answered 200 OK with text 'pong'"),
        (Fault("GET .*", status=302, headers={"Location": "https://sso"}), "answered 302 .* points to https://sso"),
    ],
    ids=["not found", "log-in page", "not JSON", "redirection"],
)
def test_a_host_that_is_not_the_api_ends_it_at_once(kfp: KfpServer, fault: Fault, received: str) -> None:
    """One request; what was received, and which setting to mend."""
    kfp.faults = [fault]
    with pytest.raises(PipelineFailed, match=rf"{kfp.url} {received}.*expected the Kubeflow Pipelines API") as failure:
        PipelinesApi().live("a run")
    assert not isinstance(failure.value, ClusterUnreachable)
    assert "FRESHRANK_KFP_HOST" in str(failure.value)
    assert len(kfp.requests) == 1


def test_a_host_without_a_scheme_is_refused_before_any_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would guess https and say so on its own."""
    _point_to(monkeypatch, "localhost:8080")
    with pytest.raises(ConfigError, match=r"^FRESHRANK_KFP_HOST: received 'localhost:8080', expected .*http://"):
        PipelinesApi()


def test_https_of_an_unknown_authority_ends_it_at_once_and_of_a_named_one_is_spoken(
    kfp: KfpServer, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is usual inside companies; nothing is sent before."""
    certificate = speaking_tls(kfp, tmp_path)
    _point_to(monkeypatch, kfp.url.replace("http://", "https://"))
    with pytest.raises(
        PipelineFailed, match=r"^FRESHRANK_KFP_HOST: .*could not agree on TLS .*certificate.*FRESHRANK_KFP_CA_CERT"
    ):
        PipelinesApi().run(run_id)
    assert kfp.requests == []
    monkeypatch.setenv("FRESHRANK_KFP_CA_CERT", str(certificate))
    assert PipelinesApi().run(run_id).state == "RUNNING"


def test_https_to_a_host_that_speaks_http_ends_it_at_once(
    kfp: KfpServer, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says which way to write it."""
    _point_to(monkeypatch, kfp.url.replace("http://", "https://"))
    with pytest.raises(PipelineFailed, match=r"^FRESHRANK_KFP_HOST: .*or write http://"):
        PipelinesApi().run(run_id)


def test_an_authority_that_is_not_there_is_named(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent without it."""
    monkeypatch.setenv("FRESHRANK_KFP_CA_CERT", "/no/such.pem")
    with pytest.raises(ConfigError, match=r"FRESHRANK_KFP_CA_CERT: received /no/such\.pem"):
        PipelinesApi().run("run-0")


def _point_to(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("FRESHRANK_KFP_HOST", host)
    settings.cache_clear()


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
