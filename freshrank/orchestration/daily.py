"""What the DAG's tasks need beside ``steps``: waiting for the log and confirming what serves. No Airflow here."""

import logging
from datetime import timedelta
from pathlib import Path

from freshrank import steps
from freshrank.clock import parse_day
from freshrank.config import RunConfig
from freshrank.datasets.contract import Dataset
from freshrank.errors import ServingError
from freshrank.serving.client import TritonClient
from freshrank.serving.repository import RANKER, ModelRepository
from freshrank.settings import settings
from freshrank.workspace import Workspace

log = logging.getLogger(__name__)


def missing_partition(data: str, run_date: str) -> str | None:
    """Which day the run for ``run_date`` still waits for, with what the log holds; None when it is there."""
    last_day = parse_day(run_date) - timedelta(days=1)
    days = Dataset.open(Path(data)).days
    if last_day in days:
        return None
    held = f"{days[0]} .. {days[-1]}" if days else "no day"
    return f"the run for {run_date} needs the partition of {last_day}; the log in {data} holds {held}"


def validate(data: str, run_date: str, config: RunConfig) -> None:
    """Validate the windows of ``config``; the page goes where a person looks after a run."""
    directory = Workspace.of(Dataset.open(Path(data)).schema.name).run(parse_day(run_date))
    steps.validate(data, run_date, config.windows.model_dump_json(), str(directory / "validation"))


def confirm_served(data: str, run_date: str) -> int | None:
    """The version this run deployed, once pointer and Triton agree that it serves; None when it deployed none.

    Raises ServingError where they do not agree.
    """
    summary = steps.summary(data, run_date)
    log.info("verdict=%s version=%s reasons=%s", summary["verdict"], summary["version"], summary["reasons"])
    if summary["verdict"] != "blessed":
        return None
    version = int(summary["version"])
    pointer = ModelRepository(Workspace.of(Dataset.open(Path(data)).schema.name).triton).served()
    if pointer is None or pointer.version != version:
        served = "nothing" if pointer is None else f"version {pointer.version} of the run for {pointer.run_date}"
        raise ServingError(f"the run for {run_date} deployed version {version}, but the pointer names {served}")
    with TritonClient(settings().triton_grpc_url) as client:
        if not client.is_model_ready(RANKER, version):
            raise ServingError(f"Triton at {client.url} does not serve {RANKER} version {version}, as the pointer says")
    return version
