"""One row with one seed: train, predict, judge. Kept by fingerprint, so a finished one is never done again.

BENCH/<row>-s<seed>-<key>/predictions.safetensors  logits float32 of the calibration and the evaluation rows
                         /facts.json              parameters, losses, seconds
                         /measures-<key>/         metrics.json and lists.safetensors, made from the predictions alone
"""

import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from freshrank.bench.paper.evidence_data import Evidence, EvidenceSource, LabelledRows, load_evidence
from freshrank.bench.paper.rows import BOOSTED
from freshrank.config import EvaluationConfig, RunConfig
from freshrank.evaluation import evaluate
from freshrank.evaluation import metrics as statistics
from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.evaluation.results import ALL, FRESH, WARM, Evaluation, MetricName, Weighting
from freshrank.export import exposure_parity
from freshrank.export.calibration import fit_platt
from freshrank.features.encoder import Catalog
from freshrank.schema import Schema
from freshrank.storage.derived import build_unless_current, fingerprint_of
from freshrank.storage.files import read_json, write_json
from freshrank.storage.workspace import Workspace
from freshrank.training import batches, loop
from freshrank.training import trained as trained_module
from freshrank.training.trained import Trained

MEASURES = (
    (MetricName.HITS, FRESH),
    (MetricName.HITS, ALL),
    (MetricName.MATCHED_HITS, FRESH),
    (MetricName.LOG_LOSS, FRESH),
    (MetricName.LOG_LOSS, WARM),
)
"""What is stored per list, once per action: measure m of action a is column m * A + a."""
BOOSTS = tuple(round(0.05 * step, 2) for step in range(61))
BOOST_GUARD = 0.005


@dataclass(frozen=True)
class Task:
    """Train ``config`` on ``source``, judge it on the rows of the same days."""

    row: str
    seed: int
    config: RunConfig
    source: EvidenceSource
    boosted: bool = False
    """Judge the predictions with one constant added to all fresh logits."""
    note: str = ""
    """Shown while it runs."""

    @property
    def label(self) -> str:
        return f"{self.name}{self.note} seed {self.seed}"

    @property
    def name(self) -> str:
        """Of the row in the table."""
        return BOOSTED[self.row] if self.boosted else self.row


# Not of the class, which is at hand where one is trained: nobody trains anew because another number is judged by.
def predictions_of(task: Task) -> Path:
    """Where predictions lie."""
    sections = {
        name: getattr(task.config, name).model_dump(mode="json")
        for name in ("model", "techniques", "training", "calibration")
    }
    key = fingerprint_of({"data": _data_fingerprint(task.source), "sections": sections}, _predict)
    return _folder(task.source) / f"{task.row.replace('/', '_')}-s{task.seed}-{key}"


def measures_of(task: Task) -> Path:
    """Where measures lie."""
    sections = [getattr(task.config, name).model_dump(mode="json") for name in ("calibration", "evaluation")]
    key = fingerprint_of({"sections": sections, "boosted": task.boosted}, _judge)
    return predictions_of(task) / f"measures-{key}"


def is_done(task: Task) -> bool:
    return measures_of(task).is_dir()


@cache
def _folder(source: EvidenceSource) -> Path:
    return Workspace.of(source.dataset().schema.name).bench


@cache
def _data_fingerprint(source: EvidenceSource) -> str:
    return source.fingerprint()


def perform(task: Task) -> None:
    """Complete ``task``: train and predict, then evaluate, each unless it is done already."""
    if is_done(task):
        return
    build_unless_current(predictions_of(task), partial(_predict, task))
    build_unless_current(measures_of(task), partial(_judge, task))


def _predict(task: Task, directory: Path) -> None:
    evidence = load_evidence(task.source)
    encoded = evidence.encoded(task.config)
    wall, cpu = time.perf_counter(), time.process_time()
    trained = loop.train_encoded(encoded.train, task.config.model, task.config.techniques, task.config.training)
    spent = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    logits = {
        name: trained_module.predict_encoded(trained, getattr(encoded, name)) for name in ("calibration", "evaluation")
    }
    save_file(logits, directory / "predictions.safetensors")
    spent |= {"fresh_shift": _parity(task, evidence, trained, logits["calibration"])}
    config = task.config.model_dump(mode="json")
    facts = trained.facts | spent | {"row": task.row, "seed": task.seed, "config": config}
    write_json(directory / "facts.json", facts)


def _parity(task: Task, evidence: Evidence, trained: Trained, logits: np.ndarray) -> float:
    """The constant on fresh logits that the row's calibration asks for; 0 where it asks for none."""
    settings = task.config.calibration
    if settings.exposure != "parity":
        return 0.0
    labels = batches.labels_of(evidence.calibration, evidence.schema)
    platt = fit_platt(logits, labels, evidence.schema.actions, settings)
    catalog = Catalog.build(evidence.items, trained.encoder)
    return exposure_parity.with_parity(platt, trained, evidence.calibration, catalog, settings).fresh_shift


def _judge(task: Task, directory: Path) -> None:
    evidence = load_evidence(task.source)
    predictions = predictions_of(task)
    logits, trained = load_file(predictions / "predictions.safetensors"), read_json(predictions / "facts.json")
    schema, config = evidence.schema, task.config.evaluation
    lists = config.lists
    calibrated, rows = (LabelledRows.of(frame, schema, lists) for frame in (evidence.calibration, evidence.evaluation))
    platt = fit_platt(logits["calibration"], calibrated.labels, schema.actions, task.config.calibration)
    utilities = np.asarray(schema.utilities, np.float64)
    boost = float(trained.get("fresh_shift", 0.0))
    if task.boosted:
        boost = chosen_boost(calibrated, platt.scaled(logits["calibration"]), utilities, schema, config)
    judged = judged_of(rows, platt.scaled(logits["evaluation"]), utilities, boost)
    metrics = evaluate.evaluate(judged, schema, config)
    by_list = list_sums(judged, schema, config)
    save_file(by_list, directory / "lists.safetensors")
    facts = {
        "rows": rows.fingerprint(schema.actions),
        "actions": schema.actions,
        "boost": boost,
        "parameters": trained["parameters"],
    }
    write_json(directory / "metrics.json", facts | {"metrics": _flat(metrics)})


def judged_of(rows: LabelledRows, logits: np.ndarray, utilities: np.ndarray, boost: float = 0.0) -> JudgedRows:
    """Calibrated ``logits`` [N, A] as predictions, those of fresh rows moved by ``boost`` towards a higher score."""
    moved = logits + boost * rows.fresh[:, None] * np.sign(utilities)
    probabilities = 1 / (1 + np.exp(-moved))
    table = rows.frame.rows
    return JudgedRows(
        probabilities=probabilities,
        score=probabilities @ utilities,
        labels=rows.labels,
        list_id=rows.list_id,
        age_days=table["judged_age_days"].to_numpy(),
        exposures=table["exposures"].to_numpy(),
        item_id=table["item_id"].to_numpy(),
    )


def chosen_boost(
    rows: LabelledRows, logits: np.ndarray, utilities: np.ndarray, schema: Schema, config: EvaluationConfig
) -> float:
    """The constant boost: the smallest constant with the highest fresh Hits@k on the calibration rows.

    Only constants that cost overall Hits@k at most ``BOOST_GUARD`` (relative, same rows) are allowed; without a
    fresh row with an action there is nothing to choose by, and the constant is 0.
    """
    rates = [_hit_rates(judged_of(rows, logits, utilities, boost), schema, config) for boost in BOOSTS]
    fresh, overall = np.array(rates).T
    allowed = overall >= overall[0] * (1 - BOOST_GUARD)
    return BOOSTS[int(np.argmax(np.where(allowed, fresh, -1.0)))]


def _hit_rates(judged: JudgedRows, schema: Schema, config: EvaluationConfig) -> tuple[float, float]:
    """Mean over the actions of fresh and of overall Hits@k; 0 where nothing supports it."""
    hits = evaluate.indicators(judged, schema, config).hits
    fresh, overall = (
        hit.sum(0) / np.maximum(holds.sum(0), 1)
        for holds, hit in (hits[name, MetricName.HITS] for name in (FRESH, ALL))
    )
    return float(fresh.mean()), float(overall.mean())


def _flat(metrics: Evaluation) -> list[dict[str, Any]]:
    """Every metric on all, fresh and warm rows; ``..._per_item`` where each item counts the same."""
    slices, suffix = (ALL, FRESH, WARM), {Weighting.IMPRESSION: "", Weighting.ITEM: "_per_item"}
    return [
        {"metric": m.metric.value + suffix[m.weighting], "slice": m.slice, "action": m.action or "", "value": m.value}
        for m in metrics.metrics
        if m.slice in slices and m.value is not None
    ]


def list_sums(judged: JudgedRows, schema: Schema, config: EvaluationConfig) -> dict[str, np.ndarray]:
    """``sums`` and ``counts`` float32 [U, M * A]: each list's share of every measure of :data:`MEASURES`.

    A measure over a set of lists is the sum of its sums divided by that of its counts, so lists can be resampled.
    U counts all lists, those too short to be ranked included (their rows do have a log loss).
    """
    width, lists = len(schema.actions), int(judged.list_id.max()) + 1
    sums, counts = (np.zeros((lists, len(MEASURES) * width), np.float32) for _ in range(2))
    indicators = evaluate.indicators(judged, schema, config)
    for number, (metric, name) in enumerate(MEASURES):
        block = slice(number * width, (number + 1) * width)
        if metric is MetricName.LOG_LOSS:
            counts[:, block], sums[:, block] = _losses(judged, schema.fresh_days, name, lists)
        elif (name, metric) in indicators.hits:
            counts[indicators.list_id, block], sums[indicators.list_id, block] = indicators.hits[name, metric]
    return {"sums": sums, "counts": counts}


def _losses(judged: JudgedRows, fresh_days: float, name: str, lists: int) -> tuple[np.ndarray, np.ndarray]:
    """Observed labels and summed log loss [U, A] per list on fresh or warm rows."""
    fresh = judged.age_days < fresh_days
    observed = (fresh if name == FRESH else ~fresh)[:, None] & ~np.isnan(judged.labels)
    losses = np.where(observed, statistics.row_losses(judged.probabilities, np.nan_to_num(judged.labels)), 0.0)

    def per_list(values: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(judged.list_id, column, lists) for column in values.T], axis=1)

    return per_list(observed.astype(np.float64)), per_list(losses)


@dataclass(frozen=True)
class TaskResult:
    """What one finished task found."""

    row: str
    seed: int
    rows: str
    parameters: int
    boost: float
    metrics: list[dict[str, Any]]
    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def read(cls, task: Task) -> "TaskResult":
        directory = measures_of(task)
        facts, arrays = read_json(directory / "metrics.json"), load_file(directory / "lists.safetensors")
        return cls(
            task.name,
            task.seed,
            facts["rows"],
            facts["parameters"],
            facts["boost"],
            facts["metrics"],
            arrays["sums"],
            arrays["counts"],
        )

    def value(self, metric: str, name: str, action: str) -> float | None:
        for entry in self.metrics:
            if (entry["metric"], entry["slice"], entry["action"]) == (metric, name, action):
                return float(entry["value"])
        return None


def boosted(task: Task) -> Task:
    """The same predictions judged with a constant boost."""
    return replace(task, boosted=True)
