"""The report's pictures as SVG text: the same input gives the same bytes.

Colours are Okabe and Ito's, which colour-blind readers tell apart; line style and marker say the same once more.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from freshrank.evaluation.results import (
    FRESH,
    WARM,
    Comparison,
    Difference,
    Evaluation,
    MetricName,
    WarmUpCurve,
    WarmUpPoint,
    Weighting,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
from freshrank.reports.style import BLUE, GREY, INK, STYLE, VERMILION

_CHAMPION: dict[str, Any] = {"color": GREY, "marker": "s", "linestyle": "--"}
_CHALLENGER: dict[str, Any] = {"color": BLUE, "marker": "o", "linestyle": "-"}
_COMPARABLE = ((MetricName.HITS, Weighting.ITEM), (MetricName.AUC, Weighting.IMPRESSION))
"""Warm-up curves by which one bucket may be compared with another."""


class Picture(BaseModel):
    title: str
    caption: str
    alt: str
    svg: str


def draw(rows: int, columns: int, size: tuple[float, float], paint: Callable[[list["Axes"]], None]) -> str:
    """SVG of ``rows`` x ``columns`` axes that ``paint`` fills; without dates, so equal pictures are equal bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(list(figure.subplots(rows, columns, squeeze=False).flat))
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().decode()


def pictures(
    comparison: Comparison,
    challenger: Evaluation,
    baseline: Evaluation,
    training_curve: Sequence[tuple[int, float]] = (),
) -> list[Picture]:
    """Those the numbers allow, in the report's order; none where nothing could be judged."""
    drawn = [_differences(comparison)] if any(row.difference for row in comparison.rows) else []
    if not challenger.invalid and not baseline.invalid:
        drawn += [
            _hits_by_clock(challenger, baseline),
            *_warm_ups(challenger, baseline),
            _rows_by_age(challenger, baseline),
            _reliability(challenger),
            _score_gap(challenger, baseline),
        ]
    return drawn + ([_training(training_curve)] if training_curve else [])


def row_name(row: Difference, k: int) -> str:
    """``fresh Hits@3, click`` or, for the utility-weighted average, ``fresh Hits@3``; ``fresh log loss, click``."""
    if row.metric is MetricName.LOG_LOSS:
        return f"{row.slice} log loss, {row.action}"
    matched = " at equal exposure" if row.metric is MetricName.MATCHED_HITS else ""
    return f"{row.slice} Hits@{k}{matched}" + (f", {row.action}" if row.action else "")


def _differences(comparison: Comparison) -> Picture:
    known = [(row, row.difference) for row in comparison.rows if row.difference]

    def paint(axes: list["Axes"]) -> None:
        places = range(len(known))[::-1]
        for place, (row, gained) in zip(places, known, strict=True):
            colour, width = (BLUE, 2.6) if row.action is None else (GREY, 1.4)
            axes[0].plot([gained.low, gained.high], [place, place], color=colour, linewidth=width)
            axes[0].plot(gained.value, place, "o", color=colour, markersize=6 if row.action is None else 4)
        axes[0].axvline(0, color=INK, linewidth=1)
        axes[0].set_yticks(list(places), [row_name(row, comparison.k) for row, _ in known])
        axes[0].set_xlabel("challenger minus baseline (right of 0: challenger better)")
        axes[0].margins(x=0.08)

    described = "; ".join(
        f"{row_name(row, comparison.k)} {gained.value:+.3f} ({gained.low:+.3f} to {gained.high:+.3f})"
        for row, gained in known
    )
    return Picture(
        title=f"Difference in Hits@{comparison.k}",
        caption=f"Point and {comparison.confidence:.0%} interval of {comparison.draws:,} paired bootstrap draws over "
        f"lists. Thick: average over the actions weighted by utility.",
        alt=f"Differences, challenger minus baseline: {described}.",
        svg=draw(1, 1, (7.6, 0.9 + 0.3 * len(known)), paint),
    )


def _buckets(evaluation: Evaluation, prefix: str) -> list[str]:
    return [name for name in evaluation.slices if name.startswith(prefix)]


def _line(
    axes: "Axes",
    evaluation: Evaluation,
    metric: MetricName,
    action: str | None,
    prefix: str,
    style: dict[str, Any],
    label: str,
) -> None:
    names = _buckets(evaluation, prefix)
    values = [evaluation.get(metric, name, action).value for name in names]
    axes.plot(range(len(names)), [float("nan") if v is None else v for v in values], label=label, **style)


def _bucket_axis(axes: "Axes", evaluation: Evaluation, metric: MetricName, action: str | None, prefix: str) -> None:
    names = _buckets(evaluation, prefix)
    ranked = metric in (MetricName.HITS, MetricName.NDCG)
    supports = [evaluation.get(metric, name, action).support for name in names]
    counts = [f"{s.lists:,} lists" if ranked else f"{s.rows:,} rows" for s in supports]
    labels = [f"{n.removeprefix(prefix)}\n{count}" for n, count in zip(names, counts, strict=True)]
    axes.set_xticks(range(len(names)), labels, fontsize=7.5)
    axes.set_xlim(-0.4, len(names) - 0.6)


def _pair(
    axes: "Axes", challenger: Evaluation, baseline: Evaluation, metric: MetricName, action: str | None, prefix: str
) -> None:
    _line(axes, baseline, metric, action, prefix, _CHAMPION, "baseline")
    _line(axes, challenger, metric, action, prefix, _CHALLENGER, "challenger")
    _bucket_axis(axes, challenger, metric, action, prefix)


def _hits_by_clock(challenger: Evaluation, baseline: Evaluation) -> Picture:
    def paint(axes: list["Axes"]) -> None:
        for one, prefix, label in (
            (axes[0], "age:", "days since the item was created"),
            (axes[1], "exposures:", "impressions of the item before the day"),
        ):
            _pair(one, challenger, baseline, MetricName.HITS, None, prefix)
            one.set_xlabel(label)
        axes[0].set_ylabel(f"Hits@{challenger.k}")
        axes[0].legend()

    return Picture(
        title=f"Hits@{challenger.k} by age and by exposure",
        caption="Average over the actions weighted by utility; a bucket that no list supports has no point.",
        alt=f"Two line charts of Hits@{challenger.k}. " + _spoken(challenger, baseline, MetricName.HITS, None, "age:"),
        svg=draw(1, 2, (9.2, 3.1), paint),
    )


def _spoken(challenger: Evaluation, baseline: Evaluation, metric: MetricName, action: str | None, prefix: str) -> str:
    def value_text(evaluation: Evaluation, name: str) -> str:
        value = evaluation.get(metric, name, action).value
        return "no value" if value is None else f"{value:.3f}"

    buckets = _buckets(challenger, prefix)
    parts = [
        f"{n.removeprefix(prefix)}: baseline {value_text(baseline, n)}, challenger {value_text(challenger, n)}"
        for n in buckets
    ]
    return f"By {prefix.removesuffix(':')}, {'; '.join(parts)}."


def _warm_ups(challenger: Evaluation, baseline: Evaluation) -> list[Picture]:
    """One picture per action that both models have curves of."""
    curves = {curve.key: curve for curve in baseline.warm_up}
    pairs = [(curve, curves[curve.key]) for curve in challenger.warm_up if curve.key in curves]
    return [
        _warm_up([pair for pair in pairs if pair[0].action == action], action, challenger.k)
        for action in dict.fromkeys(curve.action for curve, _ in pairs)
    ]


def _warm_up(pairs: list[tuple[WarmUpCurve, WarmUpCurve]], action: str, k: int) -> Picture:
    def paint(axes: list["Axes"]) -> None:
        for one, (ours, theirs) in zip(axes, pairs, strict=True):
            _band(one, theirs, _CHAMPION, "baseline")
            _band(one, ours, _CHALLENGER, "challenger")
            one.set_title(_curve_name(ours, k))
            labels = [f"{point.bucket} ({point.support.items:,})" for point in ours.points]
            one.set_xticks(range(len(labels)), labels, fontsize=7, rotation=50, ha="right", rotation_mode="anchor")
        axes[0].legend()

    parts = [
        f"{_curve_name(ours, k)} challenger {ours.warm_from or 'unknown'}, baseline {theirs.warm_from or 'unknown'}"
        for ours, theirs in pairs
        if (ours.metric, ours.weighting) in _COMPARABLE
    ]
    spoken = [
        f"{_curve_name(ours, k)} of the challenger {_points(ours)}; of the baseline {_points(theirs)}."
        for ours, theirs in pairs
    ]
    return Picture(
        title=f"Warm-up of {action}",
        caption="Against the impressions an item had since its birth (in brackets: items), with bootstrap intervals. "
        f"First bucket from which on a model is not clearly worse than in its warmest one: {'; '.join(parts)}. The "
        "other curves also move with the rate of the action and with how many engaged items a list holds.",
        alt=" ".join(spoken),
        svg=draw(-(-len(pairs) // 3), 3, (9.2, 2.6 * -(-len(pairs) // 3)), paint),
    )


def _band(axes: "Axes", curve: WarmUpCurve, style: dict[str, Any], label: str) -> None:
    known = [(place, point.interval) for place, point in enumerate(curve.points) if point.interval]
    places = [place for place, _ in known]
    axes.fill_between(
        places,
        [interval.low for _, interval in known],
        [interval.high for _, interval in known],
        color=style["color"],
        alpha=0.16,
        linewidth=0,
    )
    axes.plot(places, [interval.value for _, interval in known], label=label, markersize=3.5, linewidth=1.3, **style)


def _curve_name(curve: WarmUpCurve, k: int) -> str:
    name = {MetricName.HITS: f"Hits@{k}", MetricName.LOG_LOSS: "log loss", MetricName.PR_AUC: "PR-AUC"}
    per_item = " per item" if curve.weighting is Weighting.ITEM else ""
    return name.get(curve.metric, curve.metric.value.upper()) + per_item


def _points(curve: WarmUpCurve) -> str:
    def value_text(point: WarmUpPoint) -> str:
        return f"{point.bucket}: {f'{point.interval.value:.3f}' if point.interval else 'no value'}"

    return ", ".join(value_text(point) for point in curve.points)


def _rows_by_age(challenger: Evaluation, baseline: Evaluation) -> Picture:
    actions = list(challenger.utilities)
    metrics = ((MetricName.LOG_LOSS, "log loss (lower is better)"), (MetricName.PR_AUC, "PR-AUC (higher is better)"))

    def paint(axes: list["Axes"]) -> None:
        panels = [(action, metric, label) for action in actions for metric, label in metrics]
        for one, (action, metric, label) in zip(axes, panels, strict=True):
            _pair(one, challenger, baseline, metric, action, "age:")
            one.set_title(action)
            one.set_ylabel(label)
        for one in axes[-2:]:
            one.set_xlabel("days since the item was created")
        axes[0].legend()

    spoken = " ".join(f"{a}: {_spoken(challenger, baseline, MetricName.LOG_LOSS, a, 'age:')}" for a in actions)
    return Picture(
        title="Log loss and PR-AUC by age",
        caption="Over all rows of the bucket, ranked or not; PR-AUC moves with the rate of the action, so compare the "
        "two models, not the buckets.",
        alt=f"Line charts per action. Log loss of {spoken}",
        svg=draw(len(actions), 2, (9.2, 2.7 * len(actions)), paint),
    )


def _reliability(challenger: Evaluation) -> Picture:
    actions = list(challenger.utilities)

    def paint(axes: list["Axes"]) -> None:
        for one, action in zip(axes, actions, strict=True):
            for name, colour, marker in ((WARM, BLUE, "s"), (FRESH, VERMILION, "o")):
                bins = [b for b in challenger.reliability if (b.slice, b.action) == (name, action)]
                one.plot(
                    [b.predicted for b in bins],
                    [b.observed for b in bins],
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.4,
                    label=name,
                )
            top = max([max(b.predicted, b.observed) for b in challenger.reliability if b.action == action], default=1)
            one.plot([0, top], [0, top], color=INK, linewidth=0.9, linestyle=":", label="calibrated")
            one.set(title=action, xlabel="mean prediction", ylabel="observed rate")
        axes[0].legend()

    def ece(action: str, name: str) -> str:
        value = challenger.get(MetricName.ECE, name, action).value
        return "unknown" if value is None else f"{value:.3f}"

    spoken = "; ".join(f"{a}: ECE fresh {ece(a, FRESH)}, warm {ece(a, WARM)}" for a in actions)
    return Picture(
        title="Reliability of the challenger",
        caption="Equal-mass bins of at least 50 rows. Points under the dotted line: predicted too high.",
        alt=f"Observed rate against mean prediction for fresh and warm rows. {spoken}.",
        svg=draw(1, len(actions), (max(4.2, 3.4 * len(actions)), 3.2), paint),
    )


def _score_gap(challenger: Evaluation, baseline: Evaluation) -> Picture:
    groups = [
        (f"{action}\n{kind}", metric, action)
        for action in challenger.utilities
        for kind, metric in (("positives", MetricName.SCORE_GAP_POSITIVE), ("negatives", MetricName.SCORE_GAP_NEGATIVE))
    ]

    def heights(evaluation: Evaluation) -> list[float]:
        gaps = [evaluation.get(metric, FRESH, action).value for _, metric, action in groups]
        return [float("nan") if value is None else 100 * value for value in gaps]

    def paint(axes: list["Axes"]) -> None:
        places = range(len(groups))
        axes[0].bar(
            [p - 0.19 for p in places],
            heights(baseline),
            0.36,
            color="#c9c9c9",
            edgecolor=GREY,
            hatch="///",
            label="baseline",
        )
        axes[0].bar([p + 0.19 for p in places], heights(challenger), 0.36, color=BLUE, label="challenger")
        axes[0].axhline(0, color=INK, linewidth=1)
        axes[0].set_xticks(list(places), [name for name, _, _ in groups])
        axes[0].set_ylabel("gap, % of the warm mean")
        axes[0].legend()

    spoken = "; ".join(
        f"{name.replace(chr(10), ' ')} baseline {ours:.1f}%, challenger {theirs:.1f}%"
        for (name, _, _), ours, theirs in zip(groups, heights(baseline), heights(challenger), strict=True)
    )
    return Picture(
        title="Score gap between warm and fresh items",
        caption="(mean warm - mean fresh prediction) / mean warm, by what really happened. Above 0: fresh items are "
        "predicted lower than warm ones.",
        alt=f"Bars of the score gap: {spoken}.",
        svg=draw(1, 1, (max(5.0, 1.5 * len(groups)), 3.0), paint),
    )


def _training(curve: Sequence[tuple[int, float]]) -> Picture:
    steps, losses = [step for step, _ in curve], [loss for _, loss in curve]

    def paint(axes: list["Axes"]) -> None:
        axes[0].plot(steps, losses, color=BLUE, linewidth=1.4)
        axes[0].set(xlabel="step", ylabel="training loss")

    return Picture(
        title="Training",
        caption="Loss by step, as training logged it.",
        alt=f"Training loss from {losses[0]:.3f} at step {steps[0]} to {losses[-1]:.3f} at step {steps[-1]}.",
        svg=draw(1, 1, (7.6, 2.6), paint),
    )
