"""The few calls freshrank makes to a Triton server, over gRPC; every refusal becomes a ServingError."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from freshrank.errors import ServingError
from freshrank.serving.bundle import Tensors

_UNLIMITED = -1


class TritonClient:
    """A gRPC connection to ``url`` (``host:port``); close it, or use it in a ``with``."""

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        self.url = url
        self.timeout = timeout
        self._client = InferenceServerClient(
            url,
            channel_args=[
                ("grpc.max_send_message_length", _UNLIMITED),
                ("grpc.max_receive_message_length", _UNLIMITED),
                # A proxy set for the web must not stand between us and a server on loopback or in the cluster.
                ("grpc.enable_http_proxy", 0),
                # gRPC waits 1 s, then longer, before it tries again a server that was still starting.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def is_ready(self) -> bool:
        """Whether the server has finished starting, models included, and answers."""
        try:
            return bool(self._client.is_server_ready(client_timeout=self.timeout))
        except InferenceServerException:
            return False

    def require_ready(self) -> None:
        if not self.is_ready():
            raise ServingError(f"no Triton is ready at {self.url}; start one with `freshrank serve`")

    def is_model_ready(self, model: str, version: int | None = None) -> bool:
        with _refusals(f"asking for {model}"):
            name = "" if version is None else str(version)
            return bool(self._client.is_model_ready(model, name, client_timeout=self.timeout))

    def ready_versions(self) -> dict[str, list[int]]:
        """Loaded versions of every model."""
        with _refusals("listing models"):
            index = self._client.get_model_repository_index(client_timeout=self.timeout)
        loaded: dict[str, list[int]] = {}
        for model in index.models:
            if model.state == "READY":
                loaded.setdefault(model.name, []).append(int(model.version))
        return loaded

    def load(self, model: str, config_json: str | None = None, timeout: float = 300.0) -> None:
        """Load or reload ``model``; with ``config_json`` under that configuration rather than the one on disk.

        Versions that are loaded, listed and unchanged are not touched; on failure all that was loaded stays.
        """
        with _refusals(f"loading {model}"):
            self._client.load_model(model, config=config_json, client_timeout=timeout)

    def unload(self, model: str) -> None:
        with _refusals(f"unloading {model}"):
            self._client.unload_model(model, client_timeout=self.timeout)

    def infer(self, model: str, inputs: Tensors, outputs: list[str], version: int | None = None) -> Tensors:
        """Ask ``model``, at ``version`` where given, and return ``outputs`` by name."""
        with _refusals(f"asking {model} version {version or 'of its choice'}"):
            result = self._client.infer(
                model,
                [_input(name, value) for name, value in inputs.items()],
                model_version="" if version is None else str(version),
                outputs=[InferRequestedOutput(name) for name in outputs],
                client_timeout=self.timeout,
            )
            answer = {name: result.as_numpy(name) for name in outputs}
        return {name: value for name, value in answer.items() if value is not None}


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        # The Python backend appends its stack, which the server's log holds as well.
        message = error.message().split("\n\nAt:")[0].strip()
        raise ServingError(f"{what}: Triton says: {message}") from error


def _input(name: str, value: np.ndarray[Any, Any]) -> InferInput:
    tensor = InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
    return tensor.set_data_from_numpy(value)
