"""Figures 2a-c, 6a-c, 7a and 7b of the paper from models trained here, each with its numbers and what they say.

Four recipes are trained on the evidence's training days, each once per seed: the baseline and one technique at a time.
What is measured on a trained model is kept in the workspace, so a killed run goes on where it was and more seeds only
add their own.
"""

import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from rich.progress import track

from freshrank.bench.paper import analysis
from freshrank.bench.paper.analysis import How
from freshrank.bench.paper.findings import (
    ABLATED,
    BASELINE,
    MIXUP,
    RESIDUAL,
    SCORE_REG,
    FigureData,
    ModelMeasurements,
    Results,
    figures,
)
from freshrank.bench.paper.rows import BASELINE as TABLE_BASELINE
from freshrank.bench.paper.rows import ROWS, config_of, layers_of, tuned
from freshrank.config import (
    CalibrationConfig,
    MixupConfig,
    ModelConfig,
    ResidualConfig,
    RunConfig,
    ScoreRegConfig,
    Split,
    TechniquesConfig,
    TrainingConfig,
    WindowConfig,
)
from freshrank.datasets import prepare
from freshrank.datasets.dataset import Dataset
from freshrank.evaluation.metrics import Bools
from freshrank.evaluation.results import ALL, FRESH
from freshrank.export import calibration
from freshrank.features import frames
from freshrank.features.frames import JUDGED_AGE, Frame
from freshrank.pipeline import steps
from freshrank.pipeline.run import Run
from freshrank.schema import IN_EVALUATION, IN_TRAINING
from freshrank.storage.derived import fingerprint_of
from freshrank.storage.files import atomic_write, read_json, write_json
from freshrank.training import batches, loop
from freshrank.training import trained as trained_module

if TYPE_CHECKING:
    from freshrank.datasets.kuairand import Protocol

RECIPES = {
    BASELINE: TechniquesConfig(),
    RESIDUAL: TechniquesConfig(residual=ResidualConfig()),
    SCORE_REG: TechniquesConfig(score_reg=ScoreRegConfig()),
    MIXUP: TechniquesConfig(mixup=MixupConfig()),
}
_REMOVED: dict[How, str] = {
    "missing": "encoded as a missing value; an item's id becomes that of a new item, a sequence an empty one",
    "permuted": "shuffled among the user-days, item-days or impressions that carry it",
}


# ---------------------------------------------------------------- data and measurements


@dataclass(frozen=True)
class FigureEvidence:
    """The rows of the evidence's windows: train, calibrate on the day after, judge the three days after that."""

    run: Run
    split: Split
    train: Frame
    calibration: Frame
    evaluation: Frame

    @property
    def actions(self) -> list[str]:
        return self.run.dataset.schema.actions

    def base(self, seed: int) -> RunConfig:
        """The baseline's settings that `freshrank bench tune` found for this protocol, which table 1 uses as well."""
        protocol, row = self.run.dataset.manifest["source"].get("protocol", ""), ROWS[TABLE_BASELINE]
        return config_of(row, seed, *layers_of(row, tuned(protocol)))

    @cached_property
    def slices(self) -> dict[str, Bools]:
        age = self.evaluation.rows[JUDGED_AGE].to_numpy()
        return {ALL: np.ones(len(age), np.bool_), FRESH: age < self.run.dataset.schema.fresh_days}


def load_evidence(data: Path, protocol: "Protocol", train_days: int = 10, evaluation_days: int = 3) -> FigureEvidence:
    """``data``: an imported dataset, or KuaiRand's files, which are imported into the workspace first.

    The last ``evaluation_days`` of the log are judged, the day before calibrates, ``train_days`` before that (fewer
    where the log is shorter) train. Snapshots that are missing are built.
    """
    path = prepare.prepare(data, protocol)
    dataset = Dataset.open(path)
    run_date = dataset.days[-1] + timedelta(days=1)
    available = (run_date - dataset.days[0]).days - evaluation_days - 1
    windows = WindowConfig(train_days=max(1, min(train_days, available)), evaluation_days=evaluation_days)
    steps.build_features(path, run_date.isoformat(), windows)
    run, split = Run(path, run_date.isoformat()), windows.split(run_date)
    loaded = [
        frames.load_frame(run.dataset, run.workspace, run.days(days, what, usages), usages)
        for days, what, usages in (
            (split.train, "training", IN_TRAINING),
            (split.calibration, "calibration", IN_TRAINING),
            (split.evaluation, "evaluation", IN_EVALUATION),
        )
    ]
    return FigureEvidence(run, split, *loaded)


def measure_all(evidence: FigureEvidence, seeds: int, ablation: How = "missing") -> list[ModelMeasurements]:
    """Every recipe with every seed 0 .. ``seeds`` - 1; a progress bar where a person watches."""
    jobs = [(recipe, seed) for seed in range(seeds) for recipe in RECIPES]
    shown = track(jobs, "models trained and analysed", disable=not sys.stderr.isatty())
    return [measured(evidence, recipe, seed, ablation) for recipe, seed in shown]


def measured(evidence: FigureEvidence, recipe: str, seed: int, ablation: How = "missing") -> ModelMeasurements:
    """From the workspace when it was measured before with this data, configuration and code."""
    base, technique = evidence.base(seed), RECIPES[recipe]
    model, fit = base.model, base.training
    split = evidence.split
    days = [*split.train, *split.calibration, *split.evaluation]
    sections = [section.model_dump(mode="json") for section in (model, technique, fit)]
    inputs = {
        "data": evidence.run.read(days),
        "days": days,
        "sections": sections,
        "ablation": ablation if recipe in ABLATED else None,
    }
    key = fingerprint_of(inputs, frames.load_frame, _measure)
    path = evidence.run.workspace.steps / "figures" / f"{recipe}-{seed}-{key}.json"
    if not path.exists():
        measurement = _measure(evidence, recipe, model, technique, fit, ablation)
        write_json(path, measurement.model_dump(mode="json"))
    return ModelMeasurements.model_validate(read_json(path))


def _measure(
    evidence: FigureEvidence,
    recipe: str,
    model: ModelConfig,
    technique: TechniquesConfig,
    fit: TrainingConfig,
    how: How,
) -> ModelMeasurements:
    schema, items = evidence.run.dataset.schema, evidence.run.dataset.items()
    watch = analysis.GradientWatch()
    trained = loop.train_ranker(evidence.train, items, schema, model, technique, fit, watch)
    platt = calibration.fit_platt(
        trained_module.predict(trained, evidence.calibration, items),
        batches.labels_of(evidence.calibration, schema),
        schema.actions,
        CalibrationConfig(),
    )
    probe = analysis.Probe.of(trained, evidence.evaluation, items)
    labels = batches.labels_of(evidence.evaluation, schema)
    features = analysis.removals(trained.encoder) if recipe in ABLATED else []
    tries = (analysis.by_group(features), analysis.one_by_one(features)) if features else ({}, {})
    by_group, by_feature = (analysis.drops(probe, each, labels, evidence.slices, how, fit.seed) for each in tries)
    z, probabilities = probe.z(), platt.probabilities(probe.logits())
    held = {name: rows for name, rows in evidence.slices.items() if rows.sum() > 1}
    return ModelMeasurements(
        recipe=recipe,
        seed=fit.seed,
        gradients=watch.seen,
        scores=analysis.score_groups(probabilities, labels, evidence.slices[FRESH], schema.actions),
        variance={name: analysis.explained_variance(z[rows]).tolist() for name, rows in held.items()},
        by_group=by_group,
        by_feature=by_feature,
    )


# ---------------------------------------------------------------- output


def run(
    data: Path, protocol: "Protocol", seeds: int, out: Path, ablation: How = "missing"
) -> tuple[Path, list[FigureData]]:
    """Measure what is missing, write everything into ``out``; the page's path and the figures."""
    evidence = load_evidence(data, protocol)
    drawn = figures(Results(measure_all(evidence, seeds, ablation), evidence.actions))
    return write(drawn, markdown(drawn, evidence, seeds, ablation), out), drawn


def write(drawn: list[FigureData], page: str, out: Path) -> Path:
    """``figure-*.csv`` and ``.png`` and ``figures.md`` into ``out``; the path of the last."""
    from freshrank.bench.paper.figure_plots import png

    for figure in drawn:
        with atomic_write(out / f"figure-{figure.name}.csv") as path:
            figure.table.with_columns(pl.col(pl.Float64).round_sig_figs(6)).write_csv(path)
        with atomic_write(out / f"figure-{figure.name}.png") as path:
            path.write_bytes(png(figure.name, figure.table))
    with atomic_write(out / "figures.md") as path:
        path.write_text(page)
    return out / "figures.md"


def markdown(drawn: list[FigureData], evidence: FigureEvidence, seeds: int, ablation: How = "missing") -> str:
    """The page: how it was measured, a table of outcomes, then every figure with its sentence."""
    split, schema = evidence.split, evidence.run.dataset.schema
    outcomes = "\n".join(f"| [{f.name}](#figure-{f.name}) | {f.title} | {f.claim.outcome} |" for f in drawn)
    sections = "\n\n".join(_section(figure) for figure in drawn)
    trained, judged = (f"{part[0]} .. {part[-1]}" for part in (split.train, split.evaluation))
    fresh = int(evidence.slices[FRESH].sum())
    return f"""# The paper's figures, measured here

Written by `freshrank bench figures`; do not edit.

- Data: `{schema.name}`; trained on {trained} ({len(evidence.train.rows):,} rows), calibrated on {split.calibration[0]},
  judged on {judged} ({len(evidence.evaluation.rows):,} rows, {fresh:,} of them on items younger than
  {schema.fresh_days:g} days, called fresh or cold).
- Settings beside the technique are those of table 1's baseline: {_settings(evidence.base(0))}; techniques have the
  paper's values.
- Seeds per model: {seeds}. Every number is the mean over seeds with its 95% t interval; differences are paired by seed.
- What the paper found is written as inequalities; the intervals alone decide (`freshrank/bench/paper/claims.py`).

| figure | what | the paper's finding |
|---|---|---|
{outcomes}

{sections}

## Definitions

- **Removed**, at inference, on the evaluation rows: {_REMOVED[ablation]}.
- **Historical**: counters, rates, affinities, sequence, item id. **Non-historical**: content, profile, context, age.
- **Delta PR-AUC**: after the removal minus before.
- **Gradient**: l2 norm of d loss / d x per row, averaged over the batch, every fifth step; x_h is the vector of all
  historical groups, x_nh of all others. The CSV also holds each group, and the ratio of the mean norms of groups.
- **Score gap**: (mean warm - mean cold) / mean warm of the calibrated predictions, by action and label.
- **Explained variance**: principal components of z (the interaction module's output), centred, not scaled; the
  effective rank is exp(entropy) of their shares.
"""


def _settings(base: RunConfig) -> str:
    loop = base.training
    return (
        f"batches of {loop.batch_size}, learning rate {loop.learning_rate:g}, {loop.epochs} epoch(s), "
        f"item age '{base.model.item_age}'"
    )


def _section(figure: FigureData) -> str:
    name, title = figure.name, figure.title
    sentences = " ".join(filter(None, (str(figure.claim), figure.note)))
    return (
        f"## Figure {name}\n\n{title}.\n\n![{title}](figure-{name}.png)\n\n{sentences}\n\n"
        f"Numbers: [figure-{name}.csv](figure-{name}.csv)."
    )
