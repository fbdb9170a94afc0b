"""Where each artifact of a run lives under the workspace; the only place these paths are spelled."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path

from freshrank.settings import settings


@dataclass(frozen=True)
class Workspace:
    """Paths under ``home`` for one dataset."""

    home: Path
    dataset: str

    @classmethod
    def of(cls, dataset: str, home: Path | None = None) -> "Workspace":
        return cls(home or settings().home, dataset)

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
    def steps(self) -> Path:
        """Finished outputs of train, calibrate, evaluate, by fingerprint of their inputs."""
        return self.home / "steps" / self.dataset

    def run(self, run_date: date) -> Path:
        """What a person looks at after a run: verdict, report, logs."""
        return self.home / "runs" / self.dataset / run_date.isoformat()

    @property
    def triton(self) -> Path:
        """Model repository, pointer and server state of this dataset."""
        return self.home / "triton" / self.dataset
