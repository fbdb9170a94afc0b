"""Who may load and unload models on a machine where everybody may rank."""

import json
import stat
from collections.abc import Callable
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil
import pytest
from served import Served
from tiny_bundles import OUTPUTS, expected, request

from freshrank.errors import ServingError
from freshrank.serving import control_token
from freshrank.serving.deploy.publish import publish, rollback
from freshrank.serving.repository import ModelRepository
from freshrank.serving.triton import TritonClient
from freshrank.settings import settings

REFUSED = "restricted"


def http(running: Served, path: str, headers: dict[str, str] | None = None) -> int:
    """The status of a POST."""
    url = f"http://127.0.0.1:{running.server.ports.http}/v2/{path}"
    wanted = Request(url, data=json.dumps({}).encode(), headers=headers or {}, method="POST")
    try:
        with build_opener(ProxyHandler({})).open(wanted, timeout=10) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def command_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_the_token_is_readable_by_its_own_user_only(running: Served) -> None:
    """Mode 0600, in the model repository, and 192 random bits."""
    path = control_token.token_path(running.repository.root)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) == 48


def test_without_the_token_models_can_be_asked_but_not_controlled(running: Served) -> None:
    """Load, unload and the index are refused, and told what is missing; an answer is an answer, and the model stays
    loaded."""
    version = running.publish(1.0).version
    with TritonClient(running.url) as stranger:
        for forbidden in (lambda: stranger.load("ranker"), lambda: stranger.unload("ranker"), stranger.ready_versions):
            with pytest.raises(ServingError, match=f"{REFUSED}.*set FRESHRANK_TRITON_CONTROL_TOKEN"):
                forbidden()
        score = stranger.infer("ranker", request(), OUTPUTS, version)["score"]
    assert abs(score - expected(request(), 1.0)["score"]).max() < 1e-6


@pytest.mark.parametrize(
    "path",
    [
        "repository/index",
        "repository/models/ranker/load",
        "repository/models/ranker/unload",
        "logging",
        "trace/setting",
        "systemsharedmemory/unregister",
    ],
)
def test_http_refuses_control_as_grpc_does(running: Served, path: str) -> None:
    """Both protocols stand on loopback; neither is a way around the other."""
    running.publish(1.0)
    assert http(running, path) == 403
    assert http(running, path, {control_token.HEADER: "not the token"}) == 403
    assert running.server.status().models["ranker"]


def test_the_token_opens_http_as_well(running: Served) -> None:
    """The header is the one that the chart uses."""
    token = control_token.token_of(running.repository.root)
    assert http(running, "repository/index", {control_token.HEADER: token}) == 200


def test_a_wrong_token_changes_nothing_and_blames_no_version(running: Served) -> None:
    """A publisher that does not find the token is refused before it installs anything."""
    running.publish(1.0)
    before, path = running.repository.served(), control_token.token_path(running.repository.root)
    token, installed = path.read_text(), running.repository.versions()
    path.write_text("another server's")
    try:
        with pytest.raises(ServingError, match=REFUSED):
            publish(running.bundle(2.0), running.url, running.repository)
        with pytest.raises(ServingError, match=REFUSED):
            rollback(running.url, running.repository, to=installed[0])
    finally:
        path.write_text(token)
    assert (running.repository.served(), running.repository.versions()) == (before, installed)


def test_every_start_draws_another_token(running: Served, new_server: Callable[[], Served]) -> None:
    """What leaked once is worth nothing after a restart."""
    served, tokens = new_server(), set()
    for _ in range(2):
        served.server.start()
        tokens.add(control_token.token_of(served.repository.root))
        served.server.stop()
    assert len(tokens | {control_token.token_of(running.repository.root)}) == 3


def test_no_command_line_but_tritons_own_shows_the_token(running: Served) -> None:
    """Triton takes it as an argument only; neither its Python models nor the log repeat it."""
    token = control_token.token_of(running.repository.root)
    telling = [p.pid for p in psutil.process_iter() if any(token in argument for argument in command_of(p))]
    assert telling == [running.server.status().pid]
    assert token not in running.server.log_path.read_text()
    assert running.server.status().models["ranking"] == [1]


def test_the_setting_goes_before_the_file(monkeypatch: pytest.MonkeyPatch, running: Served) -> None:
    """On a cluster the token comes from a Secret, and the volume holds none."""
    monkeypatch.setenv("FRESHRANK_TRITON_CONTROL_TOKEN", "from a Secret")
    settings.cache_clear()
    try:
        assert control_token.token_of(running.repository.root) == "from a Secret"
    finally:
        monkeypatch.undo()
        settings.cache_clear()
    assert control_token.token_of(ModelRepository(running.home / "nowhere").root) == ""
