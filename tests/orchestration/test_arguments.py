"""The pipeline's parameters: what changes when config or data change, and what a finished run leaves to read."""

import shutil
from datetime import date
from pathlib import Path

import pytest

from freshrank.config import TrainingConfig
from freshrank.datasets.layout import MANIFEST
from freshrank.errors import MissingArtifact
from freshrank.orchestration.kubeflow.arguments import arguments, outcome
from freshrank.pipeline.run import Run
from freshrank.recipes import recipe
from freshrank.storage.files import read_json, write_json

RUN_DATE = date(2024, 1, 6)


def test_one_changed_value_changes_one_parameter(world: Path) -> None:
    """So Kubeflow repeats only the steps that take it."""
    before = arguments(world, RUN_DATE, recipe())
    after = arguments(world, RUN_DATE, recipe(overrides=["training.epochs=2"]))
    assert {name for name in before if before[name] != after[name]} == {"training"}


def test_a_section_survives_the_way_through_its_parameter(world: Path) -> None:
    """A parameter is the section as JSON, nothing more."""
    config = recipe(overrides=["training.learning_rate=0.0125"])
    assert TrainingConfig.model_validate_json(arguments(world, RUN_DATE, config)["training"]) == config.training


@pytest.mark.parametrize(("day", "changed"), [("2024-01-05", True), ("2024-01-06", False)])
def test_the_data_version_knows_the_days_before_the_run_and_no_other(
    world: Path, tmp_path: Path, day: str, changed: bool
) -> None:
    """A repaired past day makes a new version; a day that came after the run date does not."""
    repaired = tmp_path / "repaired"
    shutil.copytree(world, repaired)
    manifest = read_json(repaired / MANIFEST)
    manifest["days"][day] = manifest["days"][day] | {"sha256": "0" * 64}
    write_json(repaired / MANIFEST, manifest)
    versions = [arguments(path, RUN_DATE, recipe())["data_version"] for path in (world, repaired)]
    assert (versions[0] != versions[1]) is changed


def test_a_run_that_was_not_judged_has_no_outcome(world: Path, home: Path) -> None:
    """The error names the file that is missing."""
    with pytest.raises(MissingArtifact, match=r"run\.json.*2024-01-06 was not judged"):
        outcome(world, RUN_DATE.isoformat())


def test_the_outcome_gives_the_checks_that_did_not_pass(world: Path, home: Path) -> None:
    """The reasons are sentences, for the log of whoever started the run."""
    directory = Run(world, RUN_DATE.isoformat()).directory
    checks = [{"sentence": "fresh is worse", "passed": False}, {"sentence": "overall holds", "passed": True}]
    write_json(directory / "verdict.json", {"verdict": "rejected", "reasons": checks})
    write_json(directory / "run.json", {"verdict": "rejected", "served_version": 3, "deployed": False})
    assert outcome(world, RUN_DATE.isoformat()) == {
        "verdict": "rejected",
        "served_version": 3,
        "deployed": False,
        "reasons": ["fresh is worse"],
    }
