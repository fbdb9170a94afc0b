"""The DAG's first and last question: is yesterday's log there, and does what was deployed really serve?"""

import logging
from datetime import timedelta
from pathlib import Path

from freshrank.clock import parse_day
from freshrank.datasets.contract import Dataset
from freshrank.errors import ServingError
from freshrank.orchestration.pipeline import outcome
from freshrank.serving.client import TritonClient
from freshrank.serving.local import repository
from freshrank.serving.repository import RANKER
from freshrank.settings import settings

log = logging.getLogger(__name__)


def missing_partition(data: Path, run_date: str) -> str | None:
    """Which day the run for ``run_date`` still waits for, with what the log holds; None when it is there."""
    last_day = parse_day(run_date) - timedelta(days=1)
    days = Dataset.open(data).days
    if last_day in days:
        return None
    held = f"{days[0]} .. {days[-1]}" if days else "no day"
    return f"the run for {run_date} needs the partition of {last_day}; the log in {data} holds {held}"


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
    with TritonClient(settings().triton_grpc_url) as client:
        if not client.is_model_ready(RANKER, pointer.version):
            raise ServingError(
                f"the pointer names {RANKER} {pointer.version}, but Triton at {client.url} has not got it"
            )
    return pointer.version
