"""A gRPC connection to a Triton server: tensors in and out, and errors that say what to do."""

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from freshrank.bundle.golden import Tensors
from freshrank.errors import NoAnswerInTime, ServerUnreachable, ServingError
from freshrank.serving.fork_gate import FORK_GATE
from freshrank.serving.protocol import RANKING

_UNLIMITED = -1
_CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", _UNLIMITED),
    ("grpc.max_receive_message_length", _UNLIMITED),
    # A proxy set for the web must not stand between us and a server on loopback or in the cluster.
    ("grpc.enable_http_proxy", 0),
    # gRPC waits 1 s, then longer, before it tries again a server that was still starting.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Channels to one address share a socket otherwise, in a forked child one that is its parent's.
    ("grpc.use_local_subchannel_pool", 1),
]
_UNREACHABLE = (
    "failed to connect to all addresses",
    "errors resolving",
    "DNS resolution failed",
    "Connection refused",
    "Connection reset",
    "Socket closed",
)
HUNG = "timed out before receiving SETTINGS"
"""The connection was accepted, but nothing was answered."""
_REFUSED_CONTROL = "restricted, expecting header"
_INHERITED: list[InferenceServerClient] = []
"""Channels of parent processes: a child never closes them, which even their garbage collection would."""


class Connection:
    """A channel to ``url`` (``host:port``), opened at the first call and anew in a forked child.

    Close it, or use it in a ``with``; a call after that opens it again. Threads may share it.
    """

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        self.url = url
        self._timeout = timeout
        self._opening = Lock()
        self._channel: InferenceServerClient | None = None
        self._process = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with FORK_GATE, self._opening:
            self._leave_to_parent()
            if self._channel is not None:
                self._channel.close()
            self._channel = None

    @property
    def timeout(self) -> float:
        """Seconds that a call waits for its answer."""
        return self._timeout

    def channel(self) -> InferenceServerClient:
        """This process's own."""
        with self._opening:
            self._leave_to_parent()
            if self._channel is None:
                self._channel = InferenceServerClient(self.url, channel_args=_CHANNEL_ARGUMENTS)
            return self._channel

    def _leave_to_parent(self) -> None:
        # The process's number tells, not a hook: what forks in C (uWSGI) need not run Python's.
        if self._process != os.getpid():
            _INHERITED.extend([self._channel] if self._channel else [])
            self._channel, self._process = None, os.getpid()

    def require_project(self, project: str) -> None:
        """ServingError unless the server ranks for ``project``: another one would answer with items of its own."""
        with FORK_GATE, refusals(self.url, f"asking for the configuration of {RANKING}"):
            answer = self.channel().get_model_config(RANKING, client_timeout=self.timeout)
        refuse_other_project(self.url, answer.config, project)

    def infer(
        self, model: str, inputs: Tensors, outputs: list[str], version: int | None = None, request_id: str = ""
    ) -> Tensors:
        """Ask ``model``, at ``version`` where given, and return ``outputs`` by name."""
        with FORK_GATE, refusals(self.url, _asking(model, version)):
            result = self.channel().infer(
                **_call(model, inputs, outputs, version, request_id), client_timeout=self.timeout
            )
            return _arrays(result, outputs)

    async def require_project_async(self, project: str) -> None:
        """As :meth:`require_project`."""
        await asyncio.to_thread(self.require_project, project)

    async def infer_async(
        self, model: str, inputs: Tensors, outputs: list[str], version: int | None = None, request_id: str = ""
    ) -> Tensors:
        """As :meth:`infer`; a task that is cancelled cancels the call."""
        # Not gRPC's asyncio channels: they belong to one event loop, and while one is open no child can use gRPC.
        answer: Future[InferResult] = Future()

        def settle(result: InferResult | None, error: InferenceServerException | None) -> None:
            FORK_GATE.leave()
            if answer.set_running_or_notify_cancel():
                answer.set_result(result) if error is None else answer.set_exception(error)

        FORK_GATE.enter()
        try:
            asked = _call(model, inputs, outputs, version, request_id)
            call = self.channel().async_infer(**asked, callback=settle, client_timeout=self.timeout)
        except BaseException:
            FORK_GATE.leave()
            raise
        answer.add_done_callback(lambda done: call.cancel() if done.cancelled() else None)
        with refusals(self.url, _asking(model, version)):
            return _arrays(await asyncio.wrap_future(answer), outputs)


def _asking(model: str, version: int | None) -> str:
    return f"asking {model}" + ("" if version is None else f" version {version}")


def _call(model: str, inputs: Tensors, outputs: list[str], version: int | None, request_id: str) -> dict[str, Any]:
    tensors = [_input_tensor(name, value) for name, value in inputs.items()]
    return {
        "model_name": model,
        "inputs": tensors,
        "model_version": "" if version is None else str(version),
        "outputs": [InferRequestedOutput(name) for name in outputs],
        "request_id": request_id,
    }


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
            raise ServerUnreachable(hangs(url) if HUNG in error.message() else absent) from error
        # The Python backend appends its stack, which the server's log holds as well.
        message = error.message().split("\n\nAt:")[0].strip()
        if _REFUSED_CONTROL in message:
            message += (
                "; expected that server's control token: set FRESHRANK_TRITON_CONTROL_TOKEN to it, or unset it "
                "where `freshrank serve` runs, which leaves its own in control.token"
            )
        kind = NoAnswerInTime if error.status() == "StatusCode.DEADLINE_EXCEEDED" else ServingError
        raise kind(f"{what}: Triton says: {message}") from error


def hangs(url: str) -> str:
    return (
        f"what listens at {url} does not answer in time; it hangs, is stopped or overloaded: look at it or restart it"
    )


def _is_unreachable(error: InferenceServerException) -> bool:
    # Triton sends the same status itself, e.g. while nothing is published: only gRPC's words tell the two apart.
    return error.status() == "StatusCode.UNAVAILABLE" and any(words in error.message() for words in _UNREACHABLE)


def _input_tensor(name: str, value: np.ndarray[Any, Any]) -> InferInput:
    tensor = InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
    return tensor.set_data_from_numpy(value)


def _arrays(result: InferResult, names: list[str]) -> Tensors:
    answer = {name: result.as_numpy(name) for name in names}
    return {name: value for name, value in answer.items() if value is not None}
