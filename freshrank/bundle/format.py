"""A version bundle: the directory the export step writes and Triton serves.

``ranker.onnx``          the calibrated ranker
``signature.json``       ``{"inputs": [{"name", "dtype", "shape"}], "outputs": [...]}``, -1 for a dynamic dimension
``golden.safetensors``   requests and their expected answers: ``in.<name>``, ``out.<name>``; several cases are
                         numbered ``case0.in.<name>``, ``case1.in.<name>``, ...
``bundle.json``          at least ``fingerprint`` and ``run_date``, and ``dataset`` where it comes with an encoder;
                         anything else the online side needs
Other files (encoders) are copied along untouched.
"""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from freshrank.bundle.golden import Tensors, golden_cases
from freshrank.errors import ServingError

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
