"""The steps of a run: which rows reach what is learned."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path

import pytest

from freshrank.config import CalibrationConfig, ModelConfig, TechniquesConfig, TrainingConfig, WindowConfig
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.features.snapshots import build_history
from freshrank.pipeline import steps
from freshrank.pipeline.run import Run
from freshrank.settings import settings
from freshrank.storage.files import read_json
from freshrank.storage.workspace import Workspace
from freshrank.training.shards import training_shards
from freshrank.training.stream import encoded_days
from freshrank.training.trained import DESCRIPTION
from tests.tiny_log import day, impression, log_schema, write_log

pytestmark = pytest.mark.integration

WORLD = WorldConfig(users=80, days=4, items_at_start=60, new_items_per_day=8, impressions_per_day=400)
RUN_DATE = WORLD.last_day + timedelta(days=1)
WINDOWS = WindowConfig(train_days=1)
SMALL = ModelConfig(item_id_dim=4, categorical_dim=4, sequence_dim=8, group_dim=8, mlp=(8,), expert_dim=8)
TRAINING = TrainingConfig(batch_size=256, min_steps=1, device="cpu")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A world of some 400 impressions a day, with the features of its days, under a home of its own."""
    yield made(tmp_path, monkeypatch)
    settings.cache_clear()


def made(path: Path, environment: pytest.MonkeyPatch) -> Run:
    environment.setenv("FRESHRANK_HOME", str(path / "home"))
    settings.cache_clear()
    data = simulate(path / "data", WORLD).path
    steps.build_features(data, RUN_DATE.isoformat(), WINDOWS)
    return Run(data, RUN_DATE.isoformat())


@contextmanager
def hidden(run: Run, days: Iterable[date]) -> Iterator[None]:
    """The log of ``days`` cannot be read."""
    moved = {run.dataset.partition(each): run.dataset.path / f"{each}.hidden" for each in days}
    for path, away in moved.items():
        path.rename(away)
    yield
    for path, away in moved.items():
        away.rename(path)


def trained(run: Run, out: Path) -> Path:
    """By the step, while the days of calibration and evaluation are away."""
    split = WINDOWS.split(RUN_DATE)
    sections = (WINDOWS, SMALL, TechniquesConfig(), TRAINING)
    with hidden(run, [*split.calibration, *split.evaluation]):
        steps.train(run.dataset.path, RUN_DATE.isoformat(), *sections, out)
    return out


def test_a_ranker_is_trained_without_the_log_of_the_days_that_calibrate_and_judge_it(run: Run, tmp_path: Path) -> None:
    """They are not there to be read."""
    facts = read_json(trained(run, tmp_path / "trained") / DESCRIPTION)["facts"]
    assert facts["rows"] == sum(map(run.dataset.rows, WINDOWS.split(RUN_DATE).train))


@pytest.mark.slow
def test_a_ranker_is_calibrated_without_the_log_of_the_days_that_judge_it(run: Run, tmp_path: Path) -> None:
    """The same for the evaluation day. Slow by the export of the graph."""
    ranker, config = trained(run, tmp_path / "trained"), CalibrationConfig(min_positives=1)
    with hidden(run, WINDOWS.split(RUN_DATE).evaluation):
        steps.calibrate(run.dataset.path, RUN_DATE.isoformat(), WINDOWS, config, ranker, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "ranker.onnx").exists()


def test_withheld_impressions_are_neither_trained_on_nor_in_a_vocabulary(tmp_path: Path) -> None:
    """Item 5 and the third user were shown and engaged in rows of usage 'evaluation' alone."""
    log = [impression(number, user, item, click=1, save=1) for number, user, item in [(1, 1, 1), (1, 2, 2), (2, 1, 2)]]
    log += [impression(number, 3, 5, click=1, save=1, hour=13, usage="evaluation") for number in (1, 2)]
    dataset, workspace, wanted = write_log(tmp_path / "data", log), Workspace.of("tiny_log", tmp_path), [day(1), day(2)]
    build_history(dataset, workspace, wanted)
    encoded = encoded_days(dataset, workspace, wanted, log_schema(), 1, TRAINING)
    assert len(encoded.data) == 3
    assert encoded.encoder.vocabularies["item_id"].values.tolist() == [1, 2]
    assert [shard.rows for shard in training_shards(dataset, workspace, wanted, 1000)] == [2, 1]
