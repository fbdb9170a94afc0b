"""A day's retraining as one call: with Airflow (`freshrank demo`) or without (`freshrank run`)."""

import logging
from datetime import date
from pathlib import Path

from rich.console import Console

from freshrank.config import RunConfig
from freshrank.orchestration.kubeflow.arguments import PipelineBuilder
from freshrank.pipeline import steps
from freshrank.pipeline.prune import prune_after_a_day
from freshrank.pipeline.run import Run

log = logging.getLogger(__name__)


def run(build: PipelineBuilder, data: Path, run_date: date, config: RunConfig, console: Console | None = None) -> None:
    """Features, validation, Feast, then the Kubeflow pipeline of ``build``: what the DAG does, in this process.

    With a ``console`` each step is named on it and the pipeline's output goes to its log alone.
    """
    from freshrank.orchestration.kubeflow.local import run_pipeline

    def progress(step: str) -> None:
        if console:
            console.log(step)

    windows, day = config.windows, run_date.isoformat()
    progress("historical features")
    steps.build_features(data, day, windows)
    progress("validate")
    steps.validate(data, day, config.validation, Run(data, day).directory / "validation")
    progress("materialize")
    steps.materialize(data, day)
    run_pipeline(build, data, run_date, config, (lambda step: progress(f"  pipeline step {step}")) if console else None)
    prune_after_a_day(data)
