"""An edit of code makes stale what depends on it, and nothing else: from the day's aggregates to the bench's costs."""

import ast
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from freshrank.bench.paper.costs import path_of_cost
from freshrank.bench.paper.evidence_data import EvidenceSource
from freshrank.bench.paper.task import Task, measures_of, predictions_of
from freshrank.config import (
    RunConfig,
    WindowConfig,
)
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.features.daily_aggregates import aggregates_fingerprint
from freshrank.features.frames import frame_path
from freshrank.features.hourly import hourly_fingerprints
from freshrank.features.snapshots import history_fingerprint
from freshrank.pipeline import steps
from freshrank.pipeline.run import Run
from freshrank.settings import settings
from freshrank.storage import derived
from freshrank.storage.files import write_json
from freshrank.training.shards import shards_directory

pytestmark = pytest.mark.integration

WORLD = WorldConfig(users=20, days=4, items_at_start=20, new_items_per_day=2, impressions_per_day=60)
RUN_DATE = WORLD.last_day + timedelta(days=1)
WINDOWS = WindowConfig(train_days=1)
CONFIG = RunConfig(windows=WINDOWS)

PARTS, SNAPSHOTS, HOURLY, FRAMES, SHARDS = "day aggregates", "snapshots", "hourly counters", "frames", "shards"
TRAIN, CALIBRATE, EVALUATE = "ranker", "bundle", "judgement"
PREDICTIONS, MEASURES, COSTS = "bench predictions", "bench measures", "bench costs"
BENCH = {PREDICTIONS, MEASURES, COSTS}
LEARNED = {TRAIN, CALIBRATE, EVALUATE, *BENCH}
FRAMED = {FRAMES, SHARDS, *LEARNED}
EVERYTHING = {PARTS, SNAPSHOTS, HOURLY, *FRAMED}

STALE: dict[tuple[str, str], set[str]] = {
    ("storage/files.py", "atomic_write"): EVERYTHING,
    ("datasets/dataset.py", "Dataset.partition"): EVERYTHING,
    ("schema.py", "Schema.select"): EVERYTHING,
    ("features/engines.py", "open_engine"): EVERYTHING - {HOURLY},
    ("features/daily_aggregates.py", "_engaged"): EVERYTHING - {HOURLY},
    ("features/snapshots.py", "item_snapshot"): {SNAPSHOTS, *FRAMED},
    ("features/hourly.py", "_seen"): {HOURLY, *FRAMED},
    ("features/store.py", "FeatureStore.offline_items"): FRAMED,
    ("features/encoder.py", "Encoder.inputs"): LEARNED,
    ("models/ranker.py", "Ranker.forward"): LEARNED,
    ("techniques/mixup.py", "mixup"): LEARNED,
    ("training/objective.py", "objective"): LEARNED,
    ("training/shards.py", "write_shards"): {SHARDS, TRAIN, CALIBRATE, EVALUATE},
    ("training/stream.py", "encoded_days"): {TRAIN, CALIBRATE, EVALUATE},
    ("export/calibration.py", "fit_platt"): {CALIBRATE, EVALUATE, *BENCH},
    ("export/onnx_export.py", "export_bundle"): {CALIBRATE, EVALUATE, COSTS},
    ("bundle/onnx_ranker.py", "OnnxRanker.score"): {CALIBRATE, EVALUATE, COSTS},
    ("evaluation/evaluate.py", "evaluate"): {EVALUATE, MEASURES},
    ("evaluation/gate.py", "judge"): {EVALUATE},
    ("reports/report.py", "write_report"): {EVALUATE},
    ("serving/repository.py", "ModelRepository.served"): {EVALUATE},
    ("pipeline/steps.py", "calibrate"): {CALIBRATE, EVALUATE},
    ("bench/paper/evidence_data.py", "load_evidence"): BENCH,
    ("bench/paper/task.py", "list_sums"): {MEASURES},
    ("bench/paper/costs.py", "_latency_ratio"): {COSTS},
}
"""By the function that is edited."""
UNUSED = {
    "bench/paper/page.py": "_costs",
    "cli/pipeline.py": "train",
    "datasets/kuairand.py": "import_kuairand",
    "orchestration/daily.py": "run",
    "pipeline/prune.py": "prune",
    "serving/ranking/service.py": "RankingService.rank",
    "settings.py": "settings",
    "validation/validate.py": "inspect_day",
}
"""Functions that no output of these depends on."""


@dataclass(frozen=True)
class World:
    """A dataset, and the folders of the ranker and the bundle that steps would be given."""

    data: Path
    trained: Path
    bundle: Path

    def fingerprints(self) -> dict[str, str]:
        """By output, as those who build or read it ask for it."""
        run, day = Run(self.data, RUN_DATE.isoformat()), WORLD.last_day
        task = partial(Task, seed=0, config=CONFIG, source=EvidenceSource(self.data, RUN_DATE, WINDOWS))
        baseline, row = task(row="baseline"), task(row="residual")
        return {
            PARTS: aggregates_fingerprint(run.dataset, day),
            SNAPSHOTS: history_fingerprint(run.dataset, day),
            HOURLY: hourly_fingerprints(run.dataset, [day])[day],
            FRAMES: frame_path(run.dataset, run.workspace, day).name,
            SHARDS: shards_directory(run.dataset, run.workspace, day, 1000).name,
            **self._steps(),
            PREDICTIONS: predictions_of(row).name,
            MEASURES: str(measures_of(row)),
            COSTS: str(path_of_cost(row, baseline, 1)),
        }

    def _steps(self) -> dict[str, str]:
        """Of each by what the one before it leaves behind."""
        asked = (self.data, RUN_DATE.isoformat(), WINDOWS)
        train = steps.train_inputs(*asked, CONFIG.model, CONFIG.techniques, CONFIG.training)[-1]
        write_json(self.trained / "key.json", {"key": train, "config": {}})
        calibrate = steps.calibrate_inputs(*asked, CONFIG.calibration, self.trained)[-1]
        write_json(self.bundle / "bundle.json", {"fingerprint": calibrate})
        return {
            TRAIN: train,
            CALIBRATE: calibrate,
            EVALUATE: steps.evaluate_inputs(*asked, CONFIG.evaluation, CONFIG.gate, self.bundle)[-1],
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("staleness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRESHRANK_HOME", str(path / "home"))
        settings.cache_clear()
        yield World(simulate(path / "data", WORLD).path, path / "trained", path / "bundle")
    settings.cache_clear()


@pytest.fixture(scope="module")
def before(world: World) -> dict[str, str]:
    return world.fingerprints()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, whose code counts from now on."""
    shutil.copytree(derived.SOURCES, tmp_path / "freshrank", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(derived, "SOURCES", tmp_path / "freshrank")
    return tmp_path / "freshrank"


def edit(path: Path, name: str) -> None:
    """Add a statement to the function ``name``, or to the method ``Class.name``."""
    source = path.read_text()
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        node = next(each for each in ast.iter_child_nodes(node) if getattr(each, "name", None) == part)
    assert isinstance(node, ast.FunctionDef)
    lines = source.splitlines()
    lines.insert(node.body[-1].lineno - 1, " " * node.body[-1].col_offset + "edited = True")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("file", "function"), STALE)
def test_an_edited_function_makes_every_output_stale_that_depends_on_it_and_no_other(
    world: World, before: dict[str, str], sources: Path, file: str, function: str
) -> None:
    """In every package that contributes to a result."""
    edit(sources / file, function)
    after = world.fingerprints()
    assert {output for output in before if after[output] != before[output]} == STALE[file, function]


def test_edits_of_what_no_output_depends_on_leave_everything_current(
    world: World, before: dict[str, str], sources: Path
) -> None:
    """What shows, starts, checks or serves a result, or says where it lies."""
    for file, function in UNUSED.items():
        edit(sources / file, function)
    assert world.fingerprints() == before


def test_reworded_comments_docstrings_and_another_layout_leave_everything_current(
    world: World, before: dict[str, str], sources: Path
) -> None:
    """In all files at once: comments and layout are lost, and every docstring says something else."""
    for path in sources.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                node.value.value = "Reworded."
        path.write_text("# A comment.\n" + ast.unparse(tree))
    assert world.fingerprints() == before
