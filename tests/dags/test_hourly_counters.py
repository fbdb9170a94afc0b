"""The hourly DAG: when it runs, what it waits for, and that pushing it twice is harmless."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from jinja2 import Environment, StrictUndefined

from freshrank.features.store import FeatureStore
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace
from tests.features.test_hourly import IMPRESSIONS, MORNING, NEW, SCHEMA
from tests.paths import PROJECT_ROOT
from tests.tiny_log import at, write_log

pytestmark = pytest.mark.integration

ORDER = ["wait_for_log", "push_counters"]


@pytest.fixture(scope="module")
def dag() -> Any:
    return DagBag(dag_folder=PROJECT_ROOT / "dags").dags["hourly_counters"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A log until 8:30 of day 3 whose features are registered; settings are read anew before and after."""
    monkeypatch.setenv("FRESHRANK_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    dataset = write_log(tmp_path / "data", MORNING, SCHEMA)
    FeatureStore(dataset, Workspace.of("tiny_log")).apply()
    yield dataset.path
    settings.cache_clear()


def test_it_runs_every_hour_one_at_a_time_and_makes_up_for_nothing(dag: Any) -> None:
    """Counters of hours that are over would never be read."""
    assert dag.timetable.expression == "0 * * * *"
    assert dag.catchup is False
    assert dag.max_active_runs == 1
    assert [task.task_id for task in dag.topological_sort()] == ORDER


def test_its_page_tells_what_to_do_about_every_task(dag: Any) -> None:
    """The docstring is what a person on call sees first."""
    assert "**Owner**" in dag.doc_md
    assert [name for name in ORDER if f"| `{name}` |" not in dag.doc_md] == []


def test_waiting_holds_no_worker_and_ends_before_the_next_hour(dag: Any) -> None:
    """A run that waited longer would push what nobody reads any more."""
    task = dag.get_task("wait_for_log")
    assert task.mode == "reschedule"
    assert timedelta(minutes=30) <= timedelta(seconds=task.timeout) < timedelta(hours=1)


@pytest.mark.parametrize(
    ("hour", "logical_date", "expected"),
    [
        ("2022-05-09T13:00:00+00:00", datetime(2024, 1, 31, 7, tzinfo=UTC), "2022-05-09T13:00:00+00:00"),
        (None, datetime(2024, 1, 31, 7, tzinfo=UTC), "2024-01-31T07:00:00+00:00"),
        (None, None, "2024-02-02T05:00:00+00:00"),
    ],
    ids=["param", "logical date", "triggered without a logical date"],
)
def test_the_hour_is_the_param_or_that_of_the_logical_date(
    dag: Any, hour: str | None, logical_date: datetime | None, expected: str
) -> None:
    """A run that was triggered at 5:40 pushes the hour that ended at 5:00."""
    (template,) = {dag.get_task(name).op_kwargs["hour"] for name in ORDER}
    dag_run = SimpleNamespace(run_after=datetime(2024, 2, 2, 5, 40, tzinfo=UTC))
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    context = {"params": SimpleNamespace(hour=hour), "logical_date": logical_date, "dag_run": dag_run}
    assert environment.from_string(template).render(context) == expected


def test_it_waits_while_the_log_has_not_come(dag: Any, data: Path) -> None:
    """The log ends at 8:30: the hour until 9:00 can be counted, the one until 10:00 is waited for."""
    wait = dag.get_task("wait_for_log").python_callable
    assert wait(str(data), at(3, 9).isoformat()).is_done
    assert not wait(str(data), at(3, 10).isoformat()).is_done


def test_pushing_an_hour_again_changes_nothing(dag: Any, data: Path) -> None:
    """Whoever clears the task gets the same store."""
    push = dag.get_task("push_counters").python_callable
    store = FeatureStore(write_log(data, MORNING, SCHEMA), Workspace.of("tiny_log"))
    for _ in range(2):
        assert push(str(data), at(3, 9).isoformat()) == 1
        assert store.online_items([NEW], at(3, 9.5))[IMPRESSIONS].to_list() == [3]
