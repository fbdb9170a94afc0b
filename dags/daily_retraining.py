"""Retrain the ranker on yesterday's log, and serve it if it deserves to.

**Owner**: ranking. **Runs** every day at 00:00 UTC; the run for day D uses the log up to D-1.

A run that ends *green with `confirm_served` skipped* deployed nothing: the gate said "rejected" or "not enough
evidence", the champion still serves, and the verdict with its reasons stands in the log of `train_ranker`. That is
a normal day. The asset `ranker` is updated only by a run that deployed.

When a task is red:

| task | look at | usual cause |
|---|---|---|
| `wait_for_partition` | the days its log lists | the export of the log is late |
| `historical_features` | its log | a table breaks the contract of `schema.yaml` |
| `validate` | `runs/<dataset>/<date>/validation/` of the workspace | a broken export; mend the data, clear the task |
| `materialize` | its log | the online store is down or locked: it retries by itself, unless the password is wrong |
| `train_ranker` | step and reason at the end of its log; "Kubeflow run" | as it says; finished steps are not repeated |
| `confirm_served` | Triton | another run or a rollback moved the pointer |

Clearing any task is safe: every step is idempotent. Whoever clears or marks `train_ranker` while it waits for a
cluster cancels its run there. By hand, or for another day:
`airflow dags test daily_retraining 2024-01-31 -c '{"data": "path/of/an/imported/dataset"}'`.
"""

from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import Asset, Param, PokeReturnValue, chain, dag, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from freshrank.components import build
from freshrank.orchestration.airflow.operator import KubeflowPipelineOperator, data_directory, final_errors, run_config

RANKER = Asset("ranker")

DATA = "{{ params.data or '' }}"
RUN_DATE = "{{ params.date or (logical_date or dag_run.run_after).strftime('%Y-%m-%d') }}"
LOG: dict[str, Any] = {"data": DATA, "run_date": RUN_DATE}

PARAMS = {
    "data": Param(None, type=["null", "string"], description="Imported data directory; FRESHRANK_DATASET if empty."),
    "date": Param(None, type=["null", "string"], format="date", description="Run date D; the logical date if empty."),
    "recipe": Param("", type="string", description="A name in freshrank/recipes.py; the default recipe if empty."),
    "overrides": Param([], type="array", items={"type": "string"}, description="section.field=value changes."),
    "wait": Param(True, type="boolean", description="Wait for a missing partition; if false, fail at once."),
}


@task.sensor(poke_interval=300, timeout=timedelta(hours=6).total_seconds(), mode="reschedule")
def wait_for_partition(data: str, run_date: str, params: dict[str, Any] | None = None) -> PokeReturnValue:
    from freshrank.orchestration.airflow.checks import missing_partition

    with final_errors():
        missing = missing_partition(data_directory(data), run_date)
    if missing and not (params or {})["wait"]:
        raise AirflowFailException(missing)
    print(missing or "the partition is there")
    return PokeReturnValue(is_done=missing is None)


@task
def historical_features(data: str, run_date: str, params: dict[str, Any] | None = None) -> None:
    from freshrank.pipeline import steps

    assert params is not None
    with final_errors():
        config = run_config(params["recipe"], params["overrides"])
        steps.build_features(data_directory(data), run_date, config.windows)


@task
def validate(data: str, run_date: str, params: dict[str, Any] | None = None) -> None:
    from freshrank.pipeline import steps
    from freshrank.pipeline.run import Run

    assert params is not None
    with final_errors():
        path, config = data_directory(data), run_config(params["recipe"], params["overrides"])
        folder = Run(path, run_date).directory / "validation"
        steps.validate(path, run_date, config.validation, folder)


@task
def materialize(data: str, run_date: str) -> None:
    from freshrank.pipeline import steps

    with final_errors():
        steps.materialize(data_directory(data), run_date)


@task(outlets=[RANKER])
def confirm_served(data: str, run_date: str) -> int:
    from freshrank.orchestration.airflow import checks
    from freshrank.pipeline.prune import prune_after_a_day

    with final_errors():
        path = data_directory(data)
        prune_after_a_day(path)
        version = checks.confirm_served(path, run_date)
    if version is None:
        raise AirflowSkipException("no model was deployed; the champion still serves")
    return version


@dag(
    schedule="@daily",
    # Airflow leaves out every task of a run dated earlier, and calls the run a success: old logs must not meet that.
    start_date=datetime(2000, 1, 1),
    catchup=False,
    max_active_runs=1,
    doc_md=__doc__,
    params=PARAMS,
    tags=["ranking"],
    default_args={
        "owner": "ranking",
        "retries": 2,
        "retry_delay": timedelta(seconds=20),
        "retry_exponential_backoff": 4.0,
        "max_retry_delay": timedelta(minutes=10),
    },
)
def daily_retraining() -> None:
    chain(
        wait_for_partition(**LOG),
        historical_features(**LOG),
        validate(**LOG),
        materialize(**LOG),
        KubeflowPipelineOperator(
            task_id="train_ranker",
            build=build,
            **LOG,
            recipe="{{ params.recipe }}",
            overrides="{{ params.overrides | tojson }}",
        ),
        confirm_served(**LOG),
    )


daily_retraining()
