"""Paths of all artifacts in the workspace; the only place where they are defined."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from freshrank.settings import settings
from freshrank.storage.files import locked, read_json, write_json


@dataclass(frozen=True)
class Workspace:
    """Paths under ``home`` for one dataset."""

    home: Path
    dataset: str

    @classmethod
    def of(cls, dataset: str, home: Path | None = None) -> "Workspace":
        return cls(home or settings().home, dataset)

    @property
    def bindings(self) -> Path:
        """Which code each string id has, over all imports under this name."""
        return self.home / "bindings" / f"{self.dataset}.json"

    @property
    def features(self) -> Path:
        """Daily history snapshots: ``features/<entity>/date=YYYY-MM-DD/part-0.parquet``."""
        return self.home / "features" / self.dataset

    @property
    def feast(self) -> Path:
        """Feast's registry, online SQLite file and feature_store.yaml."""
        return self.home / "feast" / self.dataset

    @property
    def frames(self) -> Path:
        """Training frames, one directory per day."""
        return self.home / "frames" / self.dataset

    @property
    def shards(self) -> Path:
        """Training frames cut by user, one directory per day, of logs too large for one window."""
        return self.home / "shards" / self.dataset

    @property
    def checkpoints(self) -> Path:
        """Trainings under way, by fingerprint of their inputs."""
        return self.home / "checkpoints" / self.dataset

    @property
    def steps(self) -> Path:
        """Finished outputs of train, calibrate, evaluate, by fingerprint of their inputs."""
        return self.home / "steps" / self.dataset

    @property
    def bench(self) -> Path:
        """Predictions and measures of side-by-side measurements, by row, seed and fingerprint."""
        return self.home / "bench" / self.dataset

    def run(self, run_date: date) -> Path:
        """What a person looks at after a run: verdict, report, logs."""
        return self.home / "runs" / self.dataset / run_date.isoformat()

    @property
    def pipelines(self) -> Path:
        """Pipelines compiled for a cluster, of all datasets, by their fingerprint; artifacts of local pipeline runs."""
        return self.home / "kfp"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """`freshrank prune` takes nothing meanwhile that was there at the beginning; where it is at it, it is waited
        for."""
        with locked(self._lock, shared=True):
            yield

    @contextmanager
    def unused(self) -> Iterator[bool]:
        """Whether nobody is :meth:`in_use`; who comes waits until the end of the block."""
        with locked(self._lock, wait=False) as free:
            yield free

    @property
    def _lock(self) -> Path:
        return self.home / "locks" / self.dataset

    def reads_from(self, run_date: date) -> date | None:
        """The first day whose features the run of ``run_date`` reads, where it has noted it."""
        path = self.run(run_date) / "reads.json"
        return date.fromisoformat(read_json(path)) if path.exists() else None

    def note_reads(self, run_date: date, first: date) -> None:
        """Note that the run of ``run_date`` is at work and reads features of ``first`` and later."""
        write_json(self.run(run_date) / "reads.json", min(first, self.reads_from(run_date) or first))

    @property
    def requests(self) -> Path:
        """What servers write: ``recorded.json``, and the request log as ``<UTC date>/<process>-<number>.parquet``."""
        return self.home / "requests" / self.dataset

    @property
    def triton(self) -> Path:
        """Model repository, pointer and server state of this dataset."""
        return self.home / "triton" / self.dataset
