"""What the components need beside ``steps``: to read config sections from JSON, and to hand a step's numbers and pages
to Kubeflow's artifacts."""

import shutil
from pathlib import Path
from typing import Any, Protocol

from freshrank.config import ValidationConfig, parse_sections
from freshrank.pipeline import steps


class MetricsArtifact(Protocol):
    """What is used of ``kfp.dsl.Metrics``."""

    def log_metric(self, metric: str, value: float) -> None: ...


def log_metrics(metrics: MetricsArtifact, values: dict[str, Any]) -> None:
    """Log the numbers among ``values``; text, lists and missing values are left to the artifact's own files."""
    for name, value in values.items():
        if isinstance(value, (int, float)):
            metrics.log_metric(name, float(value))


def validate(data: str, run_date: str, validation: str, out: str, page: str) -> None:
    """``steps.validate``, its page shown in Kubeflow's interface also when validation fails."""
    try:
        steps.validate(data, run_date, ValidationConfig.model_validate_json(validation), out)
    finally:
        _show(Path(out) / "validation.html", page)


def calibrate(data: str, run_date: str, windows: str, calibration: str, ranker: str, out: str) -> dict[str, Any]:
    """``steps.calibrate``; its numbers."""
    sections = parse_sections({"windows": windows, "calibration": calibration})
    return steps.calibrate(data, run_date, **sections, model_dir=ranker, out=out)


def judge(
    data: str,
    run_date: str,
    windows: str,
    evaluation: str,
    gate: str,
    bundle: str,
    out: str,
    metrics: MetricsArtifact,
    page: str,
) -> str:
    """``steps.evaluate``, its numbers and report handed to Kubeflow; returns the verdict the gate branches on."""
    sections = parse_sections({"windows": windows, "evaluation": evaluation, "gate": gate})
    result = steps.evaluate(data, run_date, **sections, bundle=bundle, out=out)
    log_metrics(metrics, result)
    _show(Path(out) / "report.html", page)
    return str(result["verdict"])


def _show(source: Path, page: str) -> None:
    if source.exists():
        shutil.copyfile(source, page)
