"""What the DAGs ask: is the log there, of yesterday or of the last hour, and does what was deployed really serve?"""

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

from freshrank.datasets.dataset import Dataset
from freshrank.dates import midnight, parse_day, parse_instant
from freshrank.errors import DataError, ServingError
from freshrank.features.hourly import delay, require_log
from freshrank.orchestration.kubeflow.arguments import outcome
from freshrank.serving.deploy.local import repository
from freshrank.serving.deploy.replicas import Replicas
from freshrank.serving.repository import RANKER
from freshrank.serving.triton import TritonClient

log = logging.getLogger(__name__)


def missing_partition(data: Path, run_date: str) -> str | None:
    """Which day the run for ``run_date`` still waits for, with what the log holds; None when it is there."""
    last_day = parse_day(run_date) - timedelta(days=1)
    dataset = Dataset.open(data)
    days = dataset.days
    if last_day in days:
        # Where the log comes by the hour, a day's partition is there long before its last hour.
        end = midnight(parse_day(run_date), dataset.schema.utc_offset_hours)
        return _not_reached(dataset, end) if dataset.schema.history.hourly else None
    held = f"{days[0]} .. {days[-1]}" if days else "no day"
    return f"the run for {run_date} needs the partition of {last_day}; the log in {data} holds {held}"


def missing_hour(data: Path, hour: str) -> str | None:
    """What the counters of ``hour`` (ISO 8601) wait for, the end of their delay or the log; None when they can be."""
    dataset, instant = Dataset.open(data), parse_instant(hour)
    due = instant + delay(dataset.schema)
    if datetime.now(UTC) < due:
        return f"the counters of {instant} are due at {due}"
    return _not_reached(dataset, instant)


def _not_reached(dataset: Dataset, end: datetime) -> str | None:
    try:
        require_log(dataset, end)
    except DataError as error:
        return str(error)
    return None


def confirm_served(data: Path, run_date: str) -> int | None:
    """The version this run deployed, once pointer and Triton agree that it serves; None when it deployed none.

    A blessed run deploys nothing where a later run already serves, or where somebody rolled its version back.
    Raises ServingError where they do not agree.
    """
    result = outcome(data, run_date)
    log.info("verdict=%s served_version=%s reasons=%s", result["verdict"], result["served_version"], result["reasons"])
    if result["verdict"] != "blessed" or not result["deployed"]:
        return None
    pointer, version = repository(data).served(), result["served_version"]
    if pointer is None or pointer.version != version:
        served = "nothing" if pointer is None else f"version {pointer.version} of the run for {pointer.run_date}"
        raise ServingError(f"the run for {run_date} left version {version} serving, but the pointer names {served}")
    for address in Replicas.configured().listening():
        with TritonClient(address) as client:
            if not client.is_model_ready(RANKER, pointer.version):
                raise ServingError(
                    f"the pointer names {RANKER} {pointer.version}, but Triton at {client.url} has not got it"
                )
    return pointer.version
