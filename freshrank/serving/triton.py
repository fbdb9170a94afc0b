"""Triton's gRPC API as whoever publishes uses it: what is loaded, and loading and unloading it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from tritonclient.utils import InferenceServerException

from freshrank.errors import ServerUnreachable
from freshrank.serving import control_token
from freshrank.serving.connection import HUNG, Connection, hangs, refusals
from freshrank.serving.repository import ModelRepository
from freshrank.settings import settings


class TritonClient(Connection):
    """A connection that controls the server, too.

    ``token`` goes with the calls that list, load or unload models and with no other; the settings' by default.
    """

    def __init__(self, url: str, timeout: float = 30.0, token: str | None = None) -> None:
        super().__init__(url, timeout)
        self._deadline = float("inf")
        held = settings().triton_control_token.get_secret_value() if token is None else token
        self._control = {control_token.GRPC_HEADER: held} if held else None

    @classmethod
    def controlling(cls, repository: ModelRepository, url: str, timeout: float = 30.0) -> Self:
        """With the token of the server of ``repository``."""
        return cls(url, timeout, control_token.token_of(repository.root))

    @contextmanager
    def within(self, seconds: float) -> Iterator[Self]:
        """All calls together get ``seconds``: what is left of them is the most that each of them waits."""
        self._deadline = time.monotonic() + seconds
        try:
            yield self
        finally:
            self._deadline = float("inf")

    @property
    def timeout(self) -> float:
        """Seconds that a call waits for its answer."""
        return self._limited(self._timeout)

    def _limited(self, seconds: float) -> float:
        # Not 0: Triton's client takes that for "no limit".
        return max(0.001, min(seconds, self._deadline - time.monotonic()))

    def is_ready(self) -> bool:
        """Whether the server has finished starting, models included, and answers."""
        try:
            return bool(self.channel().is_server_ready(client_timeout=self.timeout))
        except InferenceServerException:
            return False

    def require_ready(self) -> None:
        try:
            ready = self.channel().is_server_ready(client_timeout=self.timeout)
        except InferenceServerException as error:
            if HUNG in error.message() or error.status() == "StatusCode.DEADLINE_EXCEEDED":
                raise ServerUnreachable(hangs(self.url)) from error
            ready = False
        if not ready:
            raise ServerUnreachable(f"no Triton is ready at {self.url}; start one with `freshrank serve`")

    def is_model_ready(self, model: str, version: int | None = None) -> bool:
        with refusals(self.url, f"asking for {model}"):
            name = "" if version is None else str(version)
            return bool(self.channel().is_model_ready(model, name, client_timeout=self.timeout))

    def ready_versions(self) -> dict[str, list[int]]:
        """Loaded versions of every model."""
        with refusals(self.url, "listing models"):
            index = self.channel().get_model_repository_index(headers=self._control, client_timeout=self.timeout)
        loaded: dict[str, list[int]] = {}
        for model in index.models:
            if model.state == "READY":
                loaded.setdefault(model.name, []).append(int(model.version))
        return loaded

    def load(self, model: str, config_json: str | None = None, timeout: float = 300.0) -> None:
        """Load or reload ``model``; with ``config_json`` under that configuration rather than the one on disk.

        Versions that are loaded, listed and unchanged are not touched; on failure all that was loaded stays.
        """
        with refusals(self.url, f"loading {model}"):
            self.channel().load_model(
                model, headers=self._control, config=config_json, client_timeout=self._limited(timeout)
            )

    def unload(self, model: str) -> None:
        with refusals(self.url, f"unloading {model}"):
            self.channel().unload_model(model, headers=self._control, client_timeout=self.timeout)
