"""A server under test, with the few things tests do to it."""

from dataclasses import dataclass
from pathlib import Path

from tiny_bundles import OUTPUTS, request, write_bundle

from freshrank.bundle.golden import Tensors
from freshrank.serving.deploy.local_server import TritonServer
from freshrank.serving.deploy.publish import publish
from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.serving.triton import TritonClient


@dataclass
class Served:
    """A running server with its repository and a place for bundles."""

    server: TritonServer
    home: Path
    bundles: int = 0

    @property
    def repository(self) -> ModelRepository:
        return self.server.repository

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server.ports.grpc}"

    def bundle(self, weight: float, **how: object) -> Path:
        """A bundle no earlier call has written, unless ``fingerprint`` says otherwise."""
        self.bundles += 1
        how = {"fingerprint": f"bundle{self.bundles}", **how}
        return write_bundle(self.home / f"bundle{self.bundles}", weight, **how)

    def publish(self, weight: float) -> Pointer:
        return publish(self.bundle(weight), self.url, self.repository)

    def ask(self, version: int, inputs: Tensors | None = None) -> Tensors:
        with TritonClient(self.url) as client:
            return client.infer("ranker", inputs or request(), OUTPUTS, version)
