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
from freshrank.serving.ranked import Ranked
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
        given = [_given(request) for request in requests]
        found = self.service.rank(given, [request.request_id() for request in requests])
        return [self._respond(each) for each in found]

    def _respond(self, found: Ranked | Exception) -> Any:
        if isinstance(found, Ranked):
            self.metrics.count(found.answer)
            return pb_utils.InferenceResponse([to_tensor(s.name, found.answer[s.name][None]) for s in OUTPUTS])
        outcome, code = _REFUSALS.get(type(found), ("failed", "INTERNAL"))
        if outcome == "failed":
            log.error("a request failed", exc_info=found)
        self.metrics.requests(outcome)
        return pb_utils.InferenceResponse([], pb_utils.TritonError(str(found), getattr(pb_utils.TritonError, code)))


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
