"""From measurements of trained models to the paper's figures: each a table of numbers and a claim decided by them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict

from freshrank.bench.paper import analysis
from freshrank.bench.paper.analysis import Drop, GradientNorms, ScoreGroup
from freshrank.bench.paper.claims import Claim, Expectation, SeedMean
from freshrank.evaluation.results import ALL, FRESH
from freshrank.schema import FeatureGroup

BASELINE, RESIDUAL, SCORE_REG, MIXUP = "baseline", "residual", "score_reg", "mixup"
ABLATED = (BASELINE, RESIDUAL)
"""Recipes whose features are removed (figures 2a and 6a)."""
RATIO = "ratio"
PARTS_OF_TRAINING = 10
_GROUPS = {group.value: f"{group.value} removed" for group in FeatureGroup}


class ModelMeasurements(BaseModel):
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


Value = tuple[dict[str, Any], float | None]
"""Key columns, and the value on one seed."""


Quantity = Callable[[ModelMeasurements], float | None]


@dataclass(frozen=True)
class Results:
    """Measurements of all recipes and seeds."""

    measured: list[ModelMeasurements]
    actions: list[str]

    def of(self, recipe: str) -> list[ModelMeasurements]:
        """In the order of seeds."""
        return sorted((m for m in self.measured if m.recipe == recipe), key=lambda m: m.seed)

    def paired(self, recipe: str, quantity: Quantity) -> SeedMean:
        """``recipe`` minus baseline, seed by seed."""
        pairs = zip(self.of(recipe), self.of(BASELINE), strict=True)
        values = [(quantity(ours), quantity(theirs)) for ours, theirs in pairs]
        return SeedMean.over([None if a is None or b is None else a - b for a, b in values])

    def estimate(self, recipe: str, quantity: Quantity) -> SeedMean:
        return SeedMean.over([quantity(m) for m in self.of(recipe)])

    def change(
        self, recipe: str, name: str, quantity: Quantity, side: Literal["below", "above"], percent: bool = False
    ) -> Expectation:
        """The paired difference lies on ``side`` of 0; its name also says both means."""
        means = [self.estimate(each, quantity).mean for each in (BASELINE, recipe)]
        before, after = ("none" if m is None else f"{m:.1%}" if percent else f"{m:.3g}" for m in means)
        return Expectation(
            name=f"{name} {before} -> {after}, change",
            side=side,
            form="points" if percent else "change",
            estimate=self.paired(recipe, quantity),
        )


def tabled(values: Iterable[Value]) -> pl.DataFrame:
    """Key columns, then mean, low, high and seeds; one row per key in the order of first appearance."""
    keyed: dict[tuple[Any, ...], tuple[dict[str, Any], list[float | None]]] = {}
    for key, value in values:
        keyed.setdefault(tuple(key.values()), (key, []))[1].append(value)
    rows = [key | SeedMean.over(values_by_seed).model_dump() for key, values_by_seed in keyed.values()]
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
    return [
        build(results)
        for build in (_figure_2a, _figure_2b, _figure_2c, _figure_6a, _figure_6b, _figure_6c, _figure_7a, _figure_7b)
    ]


def _delta(drops: Sequence[Drop], removed: str, slice: str, action: str) -> float | None:
    return next((d.delta for d in drops if (d.removed, d.slice, d.action) == (removed, slice, action)), None)


def ablation_ratio(drops: Sequence[Drop], slice: str, action: str) -> float | None:
    """Delta PR-AUC without non-historical features / without historical ones; None where history is of no use."""
    history, other = (
        _delta(drops, g.value, slice, action) for g in (FeatureGroup.HISTORICAL, FeatureGroup.NON_HISTORICAL)
    )
    return None if history is None or other is None or history >= 0 else other / history


def _ratio_of(action: str) -> Quantity:
    return lambda m: ablation_ratio(m.by_group, ALL, action)


def _figure_2a(results: Results) -> FigureData:
    values: list[Value] = []
    for m in results.of(BASELINE):
        for slice in (ALL, FRESH):
            for action in results.actions:
                key = {"slice": slice, "action": action}
                values += [
                    (key | {"quantity": label}, _delta(m.by_group, group, slice, action))
                    for group, label in _GROUPS.items()
                ]
                values.append((key | {"quantity": RATIO}, ablation_ratio(m.by_group, slice, action)))
    expectations = [
        Expectation(
            name=action, side="below", bound=1, form="percent", estimate=results.estimate(BASELINE, _ratio_of(action))
        )
        for action in results.actions
    ]
    paper = (
        "the PR-AUC lost without the non-historical features stays well below 100% of what is lost without the "
        "historical ones."
    )
    return FigureData(
        "2a",
        "PR-AUC lost when a whole group of features is removed at inference",
        tabled(values),
        Claim(paper=paper, expectations=tuple(expectations)),
    )


def ratio_by_part(gradients: Sequence[GradientNorms]) -> list[float]:
    """Gradient ratio in each tenth of the training (mean over its measured steps; fewer parts with fewer steps)."""
    parts = np.array_split([norms.ratio for norms in gradients], min(PARTS_OF_TRAINING, len(gradients)))
    return [float(part.mean()) for part in parts]


def extreme(per_seed: Sequence[Sequence[float]], pick: Callable[..., SeedMean]) -> SeedMean:
    """The part of training whose mean over seeds is the ``max`` or ``min`` of all parts; [seeds, parts] given.

    Taking each seed's own extreme instead would let noise alone break every "all through training".
    """
    estimates = [SeedMean.over(part) for part in zip(*per_seed, strict=True)]
    return pick(estimates, key=lambda estimate: estimate.mean) if estimates else SeedMean.over([])


def _gradient_values(models: Iterable[ModelMeasurements]) -> list[Value]:
    values: list[Value] = []
    for m in models:
        for norms in m.gradients:
            named = {
                RATIO: norms.ratio,
                "ratio of mean group norms": norms.group_ratio,
                "norm: historical": norms.historical,
                "norm: non_historical": norms.non_historical,
            }
            named |= {f"norm: {name}": norm for name, norm in norms.groups.items()}
            values += [
                ({"recipe": m.recipe, "quantity": name, "step": norms.step}, value) for name, value in named.items()
            ]
    return values


def _mean_ratio(m: ModelMeasurements) -> float:
    return float(np.mean([norms.ratio for norms in m.gradients]))


def _figure_2b(results: Results) -> FigureData:
    expectations = (
        Expectation(name="mean over training", side="below", bound=1, estimate=results.estimate(BASELINE, _mean_ratio)),
        Expectation(
            name="in the tenth of training where it is highest",
            side="below",
            bound=1,
            estimate=extreme([ratio_by_part(m.gradients) for m in results.of(BASELINE)], max),
        ),
    )
    paper = (
        "the gradient of the non-historical features is smaller than that of the historical ones all through training."
    )
    return FigureData(
        "2b",
        "Ratio of gradient norms during training, baseline",
        tabled(_gradient_values(results.of(BASELINE))),
        Claim(paper=paper, expectations=expectations),
    )


def _gap(action: str, label: int) -> Quantity:
    return lambda m: analysis.score_gaps(m.scores).get((action, label))


def _size_of_gap(action: str, label: int) -> Quantity:
    def size(m: ModelMeasurements) -> float | None:
        gap = _gap(action, label)(m)
        return None if gap is None else abs(gap)

    return size


def _figure_2c(results: Results) -> FigureData:
    values: list[Value] = []
    for m in results.of(BASELINE):
        for group in m.scores:
            key = {"action": group.action, "label": group.label, "items": "cold" if group.cold else "warm"}
            named = {"mean": group.mean} | dict(
                zip((f"q{round(100 * q):02d}" for q in analysis.QUANTILES), group.quantiles, strict=True)
            )
            values += [(key | {"quantity": name, "rows": group.rows}, value) for name, value in named.items()]
    expectations = [
        Expectation(
            name=f"{action} positives",
            side="above",
            form="percent",
            estimate=results.estimate(BASELINE, _gap(action, 1)),
        )
        for action in results.actions
    ]
    paper = "cold positives are scored 8-14% lower than warm positives, for every action."
    return FigureData(
        "2c",
        "Predicted scores of warm and cold items, by what really happened, baseline",
        tabled(values),
        Claim(paper=paper, expectations=tuple(expectations)),
        note=observed_rates(results.of(BASELINE)[0].scores, results.actions),
    )


def observed_rates(scores: Sequence[ScoreGroup], actions: Sequence[str]) -> str:
    """What a score gap is to be read against: the share of warm and of cold rows with each action."""
    rows = {(s.action, s.cold, s.label): s.rows for s in scores}

    def rate(action: str, cold: bool) -> str:
        positives, negatives = (rows.get((action, cold, label), 0) for label in (1, 0))
        return f"{positives / (positives + negatives):.3f}" if positives + negatives else "unknown"

    each = "; ".join(f"{a} {rate(a, False)} on warm items, {rate(a, True)} on cold ones" for a in actions)
    return f"Observed rates of the same rows: {each}."


def mean_delta(m: ModelMeasurements, group: FeatureGroup, action: str) -> float | None:
    """Mean over the single features of a group of Delta PR-AUC on all rows."""
    deltas = [d.delta for d in m.by_feature if (d.group, d.slice, d.action) == (group, ALL, action)]
    return float(np.mean(deltas)) if deltas else None


def _figure_6a(results: Results) -> FigureData:
    values: list[Value] = [
        (
            {"recipe": m.recipe, "slice": d.slice, "action": d.action, "group": d.group.value, "feature": d.removed},
            d.delta,
        )
        for recipe in ABLATED
        for m in results.of(recipe)
        for d in m.by_feature
    ]
    action = results.actions[0]
    expectation = results.change(
        RESIDUAL,
        f"mean Delta PR-AUC ({action}) over the non-historical features",
        lambda m: mean_delta(m, FeatureGroup.NON_HISTORICAL, action),
        "below",
    )
    paper = (
        "with Residual the distribution of Delta PR-AUC over single non-historical features shifts left: losing "
        "one costs more."
    )
    return FigureData(
        "6a",
        f"Delta PR-AUC ({action}) when one feature is removed, baseline against Residual",
        tabled(values),
        Claim(paper=paper, expectations=(expectation,)),
    )


def _gains(ours: ModelMeasurements, theirs: ModelMeasurements) -> list[float]:
    parts = zip(ratio_by_part(ours.gradients), ratio_by_part(theirs.gradients), strict=True)
    return [a - b for a, b in parts]


def _figure_6b(results: Results) -> FigureData:
    pairs = list(zip(results.of(RESIDUAL), results.of(BASELINE), strict=True))
    expectations = (
        results.change(RESIDUAL, "mean over training", _mean_ratio, "above"),
        Expectation(
            name="change in the tenth of training where it is least",
            side="above",
            form="change",
            estimate=extreme([_gains(ours, theirs) for ours, theirs in pairs], min),
        ),
    )
    values = _gradient_values([*results.of(BASELINE), *results.of(RESIDUAL)])
    paper = "Residual raises the ratio of non-historical to historical gradients consistently."
    return FigureData(
        "6b",
        "Ratio of gradient norms during training, baseline against Residual",
        tabled(values),
        Claim(paper=paper, expectations=expectations),
    )


def _figure_6c(results: Results) -> FigureData:
    cells = [(action, label) for action in results.actions for label in (1, 0)]
    values: list[Value] = [
        ({"recipe": m.recipe, "action": action, "label": label}, _gap(action, label)(m))
        for recipe in (BASELINE, SCORE_REG)
        for m in results.of(recipe)
        for action, label in cells
    ]
    expectations = [
        results.change(
            SCORE_REG,
            f"{action} {'positives' if label else 'negatives'}, size of the gap",
            _size_of_gap(action, label),
            "below",
            percent=True,
        )
        for action, label in cells
    ]
    paper = "ScoreReg narrows the score gap for positives and negatives of every action (one from 13.65% to 0.53%)."
    return FigureData(
        "6c",
        "Score gap between warm and cold items, baseline against ScoreReg",
        tabled(values),
        Claim(paper=paper, expectations=tuple(expectations)),
    )


def _variance_values(results: Results, cumulative: bool) -> list[Value]:
    return [
        ({"recipe": m.recipe, "slice": slice, "component": component}, float(value))
        for recipe in (BASELINE, MIXUP)
        for m in results.of(recipe)
        for slice, shares in m.variance.items()
        for component, value in enumerate(np.cumsum(shares) if cumulative else shares, start=1)
    ]


def _figure_7a(results: Results) -> FigureData:
    expectation = results.change(
        MIXUP, "share of the first component", lambda m: m.variance[ALL][0], "below", percent=True
    )
    paper = "with Mixup fewer directions dominate: the leading components of z explain less of its variance."
    return FigureData(
        "7a",
        "Explained variance of z per principal component, baseline against Mixup",
        tabled(_variance_values(results, cumulative=False)),
        Claim(paper=paper, expectations=(expectation,)),
    )


def _effective_rank(m: ModelMeasurements) -> float:
    return analysis.effective_rank(np.asarray(m.variance[ALL]))


def _figure_7b(results: Results) -> FigureData:
    expectation = results.change(MIXUP, "effective rank", _effective_rank, "above")
    paper = "with Mixup the cumulative curve rises more slowly: z has a higher rank."
    return FigureData(
        "7b",
        "Cumulative explained variance of z, baseline against Mixup",
        tabled(_variance_values(results, cumulative=True)),
        Claim(paper=paper, expectations=(expectation,)),
    )
