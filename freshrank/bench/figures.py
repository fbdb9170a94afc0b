"""Figures 2a-c, 6a-c, 7a and 7b of the paper from models trained here, each with its numbers and what they say.

Four recipes are trained on the evidence's training days, each once per seed: the baseline and one technique at a time.
What is measured on a trained model is kept in the workspace, so a killed run goes on where it was and more seeds only
add their own.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict
from rich.progress import track

from freshrank import analysis, calibration, daily, encoding, frames, history, steps, training
from freshrank.analysis import Drop, GradientNorms, How, ScoreGroup
from freshrank.bench.claims import Claim, Estimate, Expectation
from freshrank.config import (
    CalibrationConfig,
    MixupConfig,
    ModelConfig,
    ResidualConfig,
    ScoreRegConfig,
    Split,
    TechniquesConfig,
    TrainingConfig,
    WindowConfig,
)
from freshrank.datasets.contract import Dataset
from freshrank.evaluation import ALL, FRESH
from freshrank.frames import JUDGED_AGE, Frame
from freshrank.models import inputs, ranker
from freshrank.schema import IN_EVALUATION, IN_TRAINING, Group
from freshrank.statistics import Bools
from freshrank.storage import atomic_write, fingerprint, read_json, sha256_of, write_json
from freshrank.techniques import mixup, residual, score_reg

if TYPE_CHECKING:
    from freshrank.datasets.kuairand import Protocol

BASELINE, RESIDUAL, SCORE_REG, MIXUP = "baseline", "residual", "score_reg", "mixup"
RECIPES = {
    BASELINE: TechniquesConfig(),
    RESIDUAL: TechniquesConfig(residual=ResidualConfig()),
    SCORE_REG: TechniquesConfig(score_reg=ScoreRegConfig()),
    MIXUP: TechniquesConfig(mixup=MixupConfig()),
}
ABLATED = (BASELINE, RESIDUAL)
"""Recipes whose features are removed one by one (figures 2a and 6a)."""
RATIO = "ratio"
PARTS_OF_TRAINING = 10
_CODE = (analysis, calibration, encoding, frames, history, training, inputs, ranker, mixup, residual, score_reg)
_REMOVED: dict[How, str] = {
    "missing": "encoded as a missing value; an item's id becomes that of a new item, a sequence an empty one",
    "permuted": "shuffled among the user-days, item-days or impressions that carry it",
}
_GROUPS = {group.value: f"{group.value} removed" for group in Group}


# ---------------------------------------------------------------- data and measurements


@dataclass(frozen=True)
class Evidence:
    """The rows of the evidence's windows: train, calibrate on the day after, judge the three days after that."""

    run: steps.Run
    split: Split
    train: Frame
    calibration: Frame
    evaluation: Frame

    @property
    def actions(self) -> list[str]:
        return self.run.dataset.schema.actions

    @cached_property
    def slices(self) -> dict[str, Bools]:
        age = self.evaluation.rows[JUDGED_AGE].to_numpy()
        return {ALL: np.ones(len(age), np.bool_), FRESH: age < self.run.dataset.schema.fresh_days}


def load_evidence(data: Path, protocol: "Protocol", train_days: int = 10, evaluation_days: int = 3) -> Evidence:
    """``data``: an imported dataset, or KuaiRand's files, which are imported into the workspace first.

    The last ``evaluation_days`` of the log are judged, the day before calibrates, ``train_days`` before that (fewer
    where the log is shorter) train. Snapshots that are missing are built.
    """
    path = daily.prepare(data, protocol)
    dataset = Dataset.open(path)
    run_date = dataset.days[-1] + timedelta(days=1)
    available = (run_date - dataset.days[0]).days - evaluation_days - 1
    windows = WindowConfig(train_days=max(1, min(train_days, available)), evaluation_days=evaluation_days)
    steps.build_features(path, run_date.isoformat(), windows.model_dump_json())
    run, split = steps.Run(path, run_date.isoformat()), windows.split(run_date)
    loaded = [
        frames.load_frame(run.dataset, run.workspace, run.days(days, what, usages), usages)
        for days, what, usages in (
            (split.train, "training", IN_TRAINING),
            (split.calibration, "calibration", IN_TRAINING),
            (split.evaluation, "evaluation", IN_EVALUATION),
        )
    ]
    return Evidence(run, split, *loaded)


class Measured(BaseModel):
    """All that the figures need of one trained model."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    seed: int
    gradients: list[GradientNorms]
    scores: list[ScoreGroup]
    variance: dict[str, list[float]]
    """Slice -> share per principal component of z."""
    by_group: list[Drop] = []
    by_feature: list[Drop] = []


def measure_all(evidence: Evidence, seeds: int, ablation: How = "missing") -> list[Measured]:
    """Every recipe with every seed 0 .. ``seeds`` - 1; a progress bar where a person watches."""
    jobs = [(recipe, seed) for seed in range(seeds) for recipe in RECIPES]
    shown = track(jobs, "models trained and analysed", disable=not sys.stderr.isatty())
    return [measured(evidence, recipe, seed, ablation) for recipe, seed in shown]


def measured(evidence: Evidence, recipe: str, seed: int, ablation: How = "missing") -> Measured:
    """From the workspace when it was measured before with this data, configuration and code."""
    model, technique, fit = ModelConfig(), RECIPES[recipe], TrainingConfig(seed=seed)
    split = evidence.split
    days = [*split.train, *split.calibration, *split.evaluation]
    code = [sha256_of(Path(inspect.getfile(module))) for module in _CODE]
    sections = [section.model_dump(mode="json") for section in (model, technique, fit)]
    key = fingerprint({"data": evidence.run.read(days), "days": days, "sections": sections, "code": code,
                       "ablation": ablation if recipe in ABLATED else None})  # fmt: skip
    path = evidence.run.workspace.steps / "figures" / f"{recipe}-{seed}-{key}.json"
    if not path.exists():
        found = _measure(evidence, recipe, model, technique, fit, ablation)
        write_json(path, found.model_dump(mode="json"))
    return Measured.model_validate(read_json(path))


def _measure(
    evidence: Evidence, recipe: str, model: ModelConfig, technique: TechniquesConfig, fit: TrainingConfig, how: How
) -> Measured:
    schema, items = evidence.run.dataset.schema, evidence.run.dataset.items()
    watch = analysis.GradientWatch()
    trained = training.train_ranker(evidence.train, items, schema, model, technique, fit, watch)
    platt = calibration.fit_platt(
        training.predict(trained, evidence.calibration, items),
        training.labels_of(evidence.calibration, schema),
        schema.actions,
        CalibrationConfig(),
    )
    probe, labels = (
        analysis.Probe.of(trained, evidence.evaluation, items),
        training.labels_of(evidence.evaluation, schema),
    )
    features = analysis.removals(trained.encoder) if recipe in ABLATED else []
    tries = (analysis.by_group(features), analysis.one_by_one(features)) if features else ({}, {})
    by_group, by_feature = (analysis.drops(probe, each, labels, evidence.slices, how, fit.seed) for each in tries)
    z, probabilities = probe.z(), platt.probabilities(probe.logits())
    return Measured(
        recipe=recipe,
        seed=fit.seed,
        gradients=watch.seen,
        scores=analysis.score_groups(probabilities, labels, evidence.slices[FRESH], schema.actions),
        variance={name: analysis.explained_variance(z[rows]).tolist() for name, rows in evidence.slices.items()},
        by_group=by_group,
        by_feature=by_feature,
    )


# ---------------------------------------------------------------- from measurements to figures

Value = tuple[dict[str, Any], int, float | None]
"""Key columns, seed, value."""


@dataclass(frozen=True)
class Results:
    """Measurements of all recipes and seeds."""

    measured: list[Measured]
    actions: list[str]

    def of(self, recipe: str) -> list[Measured]:
        """In the order of seeds."""
        return sorted((m for m in self.measured if m.recipe == recipe), key=lambda m: m.seed)

    def paired(self, recipe: str, quantity: Callable[[Measured], float | None]) -> Estimate:
        """``recipe`` minus baseline, seed by seed."""
        pairs = zip(self.of(recipe), self.of(BASELINE), strict=True)
        values = [(quantity(ours), quantity(theirs)) for ours, theirs in pairs]
        return Estimate.over([None if a is None or b is None else a - b for a, b in values])

    def estimate(self, recipe: str, quantity: Callable[[Measured], float | None]) -> Estimate:
        return Estimate.over([quantity(m) for m in self.of(recipe)])


def tabled(values: Iterable[Value]) -> pl.DataFrame:
    """Key columns, then mean, low, high and seeds; one row per key in the order of first appearance."""
    keyed: dict[tuple[Any, ...], tuple[dict[str, Any], list[float | None]]] = {}
    for key, _, value in values:
        keyed.setdefault(tuple(key.values()), (key, []))[1].append(value)
    rows = [key | Estimate.over(found).model_dump() for key, found in keyed.values()]
    numbers = {"mean": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(rows, schema_overrides=numbers, infer_schema_length=None)


@dataclass(frozen=True)
class FigureData:
    """A figure's numbers and what they say; the picture is drawn from ``table`` alone."""

    name: str
    title: str
    table: pl.DataFrame
    claim: Claim
    note: str = ""


def figures(results: Results) -> list[FigureData]:
    """All eight, in the paper's order."""
    return [build(results) for build in (_figure_2a, _figure_2b, _figure_2c, _figure_6a, _figure_6b, _figure_6c,
                                         _figure_7a, _figure_7b)]  # fmt: skip


def _delta(found: Sequence[Drop], removed: str, slice: str, action: str) -> float | None:
    return next((d.delta for d in found if (d.removed, d.slice, d.action) == (removed, slice, action)), None)


def ablation_ratio(found: Sequence[Drop], slice: str, action: str) -> float | None:
    """Delta PR-AUC without non-historical features / without historical ones; None where history is of no use."""
    history, other = (_delta(found, g.value, slice, action) for g in (Group.HISTORICAL, Group.NON_HISTORICAL))
    return None if history is None or other is None or history >= 0 else other / history


def _ratio_of(action: str) -> Callable[[Measured], float | None]:
    return lambda m: ablation_ratio(m.by_group, ALL, action)


def _figure_2a(results: Results) -> FigureData:
    values: list[Value] = []
    for m in results.of(BASELINE):
        for slice in (ALL, FRESH):
            for action in results.actions:
                key = {"slice": slice, "action": action}
                values += [(key | {"quantity": label}, m.seed, _delta(m.by_group, group, slice, action))
                           for group, label in _GROUPS.items()]  # fmt: skip
                values.append((key | {"quantity": RATIO}, m.seed, ablation_ratio(m.by_group, slice, action)))
    expectations = [
        Expectation(name=action, side="below", bound=1, form="percent",
                    estimate=results.estimate(BASELINE, _ratio_of(action)))
        for action in results.actions
    ]  # fmt: skip
    paper = ("the PR-AUC lost without the non-historical features stays well below 100% of what is lost without the "
             "historical ones.")  # fmt: skip
    return FigureData("2a", "PR-AUC lost when a whole group of features is removed at inference", tabled(values),
                      Claim(paper=paper, expectations=tuple(expectations)))  # fmt: skip


def ratio_by_part(gradients: Sequence[GradientNorms]) -> list[float]:
    """Gradient ratio in each tenth of the training (mean over its measured steps; fewer parts with fewer steps)."""
    parts = np.array_split([norms.ratio for norms in gradients], min(PARTS_OF_TRAINING, len(gradients)))
    return [float(part.mean()) for part in parts]


def _gradient_values(found: Iterable[Measured]) -> list[Value]:
    values: list[Value] = []
    for m in found:
        for norms in m.gradients:
            named = {RATIO: norms.ratio, "ratio of mean group norms": norms.group_ratio,
                     "norm: historical": norms.historical, "norm: non_historical": norms.non_historical}  # fmt: skip
            named |= {f"norm: {name}": norm for name, norm in norms.groups.items()}
            values += [({"recipe": m.recipe, "quantity": name, "step": norms.step}, m.seed, value)
                       for name, value in named.items()]  # fmt: skip
    return values


def _mean_ratio(m: Measured) -> float:
    return float(np.mean([norms.ratio for norms in m.gradients]))


def _figure_2b(results: Results) -> FigureData:
    expectations = (
        Expectation(name="mean over training", side="below", bound=1,
                    estimate=results.estimate(BASELINE, _mean_ratio)),
        Expectation(name="highest tenth of training", side="below", bound=1,
                    estimate=results.estimate(BASELINE, lambda m: max(ratio_by_part(m.gradients)))),
    )  # fmt: skip
    paper = (
        "the gradient of the non-historical features is smaller than that of the historical ones all through training."
    )
    return FigureData("2b", "Ratio of gradient norms during training, baseline", tabled(_gradient_values(
        results.of(BASELINE))), Claim(paper=paper, expectations=expectations))  # fmt: skip


def _gap(action: str, label: int) -> Callable[[Measured], float | None]:
    return lambda m: analysis.score_gaps(m.scores).get((action, label))


def _size_of_gap(action: str, label: int) -> Callable[[Measured], float | None]:
    def size(m: Measured) -> float | None:
        gap = _gap(action, label)(m)
        return None if gap is None else abs(gap)

    return size


def _figure_2c(results: Results) -> FigureData:
    values: list[Value] = []
    for m in results.of(BASELINE):
        for group in m.scores:
            key = {"action": group.action, "label": group.label, "items": "cold" if group.cold else "warm"}
            named = {"mean": group.mean} | dict(zip((f"q{round(100 * q):02d}" for q in analysis.QUANTILES),
                                                    group.quantiles, strict=True))  # fmt: skip
            values += [(key | {"quantity": name, "rows": group.rows}, m.seed, value) for name, value in named.items()]
    expectations = [Expectation(name=f"{action} positives", side="above", form="percent",
                                estimate=results.estimate(BASELINE, _gap(action, 1)))
                    for action in results.actions]  # fmt: skip
    paper = "cold positives are scored 8-14% lower than warm positives, for every action."
    return FigureData("2c", "Predicted scores of warm and cold items, by what really happened, baseline",
                      tabled(values), Claim(paper=paper, expectations=tuple(expectations)),
                      note=observed_rates(results.of(BASELINE)[0].scores, results.actions))  # fmt: skip


def observed_rates(scores: Sequence[ScoreGroup], actions: Sequence[str]) -> str:
    """What a score gap is to be read against: the share of warm and of cold rows with each action."""
    rows = {(s.action, s.cold, s.label): s.rows for s in scores}

    def rate(action: str, cold: bool) -> str:
        positives, negatives = (rows.get((action, cold, label), 0) for label in (1, 0))
        return f"{positives / (positives + negatives):.3f}" if positives + negatives else "unknown"

    each = "; ".join(f"{a} {rate(a, False)} on warm items, {rate(a, True)} on cold ones" for a in actions)
    return f"Observed rates of the same rows: {each}."


def mean_delta(m: Measured, group: Group, action: str) -> float | None:
    """Mean over the single features of a group of Delta PR-AUC on all rows."""
    found = [d.delta for d in m.by_feature if (d.group, d.slice, d.action) == (group, ALL, action)]
    return float(np.mean(found)) if found else None


def _figure_6a(results: Results) -> FigureData:
    values: list[Value] = [
        ({"recipe": m.recipe, "slice": d.slice, "action": d.action, "group": d.group.value, "feature": d.removed},
         m.seed, d.delta)
        for recipe in ABLATED for m in results.of(recipe) for d in m.by_feature
    ]  # fmt: skip
    action = results.actions[0]
    expectation = Expectation(
        name=f"mean change of Delta PR-AUC ({action}) over the non-historical features", side="below", form="change",
        estimate=results.paired(RESIDUAL, lambda m: mean_delta(m, Group.NON_HISTORICAL, action)),
    )  # fmt: skip
    paper = ("with Residual the distribution of Delta PR-AUC over single non-historical features shifts left: losing "
             "one costs more.")  # fmt: skip
    return FigureData("6a", f"Delta PR-AUC ({action}) when one feature is removed, baseline against Residual",
                      tabled(values), Claim(paper=paper, expectations=(expectation,)))  # fmt: skip


def _least_gain(ours: Measured, theirs: Measured) -> float:
    parts = zip(ratio_by_part(ours.gradients), ratio_by_part(theirs.gradients), strict=True)
    return min(a - b for a, b in parts)


def _figure_6b(results: Results) -> FigureData:
    pairs = list(zip(results.of(RESIDUAL), results.of(BASELINE), strict=True))
    expectations = (
        Expectation(name="Residual minus baseline, mean over training", side="above", form="change",
                    estimate=results.paired(RESIDUAL, _mean_ratio)),
        Expectation(name="in the tenth of training where it is least", side="above", form="change",
                    estimate=Estimate.over([_least_gain(ours, theirs) for ours, theirs in pairs])),
    )  # fmt: skip
    values = _gradient_values([*results.of(BASELINE), *results.of(RESIDUAL)])
    paper = "Residual raises the ratio of non-historical to historical gradients consistently."
    return FigureData("6b", "Ratio of gradient norms during training, baseline against Residual", tabled(values),
                      Claim(paper=paper, expectations=expectations))  # fmt: skip


def _figure_6c(results: Results) -> FigureData:
    cells = [(action, label) for action in results.actions for label in (1, 0)]
    values: list[Value] = [
        ({"recipe": m.recipe, "action": action, "label": label}, m.seed, _gap(action, label)(m))
        for recipe in (BASELINE, SCORE_REG) for m in results.of(recipe) for action, label in cells
    ]  # fmt: skip
    expectations = [
        Expectation(name=f"change of the gap's size, {action} {'positives' if label else 'negatives'}", side="below",
                    form="points", estimate=results.paired(SCORE_REG, _size_of_gap(action, label)))
        for action, label in cells
    ]  # fmt: skip
    paper = "ScoreReg narrows the score gap for positives and negatives of every action (one from 13.65% to 0.53%)."
    return FigureData("6c", "Score gap between warm and cold items, baseline against ScoreReg", tabled(values),
                      Claim(paper=paper, expectations=tuple(expectations)))  # fmt: skip


def _variance_values(results: Results, cumulative: bool) -> list[Value]:
    return [
        ({"recipe": m.recipe, "slice": slice, "component": component}, m.seed, float(value))
        for recipe in (BASELINE, MIXUP) for m in results.of(recipe) for slice, shares in m.variance.items()
        for component, value in enumerate(np.cumsum(shares) if cumulative else shares, start=1)
    ]  # fmt: skip


def _figure_7a(results: Results) -> FigureData:
    expectation = Expectation(name="share of the first component, Mixup minus baseline", side="below", form="points",
                              estimate=results.paired(MIXUP, lambda m: m.variance[ALL][0]))  # fmt: skip
    paper = "with Mixup fewer directions dominate: the leading components of z explain less of its variance."
    return FigureData("7a", "Explained variance of z per principal component, baseline against Mixup",
                      tabled(_variance_values(results, cumulative=False)),
                      Claim(paper=paper, expectations=(expectation,)))  # fmt: skip


def _effective_rank(m: Measured) -> float:
    return analysis.effective_rank(np.asarray(m.variance[ALL]))


def _figure_7b(results: Results) -> FigureData:
    expectation = Expectation(name="effective rank, Mixup minus baseline", side="above", form="change",
                              estimate=results.paired(MIXUP, _effective_rank))  # fmt: skip
    paper = "with Mixup the cumulative curve rises more slowly: z has a higher rank."
    return FigureData("7b", "Cumulative explained variance of z, baseline against Mixup",
                      tabled(_variance_values(results, cumulative=True)),
                      Claim(paper=paper, expectations=(expectation,)))  # fmt: skip


# ---------------------------------------------------------------- output


def run(
    data: Path, protocol: "Protocol", seeds: int, out: Path, ablation: How = "missing"
) -> tuple[Path, list[FigureData]]:
    """Measure what is missing, write everything into ``out``; the page's path and the figures."""
    evidence = load_evidence(data, protocol)
    found = figures(Results(measure_all(evidence, seeds, ablation), evidence.actions))
    return write(found, markdown(found, evidence, seeds, ablation), out), found


def write(found: list[FigureData], page: str, out: Path) -> Path:
    """``figure-*.csv`` and ``.png`` and ``figures.md`` into ``out``; the path of the last."""
    from freshrank.bench.pictures import png

    for figure in found:
        with atomic_write(out / f"figure-{figure.name}.csv") as path:
            figure.table.with_columns(pl.col(pl.Float64).round_sig_figs(6)).write_csv(path)
        with atomic_write(out / f"figure-{figure.name}.png") as path:
            path.write_bytes(png(figure.name, figure.table))
    with atomic_write(out / "figures.md") as path:
        path.write_text(page)
    return out / "figures.md"


def markdown(found: list[FigureData], evidence: Evidence, seeds: int, ablation: How = "missing") -> str:
    """The page: how it was measured, a table of outcomes, then every figure with its sentence."""
    split, schema = evidence.split, evidence.run.dataset.schema
    outcomes = "\n".join(f"| [{f.name}](#figure-{f.name}) | {f.title} | {f.claim.outcome} |" for f in found)
    sections = "\n\n".join(
        f"## Figure {f.name}\n\n{f.title}.\n\n![{f.title}](figure-{f.name}.png)\n\n{f.claim} {f.note}\n\n"
        f"Numbers: [figure-{f.name}.csv](figure-{f.name}.csv)."
        for f in found
    )
    return f"""# The paper's figures, measured here

Written by `freshrank bench figures`; do not edit. Data: `{schema.name}`, trained on {split.train[0]} ..
{split.train[-1]} ({len(evidence.train.rows):,} rows), calibrated on {split.calibration[0]}, judged on
{split.evaluation[0]} .. {split.evaluation[-1]} ({len(evidence.evaluation.rows):,} rows,
{int(evidence.slices[FRESH].sum()):,} on fresh items, younger than {schema.fresh_days:g} days). Each model is trained
with {seeds} seeds; every number is their mean with its 95% t interval, and differences are paired by seed. An outcome is
decided by these intervals alone (`freshrank/bench/claims.py`).

| figure | what | the paper's finding |
|---|---|---|
{outcomes}

{sections}

## Definitions

- **Removed**, at inference, on the evaluation rows: {_REMOVED[ablation]}. Historical: counters, rates, affinities, sequence, item id. Non-historical:
  content, profile, context, item age. Delta PR-AUC is after minus before.
- **Gradient**: l2 norm of d loss / d x per row, averaged over the batch, every fifth step; x_h is the vector of all
  historical groups, x_nh of all others. The CSV also holds each group, and the ratio of the mean norms of groups.
- **Score gap**: (mean warm - mean cold) / mean warm of the calibrated predictions, by action and label.
- **Explained variance**: principal components of z (the interaction module's output), centred, not scaled; the
  effective rank is exp(entropy) of their shares.
"""
