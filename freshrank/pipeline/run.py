"""One dataset and one date, and the store of finished steps."""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from pathlib import Path

import polars as pl

from freshrank.datasets.bindings import bind
from freshrank.datasets.dataset import Dataset
from freshrank.dates import days, parse_day
from freshrank.errors import DataError, MissingArtifact
from freshrank.schema import USAGE, Usage
from freshrank.storage.derived import build_unless_current
from freshrank.storage.files import atomic_directory, read_json, write_json
from freshrank.storage.workspace import Workspace

log = logging.getLogger(__name__)
FreshrankPath = Path | str


class Run:
    """One dataset, one date: what every step starts from."""

    def __init__(self, data: FreshrankPath, run_date: str) -> None:
        self.dataset = Dataset.open(Path(data))
        self.workspace = Workspace.of(self.dataset.schema.name)
        bind(self.workspace, self.dataset)
        self.date = parse_day(run_date)
        self.directory = self.workspace.run(self.date)

    def days(self, part: Iterable[date], what: str, usages: tuple[Usage, ...]) -> list[date]:
        """Those of ``part`` on which the log has rows of ``usages``; a :class:`DataError` where there is none."""
        wanted = list(part)
        present = sorted(set(wanted) & set(self.dataset.days))
        log_rows = self.dataset.impressions(present).filter(pl.col(USAGE).is_in(list(usages))) if present else None
        usable = [] if log_rows is None else sorted(log_rows.select("day").unique().collect()["day"])
        if not usable:
            raise DataError(
                f"{self.dataset.path}: no impressions for {what} on {min(wanted)} .. {max(wanted)} of run "
                f"{self.date}; the log holds {self.dataset.days[0]} .. {self.dataset.days[-1]}"
            )
        return usable

    def read(self, part: Iterable[date]) -> str:
        """Fingerprint of every row that can reach features or labels of ``part``."""
        wanted = sorted(part)
        lookback = timedelta(days=self.dataset.schema.lookback_days + 1)
        return self.dataset.fingerprint(list(days(wanted[0] - lookback, wanted[-1])))

    def stored_path(self, name: str, key: str) -> Path:
        """Where the step store holds what has the fingerprint ``key``, once it is done."""
        return self.workspace.steps / name / key

    def done(self, name: str, key: str) -> bool:
        return self.stored_path(name, key).is_dir()

    def step(self, name: str, key: str, out: FreshrankPath, compute: Callable[[Path], None]) -> Path:
        """Compute into the step store unless it holds what has the fingerprint ``key``, then copy to ``out``."""
        stored = self.stored_path(name, key)
        with self.workspace.in_use():
            self._mark_used(stored)

        def logged(directory: Path) -> None:
            log.info("step=%s date=%s fingerprint=%s state=started", name, self.date, key)
            compute(directory)

        state = "finished" if build_unless_current(stored, logged) else "reused"
        log.info("step=%s date=%s fingerprint=%s state=%s", name, self.date, key, state)
        with atomic_directory(Path(out)) as directory:
            shutil.copytree(stored, directory, dirs_exist_ok=True)
        return Path(out)

    def _mark_used(self, output: Path) -> None:
        """To `freshrank prune`: of ``output``, where it is there, and of what this run reads."""
        if output.is_dir():
            os.utime(output)
        if first := self.workspace.reads_from(self.date):
            self.workspace.note_reads(self.date, first)


def record_outcome(run: Run) -> None:
    """``run.json``: what serves now, and whether this run put it there."""
    from freshrank.serving.repository import ModelRepository

    pointer = ModelRepository(run.workspace.triton).served()
    ours = read_json(run.directory / "headline.json")["fingerprint"]
    write_json(
        run.directory / "run.json",
        {
            "dataset": run.dataset.schema.name,
            "run_date": run.date,
            "verdict": read_json(run.directory / "verdict.json")["verdict"],
            "served_version": pointer.version if pointer else None,
            "served_run_date": pointer.run_date if pointer else None,
            "deployed": pointer is not None and pointer.fingerprint == ours,
        },
    )


def require_artifact(path: Path, command: str) -> Path:
    if not path.exists():
        raise MissingArtifact(f"{path}: not found; run `{command}` first")
    return path
