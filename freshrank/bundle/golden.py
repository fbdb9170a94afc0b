"""The golden requests of a bundle and their answers. ``ranker`` imports this at each load: no pydantic, it costs more
than the rest."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from freshrank.errors import ServingError

Tensors = dict[str, np.ndarray[Any, Any]]

_GOLDEN_KEY = re.compile(r"(?:case(?P<case>\d+)\.)?(?P<side>in|out)\.(?P<name>.+)")


@dataclass(frozen=True)
class GoldenCase:
    """One request and the answer every healthy server gives to it."""

    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)


def golden_cases(bundle: Path) -> list[GoldenCase]:
    """All golden cases by number, at least one."""
    # Here, because the client of a web server takes Tensors from this module and needs no safetensors.
    from safetensors.numpy import load_file

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
