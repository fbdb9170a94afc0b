"""Tell the ranker every hour how often new items were shown and liked since this morning's snapshot.

**Owner**: ranking. **Runs** at every full hour; the run for hour H counts the log of the 24 hours before H and pushes
it into the online store once H + `history.hourly_delay_minutes` is past. Switch it on where `schema.yaml` says
`history.hourly: true`, and import the log at least hourly: into the same directory, as for the daily run.

While it does not run, nothing breaks: counters end an hour after the next ones were due and read as missing from then
on, which the ranker knows from training. Nothing is made up for later: the next run pushes the newest hour.

When a task is red:

| task | look at | usual cause |
|---|---|---|
| `wait_for_log` | what its log says it waits for | the export of the log is late, or an hour had no impression |
| `push_counters` | its log | the online store is down: once it is back, the next run mends everything |

Clearing a task is safe: an hour pushed again gives the same store, and one earlier than the last is left out. By hand:
`freshrank features push --data DIR`, or for another hour
`airflow dags test hourly_counters 2024-01-31T13:00:00+00:00 -c '{"data": "path/of/an/imported/dataset"}'`.
"""

from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import Param, PokeReturnValue, chain, dag, task

from freshrank.orchestration.airflow.operator import data_directory, final_errors

HOUR = "{{ params.hour or (logical_date or dag_run.run_after).strftime('%Y-%m-%dT%H:00:00+00:00') }}"
LOG: dict[str, Any] = {"data": "{{ params.data or '' }}", "hour": HOUR}

PARAMS = {
    "data": Param(None, type=["null", "string"], description="Imported data directory; FRESHRANK_DATASET if empty."),
    "hour": Param(
        None, type=["null", "string"], format="date-time", description="Hour H; the logical date's if empty."
    ),
}


@task.sensor(poke_interval=60, timeout=timedelta(minutes=50).total_seconds(), mode="reschedule", retries=0)
def wait_for_log(data: str, hour: str) -> PokeReturnValue:
    from freshrank.orchestration.airflow.checks import missing_hour

    with final_errors():
        missing = missing_hour(data_directory(data), hour)
    print(missing or "the log is there")
    return PokeReturnValue(is_done=missing is None)


@task
def push_counters(data: str, hour: str) -> int:
    from freshrank.dates import parse_instant
    from freshrank.pipeline import steps

    with final_errors():
        return steps.push_hourly(data_directory(data), parse_instant(hour))


@dag(
    schedule="@hourly",
    # As in daily_retraining: a run dated earlier would have no tasks and count as a success.
    start_date=datetime(2000, 1, 1),
    catchup=False,
    max_active_runs=1,
    doc_md=__doc__,
    params=PARAMS,
    tags=["ranking"],
    default_args={"owner": "ranking", "retries": 2, "retry_delay": timedelta(seconds=20)},
)
def hourly_counters() -> None:
    chain(wait_for_log(**LOG), push_counters(**LOG))


hourly_counters()
