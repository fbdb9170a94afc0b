"""Triton Python model ``ranker``: what the onnxruntime backend does, for a server that has none.

``initialize`` sends one golden case through the very conversions a request goes through, and refuses to load
when the answer is not the golden one.
"""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils

from freshrank.bundle.golden import GoldenCase, difference, golden_cases
from freshrank.serving.cpu import usable_cores
from freshrank.serving.ranking.tensors import to_array, to_tensor

TOLERANCE = 1e-5


class TritonPythonModel:
    """Answers ``{inputs of signature.json} -> {outputs of signature.json}``."""

    def initialize(self, args: dict[str, str]) -> None:
        directory = Path(args["model_repository"]) / args["model_version"]
        parameters = json.loads(args["model_config"])["parameters"]
        # Written and checked by freshrank.bundle.format, whose import would take the processor from requests.
        signature = json.loads((directory / "signature.json").read_text())
        self.inputs, self.outputs = ([spec["name"] for spec in signature[side]] for side in ("inputs", "outputs"))
        self.session = _session(directory / "ranker.onnx", int(parameters["threads"]["string_value"]))
        self._refuse_wrong_answers(golden_cases(directory)[0])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [pb_utils.InferenceResponse(self._answer(_tensors(request, self.inputs))) for request in requests]

    def _answer(self, tensors: dict[str, Any]) -> list[Any]:
        feed = {name: to_array(tensor) for name, tensor in tensors.items()}
        values = self.session.run(self.outputs, feed)
        return [to_tensor(name, value) for name, value in zip(self.outputs, values, strict=True)]

    def _refuse_wrong_answers(self, case: GoldenCase) -> None:
        tensors = {name: to_tensor(name, value) for name, value in case.inputs.items()}
        answer = {tensor.name(): to_array(tensor) for tensor in self._answer(tensors)}
        problem = difference(case.outputs, answer, TOLERANCE)
        if problem:
            raise pb_utils.TritonModelException(f"self-check: golden case 0: {problem}")


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    # Several versions are loaded at once: idle pools that spin would take the cores of the one that answers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _tensors(request: Any, names: list[str]) -> dict[str, Any]:
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    missing = [name for name, tensor in tensors.items() if tensor is None]
    if missing:
        raise pb_utils.TritonModelException(f"inputs missing: {missing}; this version expects {names}")
    return tensors
