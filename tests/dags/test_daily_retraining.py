"""The DAG: its order, what it promises to whoever is on call, and how little its file imports."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import AirflowFailException
from jinja2 import Environment, StrictUndefined
from redis.backoff import NoBackoff
from redis.retry import Retry

from freshrank.errors import ClusterUnreachable, ConfigError, PipelineFailed, ServingError, ValidationFailed
from freshrank.orchestration.airflow.operator import data_directory, final_errors, run_config
from freshrank.recipes import DEFAULT_RECIPE
from freshrank.settings import settings
from tests.paths import PROJECT_ROOT

pytestmark = pytest.mark.integration

DAGS = PROJECT_ROOT / "dags"
ORDER = ["wait_for_partition", "historical_features", "validate", "materialize", "train_ranker", "confirm_served"]


@pytest.fixture(scope="module")
def bag() -> DagBag:
    return DagBag(dag_folder=DAGS)


@pytest.fixture(scope="module")
def dag(bag: DagBag) -> Any:
    return bag.dags["daily_retraining"]


def test_every_dag_file_imports(bag: DagBag) -> None:
    """A file that does not import vanishes from Airflow with a note nobody reads."""
    assert bag.import_errors == {}
    assert sorted(bag.dags) == ["daily_retraining", "hourly_counters"]


@pytest.mark.parametrize("name", ["daily_retraining", "hourly_counters"])
def test_reading_a_dag_loads_nothing_heavy(name: str) -> None:
    """The DAG processor reads the file every few seconds."""
    heavy = ["torch", "pandas", "polars", "pyarrow", "kfp", "feast", "great_expectations", "ibis", "tritonclient"]
    code = f"""
import json, runpy, sys, time
import airflow.sdk
from airflow.sdk import dag
before, start = set(sys.modules), time.process_time()
runpy.run_path({str(DAGS / f"{name}.py")!r})
new = set(sys.modules) - before
print(json.dumps([[name for name in {heavy!r} if name in new], (time.process_time() - start) / start]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    loaded, ratio = json.loads(run.stdout.splitlines()[-1])
    assert loaded == []
    assert ratio < 1, "it takes longer than to start Python and import Airflow"


def test_a_log_of_years_ago_is_not_before_the_start_of_the_dag(dag: Any) -> None:
    """A run dated earlier would have no tasks and count as a success."""
    assert dag.start_date.year <= 2000


def test_tasks_run_in_the_order_of_the_design(dag: Any) -> None:
    """A chain: each task has the one before it as its only upstream."""
    assert [task.task_id for task in dag.topological_sort()] == ORDER
    assert [list(dag.get_task(name).upstream_task_ids) for name in ORDER] == [[], *([name] for name in ORDER[:-1])]


def test_one_run_a_day_and_one_at_a_time(dag: Any) -> None:
    """A DAG switched on late does not retrain the past; two days never race for the pointer."""
    assert dag.timetable.expression == "0 0 * * *"
    assert dag.catchup is False
    assert dag.max_active_runs == 1


def test_the_page_of_the_dag_tells_who_owns_it_and_what_to_do_about_every_task(dag: Any) -> None:
    """The docstring is what a person on call sees first."""
    assert "**Owner**" in dag.doc_md
    assert [name for name in ORDER if f"| `{name}` |" not in dag.doc_md] == []


def test_only_the_confirmation_updates_the_asset(dag: Any) -> None:
    """It is skipped on a day without deployment, and a skipped task updates nothing."""
    outlets = {task.task_id: [asset.name for asset in task.outlets] for task in dag.tasks if task.outlets}
    assert outlets == {"confirm_served": ["ranker"]}


def test_tasks_that_talk_to_servers_are_retried_with_backoff(dag: Any) -> None:
    """A pipeline that failed is final all the same (`final_errors`); a Kubeflow API that is away is not."""
    for name in ("materialize", "train_ranker", "confirm_served"):
        task = dag.get_task(name)
        assert task.retries == 2
        assert task.retry_exponential_backoff > 1


def test_waiting_holds_no_worker_and_ends(dag: Any) -> None:
    """An export that never comes turns the run red the same morning."""
    sensor = dag.get_task("wait_for_partition")
    assert sensor.mode == "reschedule"
    assert timedelta(hours=1) <= timedelta(seconds=sensor.timeout) < timedelta(days=1)


@pytest.mark.parametrize(
    ("date", "logical_date", "expected"),
    [
        ("2022-05-09", datetime(2024, 1, 31, tzinfo=UTC), "2022-05-09"),
        (None, datetime(2024, 1, 31, tzinfo=UTC), "2024-01-31"),
        (None, None, "2024-02-02"),
    ],
    ids=["param", "logical date", "triggered without a logical date"],
)
def test_the_run_date_is_the_param_or_the_logical_date(
    dag: Any, date: str | None, logical_date: datetime | None, expected: str
) -> None:
    """Every task renders the same template."""
    templates = {dag.get_task(name).op_kwargs["run_date"] for name in ORDER if name != "train_ranker"}
    (template,) = templates | {dag.get_task("train_ranker").run_date}
    dag_run = SimpleNamespace(run_after=datetime(2024, 2, 2, 5, tzinfo=UTC))
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    context = {"params": SimpleNamespace(date=date), "logical_date": logical_date, "dag_run": dag_run}
    assert environment.from_string(template).render(context) == expected


def test_an_error_that_only_a_person_can_mend_is_final() -> None:
    """The task fails at once; its message keeps the kind of error and its text."""
    with pytest.raises(AirflowFailException, match="ValidationFailed: 12 nulls"), final_errors():
        raise ValidationFailed("12 nulls")


@pytest.mark.parametrize("error", [ServingError("refused"), ConnectionError("no route")])
def test_a_server_that_is_away_is_worth_another_try(error: Exception) -> None:
    """Airflow retries what passes through unchanged."""
    with pytest.raises(type(error)), final_errors():
        raise error


def test_a_pipeline_that_failed_is_final_and_an_api_that_is_away_is_not() -> None:
    """On a cluster Kubeflow has retried the steps itself, locally they resume when the task is cleared."""
    with pytest.raises(AirflowFailException), final_errors():
        raise PipelineFailed("step 'train' failed")
    with pytest.raises(ClusterUnreachable), final_errors():
        raise ClusterUnreachable("503")


def test_a_redis_that_is_down_is_worth_another_try() -> None:
    """Its client's errors are no OSError; `materialize` lets them through."""
    with pytest.raises(redis.ConnectionError), final_errors():
        redis.Redis(port=1, retry=Retry(NoBackoff(), 0)).ping()


@pytest.mark.parametrize("error", [redis.AuthenticationError("WRONGPASS"), redis.ResponseError("unknown command")])
def test_a_redis_that_refuses_is_final(error: Exception) -> None:
    """A password does not mend itself."""
    with pytest.raises(AirflowFailException), final_errors():
        raise error


def test_a_registry_that_another_writer_holds_is_worth_another_try(tmp_path: Path) -> None:
    """SQLite says "database is locked", also where a library hands it on as an error of its own."""
    with closing(sqlite3.connect(tmp_path / "db")) as holder, closing(sqlite3.connect(tmp_path / "db")) as other:
        holder.execute("create table features (name)")
        holder.execute("begin exclusive")
        other.execute("pragma busy_timeout = 0")
        with pytest.raises(RuntimeError, match="write"), final_errors():
            try:
                other.execute("insert into features values ('age')")
            except sqlite3.OperationalError as error:
                raise RuntimeError("write") from error


def test_a_wrong_query_is_final() -> None:
    """The same kind of error of the same library, for ever."""
    final = pytest.raises(AirflowFailException, match="no such table")
    with closing(sqlite3.connect(":memory:")) as store, final, final_errors():
        store.execute("select * from features")


def test_the_data_directory_is_the_param_or_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Scheduled runs have no params; a run by hand may name other data."""
    monkeypatch.setenv("FRESHRANK_DATASET", str(tmp_path / "setting"))
    settings.cache_clear()
    assert data_directory("") == tmp_path / "setting"
    assert data_directory(str(tmp_path / "param")) == tmp_path / "param"


def test_without_param_and_setting_the_error_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever switched the DAG on learns what to set."""
    monkeypatch.delenv("FRESHRANK_DATASET", raising=False)
    settings.cache_clear()
    with pytest.raises(ConfigError, match=r"'data'.*FRESHRANK_DATASET"):
        data_directory("")


def test_an_empty_recipe_means_the_default_one() -> None:
    """The DAG file does not repeat its name."""
    assert run_config("", ["training.epochs=3"]).training.epochs == 3
    assert run_config("", []).recipe == DEFAULT_RECIPE


@pytest.fixture(autouse=True)
def _fresh_settings() -> Any:
    yield
    settings.cache_clear()
