"""`freshrank demo`: one daily run, then a ranking."""

import logging
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
from rich.console import Console

from freshrank.datasets.dataset import Dataset
from freshrank.dates import midnight, parse_day
from freshrank.errors import ServingError
from freshrank.pipeline import steps
from freshrank.pipeline.run import Run
from freshrank.recipes import DEFAULT_RECIPE
from freshrank.schema import ITEM_ID, USER_ID

if TYPE_CHECKING:
    from freshrank.datasets.kuairand import Protocol
    from freshrank.reports.report import RunSummary
    from freshrank.serving.client import Answer
from freshrank.cli.terminal import ranking_table
from freshrank.datasets.prepare import prepare

log = logging.getLogger(__name__)
UNKNOWN_CANDIDATES = 5


def demo(data: Path | None, day: str | None, protocol: "Protocol", console: Console) -> "RunSummary":
    """The daily run through Airflow, then a ranking request to the server it published to."""
    from freshrank.orchestration.airflow.home import run_dag

    path = prepare(data, protocol).resolve()
    dataset = Dataset.open(path)
    run_date = parse_day(day) if day else dataset.days[-1] + timedelta(days=1)
    console.print(f"data: {path} ({dataset.schema.name}), run date {run_date}", soft_wrap=True)
    start_server(path, console)
    conf = {"data": str(path), "date": run_date.isoformat(), "recipe": DEFAULT_RECIPE, "wait": False}
    run_dag(run_date, conf, Run(path, run_date.isoformat()).directory / "airflow.log")
    _show_ranking(dataset, run_date, console)
    return steps.summary(path, run_date.isoformat())


def start_server(data: Path, console: Console) -> None:
    """Start the local Triton of ``data`` and say so."""
    from freshrank.serving.deploy.local import start

    status, stopped = start(data)
    for dataset in stopped:
        console.print(f"stopped the Triton of dataset '{dataset}', which held the same ports")
    console.print(status.sentence())


def _show_ranking(dataset: Dataset, run_date: date, console: Console) -> None:

    try:
        user, answer = ask_for_ranking(dataset, run_date)
    except ServingError as error:
        console.print(f"no ranking was asked for: {error}")
        return
    known = sum(row["known"] for row in answer.rows())
    console.print(
        f"\nranked {len(answer.rows())} candidates for user {user}; {len(answer.rows()) - known} of them are "
        "unknown items. The best five:"
    )
    console.print(ranking_table(answer, top=5))
    best = ",".join(str(row["item"]) for row in answer.rows()[:5])
    console.print(
        f"ask again: freshrank rank --data {dataset.path} --user {user} --candidates {best} "
        f"--at {request_time(dataset, run_date).isoformat()}",
        soft_wrap=True,
    )


def ask_for_ranking(dataset: Dataset, run_date: date, candidates: int = 100) -> tuple[int, "Answer"]:
    """Ask the served model to rank items of the catalog and unknown ones for the user seen last."""
    from freshrank.serving.client import Client

    last = dataset.impressions([dataset.days[-1]]).select(USER_ID).tail(1).collect()
    user = int(last[USER_ID][0])
    at = request_time(dataset, run_date)
    known = _catalog(dataset, at).head(candidates - UNKNOWN_CANDIDATES)
    unknown = [int(dataset.items()[ITEM_ID].max() or 0) + 1 + i for i in range(UNKNOWN_CANDIDATES)]  # type: ignore[arg-type]
    with Client.for_dataset(dataset.path) as client:
        return user, client.rank_ids(user, [*known, *unknown], at=at)


def request_time(dataset: Dataset, run_date: date) -> datetime:
    """Noon of the run's date: the demo's log may be years old, and an item's age is part of its score."""
    return midnight(run_date, dataset.schema.utc_offset_hours) + timedelta(hours=12)


def _catalog(dataset: Dataset, at: datetime) -> pl.Series:
    """Ids of existing items, the youngest first."""
    return dataset.items().filter(pl.col("created_at") < at).sort("created_at", ITEM_ID, descending=True)[ITEM_ID]
