"""Triton's gRPC and HTTP API as this package uses it, with errors that say what to do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from freshrank.bundle.golden import Tensors
from freshrank.errors import NoAnswerInTime, ServerUnreachable, ServingError
from freshrank.serving import control_token
from freshrank.serving.repository import RANKING, ModelRepository
from freshrank.settings import settings

_UNLIMITED = -1
CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", _UNLIMITED),
    ("grpc.max_receive_message_length", _UNLIMITED),
    # A proxy set for the web must not stand between us and a server on loopback or in the cluster.
    ("grpc.enable_http_proxy", 0),
    # gRPC waits 1 s, then longer, before it tries again a server that was still starting.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_UNREACHABLE = (
    "failed to connect to all addresses",
    "errors resolving",
    "DNS resolution failed",
    "Connection refused",
    "Connection reset",
    "Socket closed",
)
_HUNG = "timed out before receiving SETTINGS"
"""The connection was accepted, but nothing was answered."""
_REFUSED_CONTROL = "restricted, expecting header"


class TritonClient:
    """A gRPC connection to ``url`` (``host:port``); close it, or use it in a ``with``.

    ``token`` goes with the calls that list, load or unload models and with no other; the settings' by default.
    """

    def __init__(self, url: str, timeout: float = 30.0, token: str | None = None) -> None:
        self.url = url
        self._timeout = timeout
        self._deadline = float("inf")
        self._client = InferenceServerClient(url, channel_args=CHANNEL_ARGUMENTS)
        held = settings().triton_control_token.get_secret_value() if token is None else token
        self._control = {control_token.GRPC_HEADER: held} if held else None

    @classmethod
    def controlling(cls, repository: ModelRepository, url: str, timeout: float = 30.0) -> Self:
        """With the token of the server of ``repository``."""
        return cls(url, timeout, control_token.token_of(repository.root))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

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
            return bool(self._client.is_server_ready(client_timeout=self.timeout))
        except InferenceServerException:
            return False

    def require_ready(self) -> None:
        try:
            ready = self._client.is_server_ready(client_timeout=self.timeout)
        except InferenceServerException as error:
            if _HUNG in error.message() or error.status() == "StatusCode.DEADLINE_EXCEEDED":
                raise ServerUnreachable(_hangs(self.url)) from error
            ready = False
        if not ready:
            raise ServerUnreachable(f"no Triton is ready at {self.url}; start one with `freshrank serve`")

    def require_project(self, project: str) -> None:
        """ServingError unless the server ranks for ``project``: another one would answer with items of its own."""
        with refusals(self.url, f"asking for the configuration of {RANKING}"):
            answer = self._client.get_model_config(RANKING, client_timeout=self.timeout)
        refuse_other_project(self.url, answer.config, project)

    def is_model_ready(self, model: str, version: int | None = None) -> bool:
        with refusals(self.url, f"asking for {model}"):
            name = "" if version is None else str(version)
            return bool(self._client.is_model_ready(model, name, client_timeout=self.timeout))

    def ready_versions(self) -> dict[str, list[int]]:
        """Loaded versions of every model."""
        with refusals(self.url, "listing models"):
            index = self._client.get_model_repository_index(headers=self._control, client_timeout=self.timeout)
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
            self._client.load_model(
                model, headers=self._control, config=config_json, client_timeout=self._limited(timeout)
            )

    def unload(self, model: str) -> None:
        with refusals(self.url, f"unloading {model}"):
            self._client.unload_model(model, headers=self._control, client_timeout=self.timeout)

    def infer(
        self, model: str, inputs: Tensors, outputs: list[str], version: int | None = None, request_id: str = ""
    ) -> Tensors:
        """Ask ``model``, at ``version`` where given, and return ``outputs`` by name."""
        with refusals(self.url, f"asking {model}" + ("" if version is None else f" version {version}")):
            result = self._client.infer(
                model,
                [input_tensor(name, value) for name, value in inputs.items()],
                model_version="" if version is None else str(version),
                outputs=[InferRequestedOutput(name) for name in outputs],
                request_id=request_id,
                client_timeout=self.timeout,
            )
            return output_arrays(result, outputs)


def refuse_other_project(url: str, config: ModelConfig, expected: str) -> None:
    if "project" not in config.parameters:
        raise ServingError(
            f"the server at {url} does not say which dataset it serves, expected '{expected}'; it was started by an "
            "older freshrank: run `freshrank stop --data PATH`, then `freshrank serve --data PATH`"
        )
    served = config.parameters["project"].string_value
    if served != expected:
        raise ServingError(
            f"the server at {url} serves '{served}', expected '{expected}'; run `freshrank serve --data PATH`"
        )


@contextmanager
def refusals(url: str, what: str) -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        if _is_unreachable(error):
            absent = f"no Triton answers at {url}; start it with `freshrank serve --data PATH`"
            raise ServerUnreachable(_hangs(url) if _HUNG in error.message() else absent) from error
        # The Python backend appends its stack, which the server's log holds as well.
        message = error.message().split("\n\nAt:")[0].strip()
        if _REFUSED_CONTROL in message:
            message += (
                "; expected that server's control token: set FRESHRANK_TRITON_CONTROL_TOKEN to it, or unset it "
                "where `freshrank serve` runs, which leaves its own in control.token"
            )
        kind = NoAnswerInTime if error.status() == "StatusCode.DEADLINE_EXCEEDED" else ServingError
        raise kind(f"{what}: Triton says: {message}") from error


def _hangs(url: str) -> str:
    return (
        f"what listens at {url} does not answer in time; it hangs, is stopped or overloaded: look at it or restart it"
    )


def _is_unreachable(error: InferenceServerException) -> bool:
    # Triton sends the same status itself, e.g. while nothing is published: only gRPC's words tell the two apart.
    return error.status() == "StatusCode.UNAVAILABLE" and any(words in error.message() for words in _UNREACHABLE)


def on_wire(request: Tensors) -> Tensors:
    """Tensors of ``protocol.INPUTS`` as the server takes them, with a leading dimension of 1."""
    return {name: value[None] for name, value in request.items()}


def off_wire(answer: Tensors) -> Tensors:
    """The inverse, for an answer."""
    return {name: value[0] for name, value in answer.items()}


def input_tensor(name: str, value: np.ndarray[Any, Any]) -> InferInput:
    tensor = InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
    return tensor.set_data_from_numpy(value)


def output_arrays(result: Any, names: list[str]) -> Tensors:
    answer = {name: result.as_numpy(name) for name in names}
    return {name: value for name, value in answer.items() if value is not None}
