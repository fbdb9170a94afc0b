"""Triton Python model ``ranking``: freshrank.serving.ranking between two conversions, and a call to ``ranker``.

``initialize`` sends every kind of tensor through the conversions of a request and refuses to load when one comes
back changed. It needs no published version: until there is one, requests are answered with UNAVAILABLE.
"""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from freshrank.errors import ServingError
from freshrank.serving.bundle import Tensors
from freshrank.serving.protocol import INPUTS, OUTPUTS
from freshrank.serving.ranking import BadRequest, NothingPublished, RankingService
from freshrank.serving.repository import RANKER, ModelRepository
from freshrank.serving.tensors import to_array, to_tensor
from freshrank.settings import settings

RANKER_OUTPUTS = ["probabilities", "score"]

log = logging.getLogger("freshrank.serving.ranking")


class TritonPythonModel:
    """Answers ``protocol.INPUTS -> protocol.OUTPUTS``."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        refuse_wrong_conversions()
        self.metrics = Metrics()
        repository = ModelRepository(Path(parameters["repository"]["string_value"]))
        self.service = RankingService(repository, settings().home, call_ranker)
        self.service.warm_up()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            answer = self.service.rank(_given(request))
        except BadRequest as error:
            return self._refusal("refused", error, pb_utils.TritonError.INVALID_ARG)
        except NothingPublished as error:
            return self._refusal("unpublished", error, pb_utils.TritonError.UNAVAILABLE)
        except Exception as error:
            log.exception("a request failed")
            return self._refusal("failed", error, pb_utils.TritonError.INTERNAL)
        self.metrics.count(answer)
        return pb_utils.InferenceResponse([to_tensor(spec.name, answer[spec.name][None]) for spec in OUTPUTS])

    def _refusal(self, outcome: str, error: Exception, code: Any) -> Any:
        self.metrics.requests(outcome)
        return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error), code))


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
    return {name: _alone(name, to_array(tensor)) for name, tensor in tensors.items() if tensor is not None}


def _alone(name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Without the leading dimension of 1."""
    if len(value) != 1:
        raise BadRequest(f"{name}: received {len(value)} requests in one, expected a leading dimension of 1")
    return value[0]


class Metrics:
    """Counters on Triton's own metrics port."""

    def __init__(self) -> None:
        counter = pb_utils.MetricFamily.COUNTER
        self._families = [
            pb_utils.MetricFamily("freshrank_ranking_requests_total", "Requests by outcome", counter),
            pb_utils.MetricFamily("freshrank_ranking_candidates_total", "Ranked candidates by kind", counter),
        ]
        outcomes = ("ok", "degraded", "refused", "unpublished", "failed")
        kinds = ("warm", "cold", "unknown")
        self._requests = {o: self._families[0].Metric(labels={"outcome": o}) for o in outcomes}
        self._candidates = {k: self._families[1].Metric(labels={"kind": k}) for k in kinds}

    def requests(self, outcome: str) -> None:
        self._requests[outcome].increment(1)

    def count(self, answer: Tensors) -> None:
        self.requests("degraded" if answer["degraded"][0] else "ok")
        kinds = np.where(answer["known"], np.where(answer["cold"], "cold", "warm"), "unknown")
        for kind, number in Counter(kinds.tolist()).items():
            self._candidates[kind].increment(number)
