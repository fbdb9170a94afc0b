"""Triton Python model ``ranking``: freshrank.serving.ranking.service between two conversions, and a call to ``ranker``.

``initialize`` sends every kind of tensor through the conversions of a request and refuses to load when one comes
back changed. It needs no published version: until there is one, requests are answered with UNAVAILABLE.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from freshrank.bundle.golden import Tensors
from freshrank.errors import ServingError
from freshrank.serving.protocol import INPUTS, OUTPUTS
from freshrank.serving.ranking.metrics import RankingMetrics
from freshrank.serving.ranking.query import BadRequest
from freshrank.serving.ranking.ranked import Ranked
from freshrank.serving.ranking.recorder import Recorder
from freshrank.serving.ranking.request_log import RequestLog
from freshrank.serving.ranking.served import NothingPublished
from freshrank.serving.ranking.service import RankingService, ServiceObserver
from freshrank.serving.ranking.tensors import to_array, to_tensor
from freshrank.serving.repository import RANKER, ModelRepository
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace

RANKER_OUTPUTS = ["probabilities", "score"]

log = logging.getLogger("freshrank.serving.ranking.service")


class TritonPythonModel:
    """Answers ``protocol.INPUTS -> protocol.OUTPUTS``."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        refuse_wrong_conversions()
        self.metrics = RankingMetrics(_counters)
        repository = ModelRepository(Path(parameters["repository"]["string_value"]))
        requests_folder = Workspace.of(parameters["project"]["string_value"]).requests
        self.recorder, self.log = Recorder(requests_folder), _request_log(requests_folder)
        self.service = RankingService(repository, settings().home, call_ranker, Counted(self.metrics))
        self.service.warm_up()

    def execute(self, requests: list[Any]) -> list[Any]:
        given = [_given(request) for request in requests]
        results = self.service.rank(given, [request.request_id() for request in requests])
        for request, each in zip(given, results, strict=True):
            # What a publication itself asks names its version: it is not traffic.
            if isinstance(each, Ranked) and "version" not in request:
                self.recorder.offer(request)
                self._log(each)
        return [self._respond(each) for each in results]

    def finalize(self) -> None:
        """Write what the request log still holds."""
        if self.log:
            self.log.close()

    def _respond(self, result: Ranked | Exception) -> Any:
        if isinstance(result, Ranked):
            self.metrics.answered(result, self.service.encoder(int(result.answer["model_version"][0])))
            return pb_utils.InferenceResponse([to_tensor(s.name, result.answer[s.name][None]) for s in OUTPUTS])
        outcome, code = _REFUSALS.get(type(result), ("failed", "INTERNAL"))
        if outcome == "failed":
            log.error("a request failed", exc_info=result)
        self.metrics.refused(outcome)
        return pb_utils.InferenceResponse([], pb_utils.TritonError(str(result), getattr(pb_utils.TritonError, code)))

    def _log(self, ranked: Ranked) -> None:
        if self.log and (logged := self.log.offer(ranked)) is not None:
            self.metrics.add("log_requests_total", 1, outcome="kept" if logged else "dropped")


class Counted(ServiceObserver):
    """Counts what the service tells."""

    def __init__(self, metrics: RankingMetrics) -> None:
        self.metrics = metrics

    def stages(self, version: int, seconds: dict[str, float]) -> None:
        self.metrics.stages(version, seconds)

    def shadowed(self, version: int, outcome: str, error: Exception | None = None) -> None:
        super().shadowed(version, outcome, error)
        self.metrics.add("shadow_batches_total", 1, version=version, outcome=outcome)

    def fell_back(self, version: int, error: Exception) -> None:
        super().fell_back(version, error)
        self.metrics.add("fallbacks_total", 1, version=version)

    def pointer_lost(self, error: Exception) -> None:
        self.metrics.add("pointer_failures_total", 1)


def _counters(name: str, description: str) -> Any:
    return pb_utils.MetricFamily(name, description, pb_utils.MetricFamily.COUNTER)


def _request_log(folder: Path) -> RequestLog | None:
    share = settings().request_log_share
    return RequestLog(folder, share) if share else None


# By name: Triton adds its errors to the module only after it has imported this one.
_REFUSALS = {BadRequest: ("refused", "INVALID_ARG"), NothingPublished: ("unpublished", "UNAVAILABLE")}


def call_ranker(version: int, blocks: Tensors) -> Tensors:
    """Ask the loaded ``version`` of ranker; a ServingError where it refuses."""
    response = pb_utils.InferenceRequest(
        model_name=RANKER,
        model_version=version,
        requested_output_names=RANKER_OUTPUTS,
        inputs=[to_tensor(name, block) for name, block in blocks.items()],
        # A ranker on a GPU would leave its answers there.
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    ).exec()
    if response.has_error():
        raise ServingError(f"ranker version {version}: {response.error().message()}")
    return {tensor.name(): to_array(tensor) for tensor in response.output_tensors()}


def refuse_wrong_conversions() -> None:
    for spec in (*INPUTS, *OUTPUTS):
        sent = (np.arange(6).reshape((2, 3) if len(spec.shape) == 2 else 6) % 2).astype(spec.dtype)
        received = to_array(to_tensor(spec.name, sent))
        if received.dtype != sent.dtype or not np.array_equal(received, sent):
            raise pb_utils.TritonModelException(f"self-check: {spec.name} was {sent}, came back as {received}")


def _given(request: Any) -> Tensors:
    tensors = {spec.name: pb_utils.get_input_tensor_by_name(request, spec.name) for spec in INPUTS}
    return {name: to_array(tensor) for name, tensor in tensors.items() if tensor is not None}
