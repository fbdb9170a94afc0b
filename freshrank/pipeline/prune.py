"""Prune a workspace: remove what no later run, no rollback and no recent report needs.

A run needs the days its windows read, which it notes in its folder; the next run is taken to read as many as the
widest run before it. Days count from the next run of the log, not from today: a log may be years old. What has no day
in its name goes by when it was last written or used.

Nothing that was written within :data:`SPARED` is removed, nor what a run that began or ended a step since then reads:
somebody may be at work. Every folder first takes another name, in a place that no reader looks at, and is deleted
there: a process killed half-way leaves each whole or gone, and the next call removes the rest.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from freshrank.config import ValidationConfig, WindowConfig
from freshrank.datasets.dataset import Dataset
from freshrank.errors import FreshrankError
from freshrank.features.frames import frame_path
from freshrank.schema import Entity
from freshrank.serving.experiment import FILE as EXPERIMENT
from freshrank.serving.repository import ModelRepository
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace

KEEP_DAYS = 30
"""Of `freshrank prune` where neither it nor FRESHRANK_KEEP_DAYS says another number."""
SPARED = timedelta(days=1)
"""Longer than any step goes without writing."""
REFERENCE_DAYS = ValidationConfig().trailing_days
"""Days before a run whose snapshots its validation reads, however short its windows."""
TRASH = ".pruned"
_ONE = timedelta(days=1)
RUNS, FRAMES, SHARDS, SNAPSHOTS, PARTS = "runs", "frames", "shards", "snapshots", "day parts"
CHECKPOINTS, STEPS, PIPELINES, REQUESTS, LEFT_OVER = "checkpoints", "steps", "pipelines", "requests", "left by kills"
KINDS = (RUNS, FRAMES, SHARDS, SNAPSHOTS, PARTS, CHECKPOINTS, STEPS, PIPELINES, REQUESTS, LEFT_OVER)
READ_BY_RUNS = (RUNS, FRAMES, SHARDS, SNAPSHOTS, PARTS, CHECKPOINTS, STEPS)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removable:
    """Something that may go."""

    kind: str
    path: Path
    root: Path
    """On the same file system; its :data:`TRASH` is where it goes first."""


@dataclass(frozen=True)
class Removed:
    """What was removed of one kind, or would be."""

    kind: str
    count: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.kind:<26}{self.count:>8}{self.bytes / 2**20:>12,.1f} MiB"


def prune(
    dataset: Dataset, workspace: Workspace, keep_days: int, dry_run: bool = False, now: datetime | None = None
) -> list[Removed]:
    """Remove what is not needed and older than ``keep_days`` days; what and how much of it, by kind. Safe to repeat.

    Waits while somebody publishes, rolls back or starts a server. ``dry_run`` removes nothing.

    Raises:
        ServingError: an installed version cannot be read, so the run it is of is not known.
    """
    with ModelRepository(workspace.triton).lock() as repository, workspace.unused() as unused:
        if not unused:
            log.warning(
                "prune: features are being read or built just now: of %s all stays this time", ", ".join(READ_BY_RUNS)
            )
        plan = PruningPlan(dataset, workspace, repository, keep_days, now or datetime.now(UTC))
        removable = [(each, _bytes(each.path)) for each in plan.removable() if unused or each.kind not in READ_BY_RUNS]
        if not dry_run:
            removable = [(each, size) for each, size in removable if _put_away(each, plan)]
    if not dry_run:
        _empty(plan.roots())
    return _summed(removable)


def total(removed: Iterable[Removed]) -> Removed:
    """The sum over all kinds."""
    kinds = list(removed)
    return Removed("all", sum(each.count for each in kinds), sum(each.bytes for each in kinds))


def prune_after_a_day(data: Path) -> None:
    """As FRESHRANK_KEEP_DAYS says, 0 is not at all; that it fails is logged and no reason for a day to fail."""
    if not settings().keep_days:
        return
    try:
        dataset = Dataset.open(data)
        for removed in prune(dataset, Workspace.of(dataset.schema.name), settings().keep_days):
            log.info("pruned: %s", removed)
    except (FreshrankError, OSError) as error:
        log.warning("prune: the workspace is not pruned, `freshrank prune` does it again: %s", error)


def _summed(removed: Iterable[tuple[Removable, int]]) -> list[Removed]:
    sums = {kind: Removed(kind) for kind in KINDS}
    for each, size in removed:
        before = sums[each.kind]
        sums[each.kind] = replace(before, count=before.count + 1, bytes=before.bytes + size)
    return list(sums.values())


class PruningPlan:
    """What may be removed from one workspace, as seen at one moment."""

    def __init__(
        self, dataset: Dataset, workspace: Workspace, repository: ModelRepository, keep_days: int, now: datetime
    ) -> None:
        self.dataset, self.workspace, self.repository = dataset, workspace, repository
        self.now, self.keep = now, timedelta(days=keep_days)
        self.next_run = dataset.days[-1] + _ONE
        self._runs = {day: path for path in _entries(workspace.run(self.next_run).parent) if (day := _day(path.name))}
        self._read = list(self._read_days())
        self._under_way = any(self.is_at_work(path) for path in _entries(workspace.checkpoints))

    def removable(self) -> Iterator[Removable]:
        """Everything that may be removed; of a snapshot, the marker that it is complete goes first."""
        yield from self._of_runs()
        if not self._under_way:
            # A training reads them for as long as it takes, and says so with its checkpoints alone.
            yield from self._of_training()
        yield from self._of_parts()
        yield from self._unused()
        yield from self._of_requests()
        for root in self.roots():
            yield from (Removable(LEFT_OVER, path, root) for path in _hidden(root) if not self.is_at_work(path))

    def roots(self) -> list[Path]:
        """Folders that things are removed from."""
        space = self.workspace
        steps = _entries(space.steps)
        return [
            space.run(self.next_run).parent,
            space.frames,
            space.shards,
            space.features,
            space.features / "daily",
            space.checkpoints,
            *steps,
            space.pipelines,
            space.requests,
        ]

    def is_at_work(self, path: Path) -> bool:
        """Whether anything in ``path`` was written of late."""
        return self._age(path) < SPARED

    def _age(self, path: Path) -> timedelta:
        return self.now - datetime.fromtimestamp(max(map(_changed, _inside(path))), UTC)

    def _is_retained(self, day: date) -> bool:
        return day > self.next_run - self.keep

    def _read_days(self) -> Iterator[tuple[date, date]]:
        """First and last day that each run which stays reads, and the next one."""
        first = {day: self.workspace.reads_from(day) or _default(day) for day in self._runs}
        widest = max((day - begin for day, begin in first.items()), default=self.next_run - _default(self.next_run))
        for day, begin in (first | {self.next_run: self.next_run - widest}).items():
            if day == self.next_run or self._is_retained(day) or self.is_at_work(self._runs[day]):
                yield min(begin, day - timedelta(days=REFERENCE_DAYS)), day

    def _is_read(self, day: date) -> bool:
        return any(first <= day <= last for first, last in self._read)

    def _of_runs(self) -> Iterator[Removable]:
        installed = {self.repository.info(version).run_date for version in self.repository.versions()}
        for day, path in self._runs.items():
            if not self._is_retained(day) and day.isoformat() not in installed and not self.is_at_work(path):
                yield Removable(RUNS, path, path.parent)

    def _of_training(self) -> Iterator[Removable]:
        for kind, root in ((FRAMES, self.workspace.frames), (SHARDS, self.workspace.shards)):
            by_day = [(day, path) for path in _entries(root) if (day := _day(path.name[:10]))]
            for day, path in by_day:
                goes = not self._is_read(day) or (kind == FRAMES and self._is_stale(day, path, by_day))
                if goes and not self.is_at_work(path):
                    yield Removable(kind, path, root)
        root = self.workspace.features
        folders = [root / name for name in ("built", *Entity, "item_hourly")]
        for path in (path for folder in folders for path in _entries(folder)):
            day = _day(path.stem[-10:])
            if day and not self._is_read(day) and not self.is_at_work(path):
                yield Removable(SNAPSHOTS, path, root)

    def _is_stale(self, day: date, path: Path, by_day: list[tuple[date, Path]]) -> bool:
        """Whether a later frame of ``day`` took its place."""
        several = sum(other == day for other, _ in by_day) > 1
        return several and path != frame_path(self.dataset, self.workspace, day)

    def _of_parts(self) -> Iterator[Removable]:
        """Those of days that the log has no more: a frame counts the impressions of all days before its own."""
        root = self.workspace.features / "daily"
        for path in _entries(root):
            day = _day(path.name.removeprefix("date="))
            if day and day not in self.dataset.days and not self.is_at_work(path):
                yield Removable(PARTS, path, root)

    def _unused(self) -> Iterator[Removable]:
        """What has no day: a step that takes it, a training that goes on, a submission write or touch it."""
        roots = [(CHECKPOINTS, self.workspace.checkpoints), *((STEPS, root) for root in _entries(self.workspace.steps))]
        undated = [(kind, path, root) for kind, root in roots for path in _entries(root)]
        undated += [
            (PIPELINES, path, self.workspace.pipelines)
            for path in _entries(self.workspace.pipelines)
            if path.suffix == ".yaml"
        ]
        yield from (Removable(*each) for each in undated if self._age(each[1]) >= max(self.keep, SPARED))

    def _of_requests(self) -> Iterator[Removable]:
        """Whole days (UTC) of the request log, none while an experiment runs, which is computed from them."""
        root = self.workspace.requests
        if (self.repository.root / EXPERIMENT).exists():
            return
        for path in _entries(root):
            day = _day(path.name)
            if day and day < self.now.date() - self.keep and not self.is_at_work(path):
                yield Removable(REQUESTS, path, root)


def _default(day: date) -> date:
    return WindowConfig().split(day).train[0]


def _day(name: str) -> date | None:
    with suppress(ValueError):
        return date.fromisoformat(name)
    return None


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _hidden(folder: Path) -> list[Path]:
    """Leftovers of a killed writer or upload."""
    return [path for pattern in (".*.tmp", ".upload-*") for path in folder.glob(pattern)]


def _inside(path: Path) -> Iterator[Path]:
    """``path`` and all in it; what its owner removes meanwhile is no error."""
    yield path
    for folder, folders, files in os.walk(path):
        yield from (Path(folder, name) for name in (*folders, *files))


def _changed(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _bytes(path: Path) -> int:
    sizes = 0
    for file in _inside(path):
        with suppress(FileNotFoundError):
            sizes += file.stat().st_size if file.is_file() else 0
    return sizes


def _put_away(item: Removable, plan: PruningPlan) -> bool:
    """Take ``item`` out of every reader's sight; False where somebody came meanwhile, or removed it."""
    trash = item.root / TRASH
    trash.mkdir(exist_ok=True)
    if plan.is_at_work(item.path):
        return False
    try:
        item.path.rename(trash / uuid.uuid4().hex)
    except FileNotFoundError:
        return False
    return True


def _empty(roots: Iterable[Path]) -> None:
    """Delete what was moved to the trash, by this call or by one that was killed."""
    for root in roots:
        shutil.rmtree(root / TRASH, ignore_errors=True)
