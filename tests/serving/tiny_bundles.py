"""Bundles of a tiny ranker whose answers can be computed by hand: logits = (user + item) * weight."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from freshrank.bundle.golden import Tensors
from freshrank.storage.files import write_json

UTILITY = np.array([1.0, 0.5], dtype=np.float32)
SIGNATURE = {
    "inputs": [
        {"name": "user_vector", "dtype": "float32", "shape": [-1, 2]},
        {"name": "user_index", "dtype": "int64", "shape": [-1]},
        {"name": "item_vector", "dtype": "float32", "shape": [-1, 2]},
        {"name": "item_missing", "dtype": "bool", "shape": [-1]},
    ],
    "outputs": [
        {"name": "probabilities", "dtype": "float32", "shape": [-1, 2]},
        {"name": "score", "dtype": "float32", "shape": [-1]},
        {"name": "logits", "dtype": "float32", "shape": [-1, 2]},
    ],
}
ITEM_AGE = {"name": "item_age", "dtype": "float32", "shape": [-1]}
OUTPUTS = ["probabilities", "score", "logits"]


def request(rows: int = 3) -> Tensors:
    """One user, ``rows`` items, the last of which has no history."""
    missing = np.zeros(rows, dtype=np.bool_)
    missing[-1:] = True
    return {
        "user_vector": np.array([[0.5, -0.25]], dtype=np.float32),
        "user_index": np.zeros(rows, dtype=np.int64),
        "item_vector": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2) / 8,
        "item_missing": missing,
    }


def expected(inputs: Tensors, weight: float) -> Tensors:
    items = np.where(inputs["item_missing"][:, None], np.float32(0), inputs["item_vector"])
    logits = (inputs["user_vector"][inputs["user_index"]] + items) * np.float32(weight)
    probabilities = 1 / (1 + np.exp(-logits))
    return {"logits": logits, "probabilities": probabilities, "score": probabilities @ UTILITY}


def write_bundle(
    path: Path, weight: float, *, fingerprint: str = "", wrong_case: int | None = None, extra_input: bool = False
) -> Path:
    """A bundle of the ranker with ``weight``."""
    path.mkdir(parents=True)
    inputs = SIGNATURE["inputs"] + ([ITEM_AGE] if extra_input else [])
    onnx.save(_onnx(weight, inputs), path / "ranker.onnx")
    write_json(path / "signature.json", SIGNATURE | {"inputs": inputs})
    info = {"fingerprint": fingerprint or f"w{weight}", "run_date": "2022-05-01", "actions": ["click", "like"]}
    write_json(path / "bundle.json", info)
    save_file(_golden(weight, wrong_case, extra_input), path / "golden.safetensors")
    (path / "encoder.json").write_text("{}")
    return path


def _golden(weight: float, wrong_case: int | None, extra_input: bool) -> Tensors:
    tensors: Tensors = {}
    for number, rows in enumerate([3, 1]):
        inputs = request(rows)
        answer = expected(inputs, weight)
        if number == wrong_case:
            answer["score"] = answer["score"] + np.float32(0.1)
        if extra_input:
            inputs |= {"item_age": np.ones(rows, dtype=np.float32)}
        tensors |= {f"case{number}.in.{name}": value for name, value in inputs.items()}
        tensors |= {f"case{number}.out.{name}": np.ascontiguousarray(value) for name, value in answer.items()}
    return tensors


def _onnx(weight: float, inputs: list[dict]) -> onnx.ModelProto:
    constants = {
        "zero": np.array(0, dtype=np.float32),
        "one": np.array([1], dtype=np.int64),
        "weight": np.array(weight, dtype=np.float32),
        "utility": UTILITY,
    }
    nodes = [
        helper.make_node("Gather", ["user_vector", "user_index"], ["user"]),
        helper.make_node("Unsqueeze", ["item_missing", "one"], ["missing"]),
        helper.make_node("Where", ["missing", "zero", "item_vector"], ["item"]),
        helper.make_node("Add", ["user", "item"], ["sum"]),
        helper.make_node("Mul", ["sum", "weight"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["probabilities"]),
        helper.make_node("MatMul", ["probabilities", "utility"], ["score"]),
    ]
    graph = helper.make_graph(
        nodes,
        "ranker",
        [_value(spec) for spec in inputs],
        [_value(spec) for spec in SIGNATURE["outputs"]],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _value(spec: dict) -> onnx.ValueInfoProto:
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    shape = [None if size == -1 else size for size in spec["shape"]]
    return helper.make_tensor_value_info(spec["name"], types[spec["dtype"]], shape)
