"""Which models are evaluated on which rows: the challenger, and the model served before the run's date, or
popularity.
"""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from freshrank.bundle.onnx_ranker import OnnxRanker
from freshrank.config import EvaluationConfig
from freshrank.evaluation.gate import Decision, Verdict
from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.evaluation.popularity import popularity
from freshrank.evaluation.results import ALL, FRESH, Comparison, Evaluation, MetricName
from freshrank.features.frames import JUDGED_AGE, Frame, load_frame
from freshrank.recipes import named
from freshrank.reports.report import ReportInput, RunSummary, library_versions, write_report
from freshrank.reports.validation_page import DOCS, PAGE
from freshrank.schema import IN_EVALUATION, REQUEST_ID, USER_ID
from freshrank.storage.files import read_json, write_json
from freshrank.training.batches import labels_of

if TYPE_CHECKING:
    from freshrank.pipeline.run import Run
from freshrank.pipeline.champion import Champion


@dataclass(frozen=True)
class EvaluationRows:
    """The evaluation rows, to be scored by a bundle, the champion or popularity."""

    run: "Run"
    frame: Frame
    items: pl.DataFrame
    labels: np.ndarray
    list_id: np.ndarray

    @classmethod
    def load(cls, run: "Run", days: list[date], config: EvaluationConfig) -> "EvaluationRows":
        frame = load_frame(run.dataset, run.workspace, days, IN_EVALUATION)
        key = REQUEST_ID if config.lists == "request" else USER_ID
        list_id = frame.rows[key].rank("dense").cast(pl.Int64).to_numpy()
        return cls(run, frame, run.dataset.items(), labels_of(frame, run.dataset.schema), list_id)

    def of_bundle(self, bundle: Path) -> JudgedRows:
        answers = OnnxRanker(bundle).score(self.frame, self.items)
        return self._judged(answers["probabilities"], answers["score"])

    def of_champion(self, champion: Champion | None) -> JudgedRows:
        """The champion's predictions; popularity where nothing served."""
        if champion and not champion.lacking:
            return self.of_bundle(champion.bundle)
        probabilities, score = popularity(self.frame.items, self.run.dataset.schema)
        item_row = self.frame.rows["item_row"].to_numpy()
        return self._judged(probabilities[item_row], score[item_row])

    def _judged(self, probabilities: np.ndarray, score: np.ndarray) -> JudgedRows:
        rows = self.frame.rows
        return JudgedRows(
            probabilities=probabilities,
            score=score,
            labels=self.labels,
            list_id=self.list_id,
            age_days=rows[JUDGED_AGE].to_numpy(),
            exposures=rows["exposures"].to_numpy(),
            item_id=rows["item_id"].to_numpy(),
        )


@dataclass(frozen=True)
class Judgement:
    """The evaluation of a bundle on the evaluation days."""

    bundle: dict[str, Any]
    champion: Champion | None
    challenger: Evaluation
    baseline: Evaluation
    comparison: Comparison
    verdict: Verdict
    sections: dict[str, Any]
    """The evaluation and gate sections of the configuration."""

    @property
    def baseline_name(self) -> str:
        return str(self.champion or "popularity (nothing served before)")

    def write(self, directory: Path, run: "Run") -> None:
        """``report.html``, and as JSON ``challenger``, ``baseline``, ``comparison``, ``verdict`` and ``headline``."""
        for name in ("challenger", "baseline", "comparison", "verdict"):
            write_json(directory / f"{name}.json", getattr(self, name).model_dump(mode="json"))
        write_json(directory / "headline.json", self._headline())
        write_report(directory / "report.html", self._report(run))

    def _headline(self) -> dict[str, Any]:
        rows = {f"hits_{slice}": self.comparison.get(MetricName.HITS, slice) for slice in (FRESH, ALL)}
        return {
            "fingerprint": self.bundle["fingerprint"],
            "recipe": self._recipe(),
            "baseline": self.baseline_name,
            "parameter_increase": self.bundle["training"]["parameter_increase"],
            **{f"{name}_challenger": row.challenger.value for name, row in rows.items() if row.challenger},
            **{f"{name}_baseline": row.baseline.value for name, row in rows.items() if row.baseline},
        }

    def _recipe(self) -> str:
        return named({name: self.bundle["config"][name] for name in ("model", "techniques", "training")})

    def _report(self, run: "Run") -> ReportInput:
        training = self.bundle["training"]
        curve = training["curve"]
        return ReportInput(
            dataset=run.dataset.schema.name,
            run_date=run.date,
            recipe=self._recipe(),
            verdict=self.verdict,
            comparison=self.comparison,
            challenger=self.challenger,
            baseline=self.baseline,
            baseline_name=self.baseline_name,
            parameters=training["parameters"],
            parameter_increase=training["parameter_increase"],
            training_curve=list(zip(curve["steps"], curve["losses"]["bce"], strict=True)),
            data_facts={name: training[name] for name in ("rows", "cold_rows", "user_days", "device")},
            config=self.bundle["config"] | self.sections,
            versions=library_versions(),
            fingerprints={"bundle": self.bundle["fingerprint"]},
            validation_page=f"validation/{PAGE}",
            data_docs=f"validation/{DOCS}",
        )


def summarise(directory: Path) -> RunSummary:
    """What ``directory``, a run's folder, says about how its day ended."""
    record, headline = read_json(directory / "run.json"), read_json(directory / "headline.json")
    verdict = Verdict.model_validate(read_json(directory / "verdict.json"))
    return RunSummary(
        dataset=record["dataset"],
        run_date=record["run_date"],
        recipe=headline["recipe"],
        verdict=verdict,
        comparison=Comparison.model_validate(read_json(directory / "comparison.json")),
        baseline_name=headline["baseline"],
        parameter_increase=headline["parameter_increase"],
        served_version=record["served_version"],
        served_run_date=record.get("served_run_date"),
        deployed=record["deployed"] and verdict.verdict is Decision.BLESSED,
        report=directory / "report.html",
    )
