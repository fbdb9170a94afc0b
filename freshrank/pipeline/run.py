"""One dataset and one date, and the store of finished steps."""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from freshrank.datasets.bindings import bind
from freshrank.datasets.dataset import Dataset
from freshrank.dates import days, parse_day
from freshrank.errors import DataError, MissingArtifact
from freshrank.schema import USAGE, Usage
from freshrank.storage.files import atomic_directory, fingerprint, read_json, write_json
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
        kept = [] if log_rows is None else sorted(log_rows.select("day").unique().collect()["day"])
        if not kept:
            raise DataError(
                f"{self.dataset.path}: no impressions for {what} on {min(wanted)} .. {max(wanted)} of run "
                f"{self.date}; the log holds {self.dataset.days[0]} .. {self.dataset.days[-1]}"
            )
        return kept

    def read(self, part: Iterable[date]) -> str:
        """Fingerprint of every row that can reach features or labels of ``part``."""
        wanted = sorted(part)
        lookback = timedelta(days=self.dataset.schema.lookback_days + 1)
        return self.dataset.fingerprint(list(days(wanted[0] - lookback, wanted[-1])))

    def kept(self, name: str, inputs: dict[str, Any]) -> Path:
        """Where the step store holds this fingerprint, once it is done."""
        return self.workspace.steps / name / fingerprint(inputs)

    def done(self, name: str, inputs: dict[str, Any]) -> bool:
        """Whether the step store holds this fingerprint."""
        return self.kept(name, inputs).is_dir()

    def step(self, name: str, inputs: dict[str, Any], out: FreshrankPath, compute: Callable[[Path], None]) -> Path:
        """Compute into the step store unless it holds this fingerprint, then copy to ``out``."""
        key = fingerprint(inputs)
        kept = self.kept(name, inputs)
        with self.workspace.in_use():
            self._say_used(kept)
        if self.done(name, inputs):
            log.info("step=%s date=%s fingerprint=%s state=reused", name, self.date, key)
        else:
            log.info("step=%s date=%s fingerprint=%s state=started", name, self.date, key)
            with atomic_directory(kept) as directory:
                compute(directory)
            log.info("step=%s date=%s fingerprint=%s state=finished", name, self.date, key)
        with atomic_directory(Path(out)) as directory:
            shutil.copytree(kept, directory, dirs_exist_ok=True)
        return Path(out)

    def _say_used(self, kept: Path) -> None:
        """To `freshrank prune`: of ``kept``, where it is there, and of what this run reads."""
        if kept.is_dir():
            os.utime(kept)
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
