"""What the DAGs ask: is the log there, of yesterday or of the last hour, and does what was deployed really serve?"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from freshrank.errors import ServingError
from freshrank.orchestration.airflow.checks import confirm_served, missing_hour, missing_partition
from freshrank.pipeline.run import Run
from freshrank.serving.deploy.local import repository
from freshrank.serving.repository import Pointer
from freshrank.storage.files import write_json
from tests.features.test_hourly import MORNING, hourly_log_schema
from tests.tiny_log import at, day, impression, write_log

RUN_DATE = "2024-01-06"


def finish(world: Path, **facts: Any) -> None:
    """Leave what the steps of a finished run leave."""
    directory = Run(world, RUN_DATE).directory
    write_json(directory / "verdict.json", {"reasons": []})
    write_json(directory / "run.json", {"verdict": "blessed", "served_version": 4, "deployed": True} | facts)


def serve(world: Path, version: int, run_date: str = RUN_DATE) -> None:
    pointer = Pointer(version=version, run_date=run_date, fingerprint="f")
    write_json(repository(world).pointer_path, pointer.model_dump(mode="json"))


@pytest.fixture
def no_triton(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 1."""
    monkeypatch.setenv("FRESHRANK_TRITON_GRPC_PORT", "1")


def test_an_hour_is_waited_for_until_its_delay_is_over(tmp_path: Path) -> None:
    """However early a run is started: what it pushed would stand before it can be known."""
    data = write_log(tmp_path / "data", MORNING, hourly_log_schema(hourly_delay_minutes=10)).path
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    assert "are due at" in str(missing_hour(data, hour.isoformat()))
    assert missing_hour(data, at(3, 9).isoformat()) is None


def test_where_the_log_comes_by_the_hour_a_day_is_there_when_its_last_hour_is(tmp_path: Path) -> None:
    """The partition of day 3 holds its morning only: the run for day 4 waits, and no longer once 23:10 is there."""
    morning = write_log(tmp_path / "morning", MORNING, hourly_log_schema()).path
    assert "import the log up to" in str(missing_partition(morning, day(4).isoformat()))
    whole = [*MORNING, impression(3, 1, 1, hour=23 + 10 / 60)]
    assert missing_partition(write_log(tmp_path / "whole", whole, hourly_log_schema()).path, day(4).isoformat()) is None
    assert missing_partition(write_log(tmp_path / "plain", MORNING).path, day(4).isoformat()) is None


def test_the_partition_of_the_day_before_is_there(world: Path) -> None:
    """The run for D needs the log of D-1 and not that of D."""
    assert missing_partition(world, "2024-01-07") is None


def test_a_missing_partition_is_named_with_what_there_is(world: Path) -> None:
    """The log of the sensor says what it waits for."""
    message = missing_partition(world, "2024-01-08")
    assert message is not None
    assert "partition of 2024-01-07" in message
    assert "2024-01-01 .. 2024-01-06" in message


@pytest.mark.parametrize(
    "facts",
    [
        {"verdict": "rejected", "deployed": False},
        {"verdict": "not_enough_evidence", "deployed": True},
        {"deployed": False},
    ],
    ids=["rejected", "what was judged again serves already", "blessed, but a later run serves"],
)
def test_a_run_that_deployed_nothing_confirms_nothing(world: Path, no_triton: None, facts: dict[str, Any]) -> None:
    """The server is not even asked."""
    finish(world, **facts)
    assert confirm_served(world, RUN_DATE) is None


def test_a_pointer_that_moved_since_is_an_error(world: Path, no_triton: None) -> None:
    """Both versions are named, and the run the other one is of."""
    finish(world)
    serve(world, 5, "2024-01-09")
    with pytest.raises(ServingError, match=r"version 4 .* version 5 of the run for 2024-01-09"):
        confirm_served(world, RUN_DATE)


def test_a_server_that_is_away_is_an_error(world: Path, no_triton: None) -> None:
    """A pointer on disk serves nobody."""
    finish(world)
    serve(world, 4)
    with pytest.raises(ServingError):
        confirm_served(world, RUN_DATE)
