"""The chart's Triton, started here: the real server with the very arguments and commands that the pod has."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from freshrank.bench.measure import free_ports
from freshrank.errors import ServingError
from freshrank.serving.deploy.local_server import TritonServer
from freshrank.serving.deploy.publish import publish
from freshrank.serving.protocol import RANKING
from freshrank.serving.repository import RANKER, ModelRepository, Pointer
from freshrank.serving.triton import TritonClient
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace
from tests.helm.charts import container_of, init_container_of, is_ready, rendered_at
from tests.helm.test_monitoring import TRITONS
from tests.serving.tiny_bundles import write_bundle

pytestmark = pytest.mark.integration

TOKEN = "a-token"
OF_THE_WHEEL = ("backend-directory", "backend-config", "allow-gpu-metrics")
OF_THIS_MACHINE = ("grpc-port", "http-port", "metrics-port", "grpc-address", "http-address", "metrics-address")


class Pod(TritonServer):
    """Triton's pod of a release whose workspace is `home`, on this machine's ports and the wheel's backends."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.objects = rendered_at(home)
        super().__init__(ModelRepository(Workspace(home, "my_log").triton), free_ports())

    def prepare(self) -> None:
        """What the pod does before its server starts."""
        interpreter, *arguments = init_container_of(self.objects, "triton")["command"]
        assert interpreter == "python3"
        subprocess.run([sys.executable, *arguments], check=True, env=os.environ | {"FRESHRANK_HOME": str(self.home)})

    def restart(self) -> None:
        self.stop()
        self.prepare()
        self.start()

    def publish(self, bundle: Path) -> Pointer:
        return publish(bundle, f"127.0.0.1:{self.ports.grpc}", self.repository)

    def publish_elsewhere(self, bundle: Path, before: Pointer) -> None:
        """What a publication to another replica leaves on the volume that both share."""
        version = self.repository.install_version(bundle)
        pointer = before.model_copy(update={"version": version, "previous": before.version})
        self.repository.point_to(pointer)

    def loaded(self) -> dict[str, list[int]]:
        return self.status().models

    def metrics(self) -> set[str]:
        """Names of what Prometheus would read of the model `ranking`."""
        text = urlopen(f"http://127.0.0.1:{self.ports.metrics}/metrics", timeout=5).read().decode()
        return set(re.findall(r'^(\w+)\{[^}]*model="ranking"', text, re.MULTILINE))

    def can_rank(self) -> bool:
        return is_ready(self.home, self.ports.http)

    def _command(self, models: list[str]) -> list[str]:
        arguments = container_of(self.objects, "triton")["args"]
        ours = [a.replace("$(TRITON_CONTROL_TOKEN)", TOKEN) for a in arguments if _name(a) not in OF_THIS_MACHINE]
        local = [a for a in super()._command(models)[1:] if _name(a) in OF_THE_WHEEL + OF_THIS_MACHINE]
        return [*self._identity(), *(a for a in ours if _name(a) != "model-repository"), *local]


def _name(argument: str) -> str:
    return argument.removeprefix("--").partition("=")[0]


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pod]:
    monkeypatch.setenv("FRESHRANK_HOME", str(tmp_path))
    monkeypatch.setenv("FRESHRANK_TRITON_CONTROL_TOKEN", TOKEN)
    settings.cache_clear()
    pod = Pod(tmp_path)
    yield pod
    pod.stop()
    settings.cache_clear()


def without_token(monkeypatch: pytest.MonkeyPatch, url: str) -> TritonClient:
    with monkeypatch.context() as environment:
        environment.delenv("FRESHRANK_TRITON_CONTROL_TOKEN")
        settings.cache_clear()
        client = TritonClient(url)
    settings.cache_clear()
    return client


def test_a_release_starts_empty_serves_what_is_published_and_finds_it_again(
    pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty volume gives a live server for a publisher with the token; a restart loads what the pointer names.

    Between a publication that did not reach this replica and its restart it takes no requests; a workspace that is gone
    or hangs costs it none.
    """
    pod.prepare()
    assert [entry.name for entry in pod.repository.models.iterdir()] == [RANKING]
    pod.start()
    assert pod.loaded() == {RANKING: [1]}
    assert not pod.can_rank()

    with without_token(monkeypatch, f"127.0.0.1:{pod.ports.grpc}") as stranger:
        for forbidden in (lambda: stranger.load(RANKING), lambda: stranger.unload(RANKING), stranger.ready_versions):
            with pytest.raises(ServingError, match="restricted"):
                forbidden()
        assert stranger.is_model_ready(RANKING)

    first = pod.publish(write_bundle(tmp_path / "one", 1.0))
    assert pod.can_rank()

    pod.publish_elsewhere(write_bundle(tmp_path / "two", 2.0), first)
    assert pod.loaded()[RANKER] == [1]
    assert not pod.can_rank()

    assert pod.metrics() >= TRITONS

    pod.restart()
    assert pod.loaded() == {RANKER: [1, 2], RANKING: [1]}
    assert pod.can_rank()

    away = pod.repository.root.with_name("away")
    pod.repository.root.rename(away)
    assert pod.can_rank()
    away.rename(pod.repository.root)
    os.mkfifo(away)
    away.replace(pod.repository.pointer_path)  # whoever opens it waits for ever
    assert pod.can_rank()
