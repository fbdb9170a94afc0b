"""Metrics by item age: every number is also given for fresh and for rarely shown items, with its support.

Slices: ``all``, ``fresh`` and ``warm`` (item younger than ``schema.fresh_days`` or not), ``age:...`` (days since
creation) and ``exposures:...`` (impressions since birth). A slice without support has no value but a note that says
why; it is never NaN, and never counts as good.

Hits@k of an action on a slice: over the lists of at least ``min_candidates`` rows that hold a row of the slice with
that action, the share that have such a row among their first k by score. With ``action`` None it is the average over
the actions weighted by utility, left out those without utility or support.

Per item: the same metrics once more with every item counting the same (:class:`Weighting`), because a few often shown
items decide every average over rows or lists, whatever happens to the many others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from freshrank.config import EvaluationConfig
from freshrank.errors import DataError
from freshrank.evaluation import bootstrap
from freshrank.evaluation import metrics as statistics
from freshrank.evaluation.judged_rows import JudgedRows, SlicedRows
from freshrank.evaluation.metrics import Bools, Floats, Ints
from freshrank.evaluation.results import (
    ALL,
    FRESH,
    WARM,
    Comparison,
    Difference,
    Evaluation,
    Metric,
    MetricName,
    ReliabilityBin,
    Support,
    Weighting,
    interval,
)
from freshrank.schema import Schema


def evaluate(
    judged: JudgedRows, schema: Schema, config: EvaluationConfig, fresh_share: float | None = None
) -> Evaluation:
    """All metrics of one model.

    ``fresh_share`` of all top-k slots goes to fresh rows in the exposure-matched metrics; by default as large as
    their share of the candidates.
    """
    table = SlicedRows(judged, schema, config)
    invalid = judged.invalid
    metrics = [] if invalid else [*_metrics(table, fresh_share)]
    return Evaluation(
        k=config.k,
        fresh_days=schema.fresh_days,
        rows=len(judged.score),
        lists=table.list_count,
        utilities=dict(zip(schema.actions, schema.utilities, strict=True)),
        invalid=invalid,
        metrics=metrics,
        reliability=[] if invalid else [*_reliability(table)],
    )


@dataclass(frozen=True)
class Indicators:
    """Hits@k of one model list by list, for statistics over several models and seeds."""

    list_id: Ints
    """[L] of the lists of at least ``min_candidates`` rows, ascending."""
    hits: dict[tuple[str, MetricName], tuple[Bools, Bools]]
    """By slice and metric ([L, A], [L, A]): the list holds a row of the slice with the action; has one among its
    first k. Exposure-matched hits are absent where they cannot be had."""


def indicators(
    judged: JudgedRows, schema: Schema, config: EvaluationConfig, fresh_share: float | None = None
) -> Indicators:
    """What :func:`evaluate` averages into Hits@k on all, fresh and exposure-matched fresh rows."""
    table = SlicedRows(judged, schema, config)
    hits = {(name, MetricName.HITS): table.hits(name, table.rank) for name in (ALL, FRESH)}
    share = table.fresh_share if fresh_share is None else fresh_share
    matched = "no list" if share is None else table.matched(share)
    if not isinstance(matched, str):
        hits[FRESH, MetricName.MATCHED_HITS] = table.hits(FRESH, matched[0])
    return Indicators(np.unique(judged.list_id[table.listed]), hits)


def _metrics(table: SlicedRows, fresh_share: float | None) -> Iterator[Metric]:
    for name in table.slices:
        yield from _hits(table, name, MetricName.HITS, table.rank)
        for action in range(len(table.utilities)):
            yield _ndcg(table, name, action)
            for weighting in Weighting:
                yield from _row_metrics(table, name, action, weighting)
    for name in (FRESH, *table.buckets):
        for action in range(len(table.utilities)):
            yield _gap(table, name, action, 1, MetricName.SCORE_GAP_POSITIVE)
            yield _gap(table, name, action, 0, MetricName.SCORE_GAP_NEGATIVE)
    yield from _exposure(table, fresh_share)


def _hits(table: SlicedRows, name: str, metric: MetricName, rank: Ints) -> Iterator[Metric]:
    yield from _list_hits(table, name, metric, rank)
    yield from _item_hits(table, name, metric, rank)


def _list_hits(table: SlicedRows, name: str, metric: MetricName, rank: Ints) -> Iterator[Metric]:
    holds, hit = table.hits(name, rank)
    rows = table.slices[name][table.listed]
    for action, label in enumerate(table.schema.actions):
        support = Support(
            rows=int((rows & ~np.isnan(table.judged.labels[table.listed, action])).sum()),
            lists=int(holds[:, action].sum()),
            positives=int(table.positive(name, action).sum()),
        )
        value = float(hit[:, action].sum() / support.lists) if support.lists else None
        yield Metric(
            slice=name,
            metric=metric,
            action=label,
            value=value,
            support=support,
            note=None if support.lists else _no_list(table, name, label),
        )
    weights, note = _weights(table, name, holds)
    counted = holds[:, weights != 0].any(axis=1).sum()
    value = float(_rates(holds, hit) @ weights) if counted else None
    yield Metric(slice=name, metric=metric, value=value, note=note, support=Support(rows=rows.sum(), lists=counted))


def _item_hits(table: SlicedRows, name: str, metric: MetricName, rank: Ints) -> Iterator[Metric]:
    rates, counted = np.zeros(len(table.utilities)), np.zeros(len(table.utilities), np.bool_)
    for action, label in enumerate(table.schema.actions):
        positive = table.positive(name, action)
        items = table.items[table.listed][positive]
        support = Support(
            rows=len(items),
            lists=len(np.unique(table.lists[positive])),
            positives=len(items),
            items=len(np.unique(items)),
        )
        counted[action] = len(items) > 0
        if len(items):
            rates[action] = np.average(rank[positive] < table.config.k, weights=statistics.item_weights(items))
        yield Metric(
            slice=name,
            metric=metric,
            action=label,
            weighting=Weighting.ITEM,
            support=support,
            value=float(rates[action]) if len(items) else None,
            note=None if len(items) else _no_list(table, name, label),
        )
    weights, note = _weights(table, name, counted[None])
    yield Metric(
        slice=name,
        metric=metric,
        weighting=Weighting.ITEM,
        note=note,
        value=float(rates @ weights) if weights.any() else None,
    )


def _no_list(table: SlicedRows, name: str, action: str) -> str:
    return f"no list of at least {table.config.min_candidates} candidates holds '{action}' on {_item_of(name)}"


def _item_of(name: str) -> str:
    return {ALL: "an item", FRESH: "a fresh item", WARM: "a warm item"}.get(name, f"an item of slice '{name}'")


def _rates(holds: Bools, hit: Bools) -> NDArray[np.float64]:
    """[A] hit rates, 0 where no list counts (its weight is 0 as well)."""
    rates: NDArray[np.float64] = hit.sum(axis=0) / np.maximum(holds.sum(axis=0), 1)
    return rates


def _weights(table: SlicedRows, name: str, holds: Bools) -> tuple[NDArray[np.float64], str | None]:
    """[A] weights of the utility-weighted average over the actions that have lists, and a note on the others."""
    supported = holds.any(axis=0) & (table.utilities != 0)
    absent = [a for a, u, s in zip(table.schema.actions, table.utilities, supported, strict=True) if u and not s]
    if not supported.any():
        return np.zeros(len(supported)), f"no list holds an action with utility on {_item_of(name)}"
    weights = np.where(supported, table.utilities, 0.0)
    return weights / np.abs(weights).sum(), f"without {', '.join(absent)}: no list holds it" if absent else None


def _ndcg(table: SlicedRows, name: str, action: int) -> Metric:
    positive = table.positive(name, action)
    value = statistics.ndcg(positive, table.rank, table.lists, table.list_count, table.config.k)
    label = table.schema.actions[action]
    support = Support(
        lists=len(np.unique(table.lists[positive])),
        positives=int(positive.sum()),
        rows=int(table.slices[name][table.listed].sum()),
    )
    note = _no_list(table, name, label) if value is None else None
    return Metric(slice=name, metric=MetricName.NDCG, action=label, value=value, support=support, note=note)


def _observed(table: SlicedRows, name: str, action: int) -> tuple[Floats, Floats, Bools]:
    rows = table.slices[name] & ~np.isnan(table.judged.labels[:, action])
    return table.judged.probabilities[rows, action].astype(np.float64), table.judged.labels[rows, action], rows


def _row_metrics(table: SlicedRows, name: str, action: int, weighting: Weighting) -> Iterator[Metric]:
    probabilities, labels, rows = _observed(table, name, action)
    label, bins = table.schema.actions[action], table.config.ece_bins
    weights = statistics.item_weights(table.items[rows]) if weighting is Weighting.ITEM else None
    empty, none_positive, one_class = _lacking(labels, name, label)
    areas = [] if one_class else statistics.areas(probabilities, labels, _one_row(labels, weights))
    computed: list[tuple[MetricName, str | None, Callable[[], float]]] = [
        (MetricName.PR_AUC, one_class, lambda: float(areas[0][0])),
        (MetricName.AUC, one_class, lambda: float(areas[1][0])),
        (MetricName.LOG_LOSS, empty, lambda: statistics.log_loss(probabilities, labels, weights)),
        (MetricName.ECE, empty, lambda: statistics.expected_calibration_error(probabilities, labels, bins, weights)),
        (
            MetricName.CALIBRATION_RATIO,
            none_positive,
            lambda: float(np.average(probabilities, weights=weights) / np.average(labels, weights=weights)),
        ),
    ]
    support = Support(
        rows=len(labels),
        lists=len(np.unique(table.judged.list_id[rows])),
        positives=int(labels.sum()),
        items=len(np.unique(table.items[rows])),
    )
    for metric, note, compute in computed:
        yield Metric(
            slice=name,
            metric=metric,
            action=label,
            weighting=weighting,
            value=None if note else compute(),
            note=note,
            support=support,
        )


def _one_row(labels: Floats, weights: Floats | None) -> Floats:
    return (np.ones(len(labels)) if weights is None else weights)[None]


def _lacking(labels: Floats, name: str, action: str) -> tuple[str | None, str | None, str | None]:
    """Why there is no metric of observed rows, none of positives, and none of two classes; None where there is."""
    positives = int(labels.sum())
    empty = None if len(labels) else f"no row of slice '{name}' has '{action}' observed"
    none_positive = empty or (None if positives else f"no row of slice '{name}' has '{action}'")
    one_class = none_positive or (None if positives < len(labels) else f"every row of slice '{name}' has '{action}'")
    return empty, none_positive, one_class


def _gap(table: SlicedRows, name: str, action: int, wanted: int, metric: MetricName) -> Metric:
    label = table.schema.actions[action]
    means, counts = [], []
    for side in (WARM, name):
        probabilities, labels, _ = _observed(table, side, action)
        chosen = probabilities[labels == wanted]
        counts.append(len(chosen))
        means.append(float(chosen.mean()) if len(chosen) else 0.0)
    support = Support(rows=sum(counts), positives=min(counts) if wanted else 0)
    note = None
    if not min(counts) or means[0] == 0:
        kind, what = "with" if wanted else "without", name if name == FRESH else f"'{name}'"
        note = f"{counts[0]} warm and {counts[1]} {what} rows {kind} '{label}'; both need predictions above 0"
    value = None if note else (means[0] - means[1]) / means[0]
    return Metric(slice=name, metric=metric, action=label, value=value, note=note, support=support)


def _exposure(table: SlicedRows, fresh_share: float | None) -> Iterator[Metric]:
    support = Support(rows=int(table.listed.sum()), lists=table.list_count)
    share = table.fresh_share
    if share is None:
        note = f"no list of at least {table.config.min_candidates} candidates"
        yield Metric(slice=ALL, metric=MetricName.FRESH_SHARE_TOP, note=note)
        return
    top = float(table.listed_fresh[table.rank < table.config.k].mean())
    yield Metric(slice=ALL, metric=MetricName.FRESH_SHARE_TOP, value=top, support=support)
    yield Metric(slice=ALL, metric=MetricName.FRESH_SHARE_CANDIDATES, value=share, support=support)
    compared = (FRESH, *table.buckets)
    matched = table.matched(share if fresh_share is None else fresh_share)
    if isinstance(matched, str):
        yield from (Metric(slice=name, metric=MetricName.MATCHED_HITS, note=matched) for name in compared)
        return
    for name in compared:
        yield from _hits(table, name, MetricName.MATCHED_HITS, matched[0])
    yield Metric(slice=FRESH, metric=MetricName.MATCHED_SHIFT, value=matched[1], support=support)


def _reliability(table: SlicedRows) -> Iterator[ReliabilityBin]:
    for name in (FRESH, WARM):
        for action, label in enumerate(table.schema.actions):
            probabilities, labels, _ = _observed(table, name, action)
            if len(labels):
                bins = statistics.reliability(probabilities, labels, table.config.ece_bins)
                for predicted, observed, rows in zip(*bins, strict=True):
                    yield ReliabilityBin(
                        slice=name, action=label, predicted=predicted, observed=observed, rows=int(rows)
                    )


def compare(
    challenger: JudgedRows,
    baseline: JudgedRows,
    schema: Schema,
    config: EvaluationConfig,
    fresh_share: float | None = None,
) -> Comparison:
    """Paired differences in Hits@k on all, on fresh, and on fresh at equal exposure.

    Both must have been judged on the same rows in the same order; a :class:`DataError` says where they differ.
    """
    _check_same_rows(challenger, baseline)
    ours, theirs = SlicedRows(challenger, schema, config), SlicedRows(baseline, schema, config)
    invalid = _invalid(challenger, baseline) or (
        None if ours.list_count else f"no list of at least {config.min_candidates} candidates"
    )
    share = ours.fresh_share if fresh_share is None else fresh_share
    rows = [] if invalid or share is None else [*_differences(ours, theirs, share)]
    return Comparison(
        k=config.k,
        confidence=config.confidence,
        draws=config.bootstrap,
        lists=ours.list_count,
        fresh_share=share,
        invalid=invalid,
        rows=rows,
    )


def _check_same_rows(challenger: JudgedRows, baseline: JudgedRows) -> None:
    for name in ("list_id", "item_id", "labels"):
        ours, theirs = getattr(challenger, name), getattr(baseline, name)
        if ours.shape != theirs.shape:
            raise DataError(
                f"compare: {name} has shape {ours.shape} for the challenger and {theirs.shape} for the "
                "baseline; judge both on the same rows in the same order"
            )
        differs = np.flatnonzero((ours != theirs) & ~((ours != ours) & (theirs != theirs)))
        if len(differs):
            raise DataError(
                f"compare: {name} differs at row {differs[0]}: challenger {ours.flat[differs[0]]}, "
                f"baseline {theirs.flat[differs[0]]}; judge both on the same rows"
            )


def _invalid(challenger: JudgedRows, baseline: JudgedRows) -> str | None:
    for who, judged in (("challenger", challenger), ("baseline", baseline)):
        if judged.invalid:
            return f"{who}: {judged.invalid}"
    return None


def _differences(ours: SlicedRows, theirs: SlicedRows, share: float) -> Iterator[Difference]:
    groups = [(FRESH, MetricName.HITS, ours.rank, theirs.rank)]
    matched, matched_theirs = ours.matched(share), theirs.matched(share)
    refusal = next((why for why in (matched, matched_theirs) if isinstance(why, str)), None)
    if not isinstance(matched, str) and not isinstance(matched_theirs, str):
        groups.append((FRESH, MetricName.MATCHED_HITS, matched[0], matched_theirs[0]))
    groups.append((ALL, MetricName.HITS, ours.rank, theirs.rank))
    hits = [(ours.hits(name, rank), theirs.hits(name, other)[1]) for name, _, rank, other in groups]
    holds = np.hstack([both[0] for both, _ in hits])
    hit, other_hit = np.hstack([both[1] for both, _ in hits]), np.hstack([theirs_hit for _, theirs_hit in hits])
    draws = bootstrap.paired_bootstrap(holds, hit, other_hit, ours.config.bootstrap, ours.config.seed)
    width = len(ours.utilities)
    for number, (name, metric, _, _) in enumerate(groups):
        block = slice(number * width, (number + 1) * width)
        group = _Group(name, metric, holds[:, block], hit[:, block], other_hit[:, block])
        yield from group.differences(ours, draws.challenger[:, block], draws.baseline[:, block])
    if refusal:
        yield Difference(slice=FRESH, metric=MetricName.MATCHED_HITS, note=refusal)


@dataclass(frozen=True)
class _Group:
    """The [L, A] hit indicators of both models for one slice and metric."""

    name: str
    metric: MetricName
    holds: Bools
    challenger: Bools
    baseline: Bools

    def differences(self, table: SlicedRows, challenger: Floats, baseline: Floats) -> Iterator[Difference]:
        """The weighted average and one row per action, from bootstrap draws [B, A]."""
        weights, note = _weights(table, self.name, self.holds)
        yield self._difference(table.config, None, weights, note, challenger, baseline)
        for action, label in enumerate(table.schema.actions):
            weights = np.eye(len(table.utilities))[action]
            note = None if self.holds[:, action].any() else _no_list(table, self.name, label)
            yield self._difference(table.config, label, weights, note, challenger, baseline)

    def _difference(
        self,
        config: EvaluationConfig,
        action: str | None,
        weights: NDArray[np.float64],
        note: str | None,
        challenger: Floats,
        baseline: Floats,
    ) -> Difference:
        lists = int(self.holds[:, weights != 0].any(axis=1).sum())
        row = Difference(slice=self.name, metric=self.metric, action=action, lists=lists, note=note)
        if not lists:
            return row
        chosen = weights != 0
        points = [float(_rates(self.holds, hit) @ weights) for hit in (self.challenger, self.baseline)]
        drawn = [draws[:, chosen] @ weights[chosen] for draws in (challenger, baseline)]
        return row.model_copy(
            update={
                "challenger": interval(points[0], drawn[0], config.confidence),
                "baseline": interval(points[1], drawn[1], config.confidence),
                "difference": interval(points[0] - points[1], drawn[0] - drawn[1], config.confidence),
            }
        )
