"""Who is judged on which rows: the challenger, what served before the run's date, or popularity."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from freshrank.config import EvaluationConfig
from freshrank.evaluation import Judged
from freshrank.export import OnnxRanker
from freshrank.frames import Frame, load_frame
from freshrank.popularity import popularity
from freshrank.schema import IN_EVALUATION, REQUEST_ID, USER_ID
from freshrank.serving.repository import ModelRepository
from freshrank.training import labels_of

if TYPE_CHECKING:
    from datetime import date

    from freshrank.steps import Run


@dataclass(frozen=True)
class Champion:
    """What served when the run's date began."""

    version: int
    run_date: str
    fingerprint: str
    bundle: Path


def champion(run: "Run") -> Champion | None:
    """The served version, or the newest one of an earlier date when the run's own (or a later) date already serves."""
    repository = ModelRepository(run.workspace.triton)
    pointer = repository.served()
    if pointer and pointer.run_date < run.date.isoformat():
        return _champion(repository, pointer.version)
    if pointer is None:
        return None
    earlier = [v for v in repository.versions() if repository.info(v).run_date < run.date.isoformat()]
    dated = sorted(earlier, key=lambda v: (repository.info(v).run_date, v))
    return _champion(repository, dated[-1]) if dated else None


def _champion(repository: ModelRepository, version: int) -> Champion:
    info = repository.info(version)
    return Champion(version, info.run_date, info.fingerprint, repository.version_directory(version))


@dataclass(frozen=True)
class JudgedRows:
    """The evaluation rows, scored by whoever is asked."""

    run: "Run"
    frame: Frame
    items: pl.DataFrame
    labels: np.ndarray
    list_id: np.ndarray

    @classmethod
    def load(cls, run: "Run", days: list["date"], config: EvaluationConfig) -> "JudgedRows":
        frame = load_frame(run.dataset, run.workspace, days, IN_EVALUATION)
        key = REQUEST_ID if config.lists == "request" else USER_ID
        list_id = frame.rows[key].rank("dense").cast(pl.Int64).to_numpy()
        return cls(run, frame, run.dataset.items(), labels_of(frame, run.dataset.schema), list_id)

    def of_bundle(self, bundle: Path) -> Judged:
        answers = OnnxRanker(bundle).score(self.frame, self.items)
        return self._judged(answers["probabilities"], answers["score"])

    def of_champion(self, champion: Champion | None) -> Judged:
        """The champion's predictions; popularity where nothing served."""
        if champion:
            return self.of_bundle(champion.bundle)
        probabilities, score = popularity(self.frame.items, self.run.dataset.schema)
        item_row = self.frame.rows["item_row"].to_numpy()
        return self._judged(probabilities[item_row], score[item_row])

    def _judged(self, probabilities: np.ndarray, score: np.ndarray) -> Judged:
        rows = self.frame.rows
        return Judged(
            probabilities=probabilities,
            score=score,
            labels=self.labels,
            list_id=self.list_id,
            age_days=rows["judged_age_days"].to_numpy(),
            exposures=rows["exposures"].to_numpy(),
            item_id=rows["item_id"].to_numpy(),
        )


__all__: list[Any] = []
