"""The pipeline's arguments and outcome, for the local and the cluster runner alike."""

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Protocol

from freshrank.config import RunConfig, Section
from freshrank.datasets.dataset import Dataset
from freshrank.dates import days
from freshrank.errors import MissingArtifact
from freshrank.storage.files import read_json


class PipelineBuilder(Protocol):
    """Gives a pipeline with the parameters of :func:`arguments`, such as :func:`freshrank.components.build`."""

    def __call__(self, place: Callable[[Any], object] | None = None) -> Any:
        """A ``kfp`` component; ``place`` is called with every task, to say where it runs."""


def arguments(data: Path, run_date: date, config: RunConfig) -> dict[str, str]:
    """The pipeline's parameters: one per config section, so that a change reruns only the steps that read it."""
    sections = {name: value for name, value in config if isinstance(value, Section)}
    return {
        "data": str(data.resolve()),
        "run_date": run_date.isoformat(),
        "data_version": _data_version(data, run_date, config),
        **{name: section.model_dump_json() for name, section in sections.items()},
    }


def _data_version(data: Path, run_date: date, config: RunConfig) -> str:
    """Fingerprint of every day the run reads: its windows, and before them what the first history looks back on."""
    dataset = Dataset.open(data)
    first = config.windows.split(run_date).train[0] - timedelta(days=dataset.schema.lookback_days + 1)
    return dataset.fingerprint(list(days(first, run_date - timedelta(days=1))))


def outcome(data: Path, run_date: str) -> dict[str, Any]:
    """``run.json`` of the run, and ``reasons``: the sentences of the checks that did not pass.

    ``verdict``; ``served_version``, None where nothing serves; ``deployed``, whether that is this run's own model.
    """
    from freshrank.pipeline.run import Run

    directory = Run(data, run_date).directory
    if not (directory / "run.json").exists():
        raise MissingArtifact(f"{directory / 'run.json'}: not found, so the run for {run_date} was not judged")
    result: dict[str, Any] = read_json(directory / "run.json")
    reasons = read_json(directory / "verdict.json")["reasons"]
    return result | {"reasons": [reason["sentence"] for reason in reasons if not reason["passed"]]}
