"""A version bundle: the directory the export step writes and Triton serves.

``ranker.onnx``          the calibrated ranker
``signature.json``       ``{"inputs": [{"name", "dtype", "shape"}], "outputs": [...]}``, -1 for a dynamic dimension
``golden.safetensors``   requests and their expected answers: ``in.<name>``, ``out.<name>``; several cases are
                         numbered ``case0.in.<name>``, ``case1.in.<name>``, ...
``bundle.json``          at least ``fingerprint`` and ``run_date``, and ``dataset`` where it comes with an encoder;
                         anything else the online side needs
Other files (encoders) are copied along untouched.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import load_file

from freshrank.errors import ServingError

Tensors = dict[str, np.ndarray[Any, Any]]
Model = TypeVar("Model", bound=BaseModel)

REQUIRED_FILES = ("ranker.onnx", "signature.json", "golden.safetensors", "bundle.json")
TRITON_TYPES = {
    "float32": "FP32",
    "float64": "FP64",
    "float16": "FP16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
_GOLDEN_KEY = re.compile(r"(?:case(?P<case>\d+)\.)?(?P<side>in|out)\.(?P<name>.+)")


class TensorSpec(BaseModel):
    """Name, numpy dtype and shape (-1: any size) of one tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dtype: Literal["float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool"]
    shape: tuple[int, ...]

    @property
    def triton_type(self) -> str:
        return TRITON_TYPES[self.dtype]


class Signature(BaseModel):
    """What one version of the ranker takes and gives."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class BundleInfo(BaseModel):
    """The part of ``bundle.json`` that serving itself reads."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    fingerprint: str
    run_date: str
    dataset: str | None = None
    """Whose requests `ranking` answers with it; None where it has no encoder and is asked at `ranker` alone."""


@dataclass(frozen=True)
class GoldenCase:
    """One request and the answer every healthy server gives to it."""

    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)


def read_signature(bundle: Path) -> Signature:
    return _read(bundle / "signature.json", Signature)


def read_info(bundle: Path) -> BundleInfo:
    return _read(bundle / "bundle.json", BundleInfo)


def check_bundle(bundle: Path) -> BundleInfo:
    """Raise ServingError unless every file is there and the golden cases fit the signature."""
    missing = [name for name in REQUIRED_FILES if not (bundle / name).is_file()]
    if missing:
        raise ServingError(f"bundle {bundle} lacks {missing}; export the ranker again")
    signature = read_signature(bundle)
    for number, case in enumerate(golden_cases(bundle)):
        _check_names(bundle, number, "in", case.inputs, signature.inputs)
        _check_names(bundle, number, "out", case.outputs, signature.outputs)
    return read_info(bundle)


def golden_cases(bundle: Path) -> list[GoldenCase]:
    """All golden cases by number, at least one."""
    cases: dict[int, GoldenCase] = {}
    for key, tensor in load_file(bundle / "golden.safetensors").items():
        match = _GOLDEN_KEY.fullmatch(key)
        if not match:
            raise ServingError(f"{bundle}/golden.safetensors: key {key!r}, expected [case<i>.](in|out).<name>")
        case = cases.setdefault(int(match["case"] or 0), GoldenCase())
        (case.inputs if match["side"] == "in" else case.outputs)[match["name"]] = tensor
    if not cases:
        raise ServingError(f"{bundle}/golden.safetensors holds no case; nothing could be verified")
    return [cases[number] for number in sorted(cases)]


def enlarged(case: GoldenCase, size: int) -> GoldenCase | None:
    """``case`` with its candidates, in their order and again and again, up to ``size``; None unless it has several
    candidates of one user, which is when a leading dimension tells what belongs to a candidate."""
    count = max(len(value) for value in case.inputs.values())
    if count == 1 or any(len(value) not in (1, count) for value in case.inputs.values()):
        return None
    places = np.arange(size) % count
    inputs = {name: value if len(value) == 1 else value[places] for name, value in case.inputs.items()}
    return GoldenCase(inputs, {name: value[places] for name, value in case.outputs.items()})


def difference(expected: Tensors, answer: Tensors, tolerance: float) -> str | None:
    """Say in words how ``answer`` departs from ``expected``; None when it does not.

    A value that is not finite is always a departure: the ranker must answer every request with a finite score.
    """
    for name, value in expected.items():
        problem = _tensor_difference(value, answer.get(name), tolerance)
        if problem:
            return f"output {name!r} {problem}"
    return None


def _tensor_difference(
    expected: np.ndarray[Any, Any], answer: np.ndarray[Any, Any] | None, tolerance: float
) -> str | None:
    if answer is None:
        return "is missing"
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return f"is {answer.dtype}{answer.shape}, expected {expected.dtype}{expected.shape}"
    if not np.isfinite(answer).all():
        return f"has {np.count_nonzero(~np.isfinite(answer))} values that are not finite"
    largest = float(np.abs(answer.astype(np.float64) - expected).max(initial=0.0))
    return None if largest <= tolerance else f"differs by {largest:.3g}, tolerance {tolerance:g}"


def _check_names(bundle: Path, number: int, side: str, tensors: Tensors, specs: tuple[TensorSpec, ...]) -> None:
    expected = {spec.name for spec in specs}
    if set(tensors) != expected:
        raise ServingError(
            f"{bundle}: golden case {number} has {side}.{sorted(tensors)}, signature.json says {sorted(expected)}"
        )


def _read(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise ServingError(f"{path} cannot be read: {error}") from error
