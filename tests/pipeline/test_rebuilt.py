"""A workspace that was built by other code, or by an older release: what is stale in it is built again."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from freshrank.config import (
    CalibrationConfig,
    EvaluationConfig,
    GateConfig,
    ModelConfig,
    TechniquesConfig,
    TrainingConfig,
    WindowConfig,
)
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.errors import MissingArtifact
from freshrank.pipeline import steps
from freshrank.pipeline.run import Run
from freshrank.settings import settings
from freshrank.storage import derived
from freshrank.storage.files import read_json, write_json
from tests.storage.test_staleness import edit

pytestmark = pytest.mark.integration

WORLD = WorldConfig(users=80, days=4, items_at_start=60, new_items_per_day=8, impressions_per_day=400)
RUN_DATE = WORLD.last_day + timedelta(days=1)
WINDOWS = WindowConfig(train_days=1)
SMALL = ModelConfig(item_id_dim=4, categorical_dim=4, sequence_dim=8, group_dim=8, mlp=(8,), expert_dim=8)
TRAINING = TrainingConfig(batch_size=256, min_steps=1, device="cpu")
AGGREGATES, SNAPSHOTS, FRAMES = "day aggregates", "snapshots", "frames"
RANKER, BUNDLE, JUDGEMENT = "ranker", "bundle", "judgement"
OLD = "0123456789abcdef"


@dataclass(frozen=True)
class Day:
    """A run up to its judgement, step by step as the command line does it."""

    data: Path
    out: Path

    @property
    def run(self) -> Run:
        return Run(self.data, RUN_DATE.isoformat())

    def build(self) -> None:
        self.features()
        self.train()
        self.calibrate()
        self.evaluate()

    def features(self) -> None:
        steps.build_features(self.data, RUN_DATE.isoformat(), WINDOWS)

    def train(self) -> None:
        sections = (WINDOWS, SMALL, TechniquesConfig(), TRAINING)
        steps.train(self.data, RUN_DATE.isoformat(), *sections, self.out / "train")

    def calibrate(self) -> None:
        sections = (WINDOWS, CalibrationConfig(min_positives=1))
        steps.calibrate(self.data, RUN_DATE.isoformat(), *sections, self.out / "train", self.out / "bundle")

    def evaluate(self) -> None:
        sections = (WINDOWS, EvaluationConfig(bootstrap=20), GateConfig())
        steps.evaluate(self.data, RUN_DATE.isoformat(), *sections, self.out / "bundle", self.out / "evaluation")

    def written(self) -> dict[str, int]:
        """By output, when the newest of its files was written."""
        space = self.run.workspace
        files = {
            AGGREGATES: space.features.glob("daily/*/*.parquet"),
            SNAPSHOTS: space.features.glob("[iu]*/*/*.parquet"),
            FRAMES: space.frames.glob("*/*"),
            RANKER: space.steps.glob("train/*/*"),
            BUNDLE: space.steps.glob("calibrate/*/*"),
            JUDGEMENT: space.steps.glob("evaluate/*/*"),
        }
        return {output: max(path.stat().st_mtime_ns for path in paths) for output, paths in files.items()}

    def built_since(self, before: dict[str, int]) -> set[str]:
        after = self.written()
        return {output for output in before if after[output] > before[output]}

    def age(self) -> None:
        """As if an older release had written it: markers were bare fingerprints, a ranker's key all that it was made
        of, and each fingerprint another one."""
        space = self.run.workspace
        for marker in space.features.glob("built/*.json"):
            write_json(marker, OLD)
        for marker in space.features.glob("daily/*/built.json"):
            write_json(marker, read_json(marker) | {"fingerprint": OLD, "late": 2})
        for folder in [*space.frames.iterdir(), *space.steps.glob("*/*")]:
            name, key = folder.name[: -len(OLD)], folder.name[-len(OLD) :]
            folder.rename(folder.with_name(name + key[::-1]))
        kept = read_json(self.out / "train" / "key.json")
        kept["config"]["training"] |= {"precision": "auto", "compile": "auto"}
        write_json(self.out / "train" / "key.json", kept | {"key": {"days": [RUN_DATE], "code": OLD}})


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    path = tmp_path_factory.mktemp("day")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRESHRANK_HOME", str(path / "home"))
        settings.cache_clear()
        yield Day(simulate(path / "data", WORLD).path, path / "out")
    settings.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "function", "stale"),
    [
        ("cli/pipeline.py", "train", set()),
        ("evaluation/gate.py", "judge", {JUDGEMENT}),
        ("features/snapshots.py", "item_snapshot", {SNAPSHOTS, FRAMES, RANKER, BUNDLE, JUDGEMENT}),
    ],
)
def test_what_an_edit_makes_stale_is_built_again_and_nothing_else(
    day: Day, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, function: str, stale: set[str]
) -> None:
    """The edit is one of a copy of the package, whose code counts from then on."""
    day.build()
    before = day.written()
    sources = tmp_path / "freshrank"
    shutil.copytree(derived.SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    edit(sources / file, function)
    monkeypatch.setattr(derived, "SOURCES", sources)
    day.build()
    assert day.built_since(before) == stale


@pytest.mark.slow
def test_a_workspace_of_an_older_release_says_what_to_run_and_is_built_anew(day: Day) -> None:
    """The ranker that lies in the run's folder is calibrated as it is; how many rows came late is remembered."""
    day.build()
    day.age()
    before = day.written()
    with pytest.raises(MissingArtifact, match="run `freshrank features build` first"):
        day.train()
    day.features()
    day.calibrate()
    assert read_json(day.out / "bundle" / "bundle.json")["config"]["training"]["precision"] == "auto"
    day.build()
    assert day.built_since(before) == {AGGREGATES, SNAPSHOTS, FRAMES, RANKER, BUNDLE, JUDGEMENT}
    markers = day.run.workspace.features.glob("daily/*/built.json")
    assert {read_json(marker)["late"] for marker in markers} == {2}
    again = day.written()
    day.build()
    assert day.built_since(again) == set()
