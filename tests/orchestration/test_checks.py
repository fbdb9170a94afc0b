"""The DAG's first and last question: is yesterday's log there, and does what was deployed really serve?"""

from pathlib import Path
from typing import Any

import pytest

from freshrank.errors import ServingError
from freshrank.orchestration.checks import confirm_served, missing_partition
from freshrank.serving.local import repository
from freshrank.serving.repository import Pointer
from freshrank.steps import Run
from freshrank.storage import write_json

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
