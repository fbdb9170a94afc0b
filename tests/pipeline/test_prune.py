"""What `freshrank prune` removes, what it leaves, and that a run finds its way without what is gone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from freshrank.cli.main import app
from freshrank.config import CalibrationConfig, EvaluationConfig, GateConfig, TechniquesConfig
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.errors import MissingArtifact
from freshrank.features.frames import TABLES, frame_path, load_frame
from freshrank.features.snapshots import require_history
from freshrank.pipeline import prune as pruning
from freshrank.pipeline import steps
from freshrank.pipeline.run import Run
from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.settings import settings
from freshrank.storage.files import read_json, write_json
from tests.pipeline.test_steps import SMALL, TRAINING, WINDOWS
from tests.serving.tiny_bundles import write_bundle

pytestmark = pytest.mark.integration

WORLD = WorldConfig(users=80, days=14, items_at_start=60, new_items_per_day=8, impressions_per_day=300)
EARLY = WORLD.last_day - timedelta(days=9)
NEXT = WORLD.last_day + timedelta(days=1)
FRAMES = [EARLY - timedelta(days=age) for age in (3, 2, 1)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, and a workspace with the features of a run of long ago."""
    path = tmp_path_factory.mktemp("pruning")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FRESHRANK_HOME", str(path / "home"))
        settings.cache_clear()
        simulate(path / "world", WORLD)
        build(path / "world", EARLY)
    settings.cache_clear()
    return path


@pytest.fixture
def run(built: Path, home: Path) -> Run:
    """That run, in a workspace of its own."""
    shutil.copytree(built / "home", home)
    return Run(built / "world", EARLY.isoformat())


def build(data: Path, day: date) -> None:
    steps.build_features(data, day.isoformat(), WINDOWS)


def judged(run: Run, out: Path) -> dict[str, object]:
    """Train, calibrate and evaluate as the pipeline does."""
    day, data = run.date.isoformat(), run.dataset.path
    steps.train(data, day, WINDOWS, SMALL, TechniquesConfig(), TRAINING, out / "model")
    steps.calibrate(data, day, WINDOWS, CalibrationConfig(), out / "model", out / "bundle")
    judging = EvaluationConfig(bootstrap=50)
    steps.evaluate(data, day, WINDOWS, judging, GateConfig(), out / "bundle", out / "evaluation")
    verdict: dict[str, object] = read_json(run.directory / "verdict.json")
    return verdict


def prune(run: Run, keep_days: int = 0, days_later: float = 2, dry_run: bool = False) -> dict[str, int]:
    """How many of each kind, as of some days later."""
    now = datetime.now(UTC) + timedelta(days=days_later)
    removed = pruning.prune(run.dataset, run.workspace, keep_days, dry_run, now)
    return {each.kind: each.count for each in removed if each.count}


def frames(run: Run) -> list[bool]:
    return [frame_path(run.dataset, run.workspace, each).exists() for each in FRAMES]


@pytest.mark.slow
def test_a_run_of_a_pruned_day_builds_what_is_gone_and_gives_the_same_verdict(run: Run, tmp_path: Path) -> None:
    """Frames, snapshots, finished steps and the report are gone; all of them are made again."""
    before = judged(run, tmp_path / "before")
    assert frames(run) == [True] * 3
    removed = prune(run)
    assert removed["runs"] == 1
    assert removed["frames"] == 3
    assert removed["steps"] == 3
    assert removed["snapshots"] == 3 * 4, "user, item and the marker of three days and of the run's date"
    assert not run.directory.exists()
    build(run.dataset.path, EARLY)
    assert judged(run, tmp_path / "after") == before
    assert frames(run) == [True] * 3


def test_a_pruned_day_is_read_again_with_the_same_numbers(run: Run) -> None:
    """Its snapshots and its frame are made anew."""
    day = FRAMES[-1]
    before = load_frame(run.dataset, run.workspace, [day])
    assert {"frames", "snapshots"} <= prune(run).keys()
    with pytest.raises(MissingArtifact, match="features build"):
        load_frame(run.dataset, run.workspace, [day])
    build(run.dataset.path, EARLY)
    after = load_frame(run.dataset, run.workspace, [day])
    for table in TABLES:
        assert_frame_equal(getattr(after, table), getattr(before, table))


def test_a_second_prune_finds_nothing_and_a_dry_one_removes_nothing(run: Run) -> None:
    """The dry one counts what the first one then removes."""
    dry = prune(run, dry_run=True)
    assert dry == prune(run)
    assert dry["snapshots"] == 12
    assert prune(run) == {}


def test_nothing_goes_while_a_run_may_be_at_work(run: Run) -> None:
    """It built or found its features a moment ago, whichever date it is of."""
    assert prune(run, days_later=0) == {}
    require_history(run.dataset, run.workspace, [*FRAMES, EARLY])


def test_a_run_that_takes_old_snapshots_up_again_keeps_them(run: Run) -> None:
    """Its features were all there, so it wrote none: it says from which day on it reads them."""
    _age(run.workspace.home)
    build(run.dataset.path, EARLY)
    assert prune(run, days_later=0) == {}
    require_history(run.dataset, run.workspace, [*FRAMES, EARLY])


def test_a_training_under_way_keeps_what_it_reads(run: Run) -> None:
    """However long ago it began: its checkpoint was written a moment ago."""
    _age(run.workspace.home)
    write_json(run.workspace.checkpoints / "key" / "state.json", {})
    removed = prune(run, days_later=0)
    assert "snapshots" not in removed
    assert "checkpoints" not in removed
    assert prune(run)["checkpoints"] == 1


def test_what_somebody_reads_stays(run: Run) -> None:
    """Snapshots are read as one table of all days."""
    with run.workspace.in_use():
        assert "snapshots" not in prune(run)
    assert prune(run)["snapshots"] == 12


def test_the_days_that_the_next_run_reads_stay(run: Run) -> None:
    """Though they were built long ago and no day is to be kept."""
    build(run.dataset.path, NEXT)
    prune(run, days_later=100)
    wanted = [NEXT - timedelta(days=age) for age in range(4)]
    require_history(run.dataset, run.workspace, wanted)


def test_the_newest_days_stay_and_those_before_go(run: Run) -> None:
    """Of ten days before the next run the early run is the last."""
    days = (NEXT - EARLY).days
    assert prune(run, keep_days=days + 1, days_later=100).get("runs", 0) == 0
    assert prune(run, keep_days=days, days_later=100)["runs"] == 1


def test_day_parts_stay_as_long_as_the_log_has_their_day(run: Run) -> None:
    """A frame counts the impressions of all days before its own."""
    parts = run.workspace.features / "daily"
    gone = parts / "date=2000-01-01"
    write_json(gone / "built.json", {})
    before = {path.name for path in parts.iterdir()} - {gone.name}
    assert before
    assert prune(run)["day parts"] == 1
    assert {path.name for path in parts.glob("date=*")} == before


def test_a_frame_goes_when_another_took_its_place(run: Run) -> None:
    """The log of its day was imported anew; the day itself is still read."""
    old = run.workspace.frames / f"{FRAMES[0].isoformat()}-0123456789abcdef"
    new = frame_path(run.dataset, run.workspace, FRAMES[0])
    for path in (old, new):
        path.mkdir(parents=True)
    assert prune(run, keep_days=100)["frames"] == 1
    assert new.exists()


def test_runs_of_installed_versions_stay(run: Run, tmp_path: Path) -> None:
    """What serves, what a roll-back returns to: their reports say why they serve."""
    served = date(2022, 5, 1)
    repository = ModelRepository(run.workspace.triton)
    repository.install_version(write_bundle(tmp_path / "bundle", 1.0))
    repository.point_to(Pointer(version=1, run_date=served.isoformat(), fingerprint="w1.0"))
    write_json(run.workspace.run(served) / "verdict.json", {})
    assert prune(run)["runs"] == 1
    assert run.workspace.run(served).exists()
    assert repository.versions() == [1]


def test_old_requests_and_pipelines_go(run: Run) -> None:
    """Whole days of the log; what the next publication answers stays."""
    today = datetime.now(UTC).date()
    for age in (0, 9):
        write_json(run.workspace.requests / (today - timedelta(days=age)).isoformat() / "x.parquet", {})
    write_json(run.workspace.requests / "recorded.json", [])
    write_json(run.workspace.pipelines / "train-ranker-1.yaml", {})
    (run.workspace.pipelines / "20240101T000000.0-for-2024-01-01").mkdir()
    _age(run.workspace.home, days=5)
    removed = prune(run, keep_days=7, days_later=0)
    assert removed["requests"] == 1
    assert "pipelines" not in removed
    assert prune(run, keep_days=4, days_later=0)["pipelines"] == 1
    assert sorted(path.name for path in run.workspace.requests.glob("*")) == [today.isoformat(), "recorded.json"]
    assert list(run.workspace.pipelines.glob("*-for-*"))


def test_the_requests_of_a_running_experiment_stay(run: Run) -> None:
    """Its outcome is computed from them."""
    write_json(run.workspace.requests / "2020-01-01" / "x.parquet", {})
    experiment = run.workspace.triton / "experiment.json"
    write_json(experiment, {"name": "ab", "shadows": [{"version": 1, "share": 0.1}]})
    assert "requests" not in prune(run)
    experiment.unlink()
    assert prune(run)["requests"] == 1


def test_what_killed_processes_left_goes(run: Run) -> None:
    """Half-written folders, and what an earlier prune had put away."""
    root = run.workspace.frames
    for name in (".2024-01-01-x.host-1-2.tmp", ".pruned/1"):
        write_json(root / name / "rows.parquet", {})
    assert prune(run)["left by kills"] == 1
    assert list(root.iterdir()) == []


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    settings.cache_clear()


def test_a_day_prunes_where_the_setting_says_so(run: Run, setting: pytest.MonkeyPatch) -> None:
    """Not by default."""
    _age(run.workspace.home)
    pruning.prune_after_a_day(run.dataset.path)
    assert run.directory.exists()
    setting.setenv("FRESHRANK_KEEP_DAYS", "1")
    settings.cache_clear()
    pruning.prune_after_a_day(run.dataset.path)
    assert not run.directory.exists()


def test_a_day_does_not_fail_where_it_cannot_prune(
    run: Run, setting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says that it could not, and what does it again."""
    setting.setenv("FRESHRANK_KEEP_DAYS", "1")
    settings.cache_clear()
    write_json(run.workspace.triton / "models" / "ranker" / "1" / "bundle.json", {})
    pruning.prune_after_a_day(run.dataset.path)
    assert "`freshrank prune` does it again" in caplog.text


def test_the_command_says_how_much_of_what(run: Run) -> None:
    """By kind and in all; dry, the same is said and nothing done."""
    _age(run.workspace.home)
    command = ["prune", "--data", str(run.dataset.path), "--keep-days", "0"]
    shown = CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False).stdout
    assert shown.startswith("would be removed:\n")
    assert ["snapshots", "12"] in [line.split()[:2] for line in shown.splitlines()]
    assert run.directory.exists()
    done = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert done == shown.replace("would be removed:", "removed:")
    assert not run.directory.exists()


def test_a_kill_leaves_every_frame_whole_or_gone(run: Run) -> None:
    """kill -9 of the process in the middle of it; the next call removes the rest."""
    root = run.workspace.frames
    for number in range(2000):
        folder = root / f"{EARLY - timedelta(days=number % 3)}-{number:016x}"
        folder.mkdir(parents=True)
        for table in TABLES:
            (folder / f"{table}.parquet").touch()
    _age(run.workspace.home)
    command = [sys.executable, "-m", "freshrank", "prune", "--data", run.dataset.path, "--keep-days", "0"]
    with subprocess.Popen(command, env=os.environ | {"FRESHRANK_HOME": str(run.workspace.home)}) as process:
        while not any((root / pruning.TRASH).glob("*")):
            assert process.poll() is None, "it ended before it could be killed"
        process.kill()
    left = [folder for folder in root.iterdir() if folder.name != pruning.TRASH]
    assert 0 < len(left) < 2000
    assert {len(list(folder.iterdir())) for folder in left} == {len(TABLES)}
    assert prune(run)["frames"] == len(left)
    assert list(root.iterdir()) == []


def _age(root: Path, days: int = 2) -> None:
    """As if nothing had been written for ``days``."""
    then = (datetime.now(UTC) - timedelta(days=days)).timestamp()
    for path in [root, *root.rglob("*")]:
        os.utime(path, (then, then))
