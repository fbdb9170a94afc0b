"""Warm-up curves: quality against the number of impressions an item has had since its creation.

An item passes through the buckets of ``EvaluationConfig.warm_up_buckets`` as it is shown; a model that treats new items
well is good in the first ones already. Intervals are percentiles of bootstrap draws: of lists for Hits@k per
impression, where a list is what counts once, and of items with all their rows for everything else, because the rows
of one item are right or wrong together. Fewer than 10 of what is drawn give no point.

Buckets do not hold the same items: few of the unpopular ones ever reach the last. So PR-AUC and log loss differ between
buckets by the rate of the action alone; AUC does not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from freshrank.config import EvaluationConfig, exposure_names
from freshrank.evaluation import bootstrap, metrics
from freshrank.evaluation.judged_rows import JudgedRows, SlicedRows
from freshrank.evaluation.metrics import Bools, Floats, Ints
from freshrank.evaluation.results import Evaluation, MetricName, Support, WarmUpCurve, WarmUpPoint, Weighting, interval
from freshrank.schema import Schema

CURVES = (
    (MetricName.HITS, Weighting.IMPRESSION),
    (MetricName.HITS, Weighting.ITEM),
    (MetricName.LOG_LOSS, Weighting.IMPRESSION),
    (MetricName.LOG_LOSS, Weighting.ITEM),
    (MetricName.PR_AUC, Weighting.IMPRESSION),
    (MetricName.AUC, Weighting.IMPRESSION),
)
LOWER_IS_BETTER = frozenset({MetricName.LOG_LOSS})
_MIN_DRAWN = 10
_Found = tuple[MetricName, Weighting, WarmUpPoint]


def with_warm_up(evaluation: Evaluation, judged: JudgedRows, schema: Schema, config: EvaluationConfig) -> Evaluation:
    """``evaluation`` with the warm-up curves of the rows it was made from; unchanged where nothing could be judged."""
    if evaluation.invalid:
        return evaluation
    return evaluation.model_copy(update={"warm_up": warm_up(judged, schema, config)})


def warm_up(judged: JudgedRows, schema: Schema, config: EvaluationConfig) -> list[WarmUpCurve]:
    """One curve per action and entry of ``CURVES``; the same seed draws the same items for every model."""
    table = SlicedRows(judged, schema, config)
    bucket_of = np.searchsorted(config.warm_up_buckets, judged.exposures, side="left")
    names = exposure_names(config.warm_up_buckets)
    buckets = [_Bucket.of(table, name, bucket_of == place) for place, name in enumerate(names)]
    return [curve for action in range(len(schema.actions)) for curve in _curves(buckets, action)]


def _curves(buckets: list["_Bucket"], action: int) -> Iterator[WarmUpCurve]:
    results = [row for bucket in buckets for row in (*_hits(bucket, action), *_rows(bucket, action))]
    for metric, weighting in CURVES:
        points = [point for name, by, point in results if (name, by) == (metric, weighting)]
        yield WarmUpCurve(
            metric=metric,
            action=buckets[0].table.schema.actions[action],
            weighting=weighting,
            points=points,
            warm_from=_warm_from(points, metric in LOWER_IS_BETTER),
        )


def _warm_from(points: list[WarmUpPoint], lower_is_better: bool) -> str | None:
    """First bucket from which on no interval is wholly worse than the warmest one; None without intervals."""
    known = [(point.bucket, point.interval) for point in points if point.interval]
    first = None
    for bucket, bounds in reversed(known):
        warmest = known[-1][1]
        if bounds.low > warmest.high if lower_is_better else bounds.high < warmest.low:
            break
        first = bucket
    return first


@dataclass(frozen=True)
class _Bucket:
    """The rows of one bucket and the draws of its items, the same for all actions and metrics."""

    table: SlicedRows
    name: str
    rows: Bools
    """[N]"""
    items: Ints
    """[n] dense number, within the bucket, of the item of each of its rows."""
    drawn: Ints
    """[B, I]"""

    @classmethod
    def of(cls, table: SlicedRows, name: str, rows: Bools) -> "_Bucket":
        distinct, items = np.unique(table.judged.item_id[rows], return_inverse=True)
        draws, seed = table.config.warm_up_draws, table.config.seed
        drawn = bootstrap.item_draws(len(distinct), draws, seed) if len(distinct) else np.zeros((draws, 0), np.int64)
        return cls(table, name, rows, items.astype(np.int64), drawn)

    def mean(self, items: Ints, values: Floats, weighting: Weighting, support: Support) -> WarmUpPoint:
        """Of ``values`` [m], whose rows are of ``items`` [m]."""
        weights = metrics.item_weights(items) if weighting is Weighting.ITEM else np.ones(len(items))
        value = float(np.average(values, weights=weights)) if len(items) else np.nan
        draws = bootstrap.drawn_means(self.drawn, items, values, weights)
        return self.point(value, draws, support)

    def point(self, value: float, draws: Floats, support: Support, unit: str = "items") -> WarmUpPoint:
        """``draws`` [B] were of the ``unit`` of ``support``; a NaN ``value`` says that one class has no row."""
        drawn = getattr(support, unit)
        if drawn < _MIN_DRAWN or np.isnan(value):
            few = f"rests on {drawn} {unit}; {_MIN_DRAWN} are needed"
            note = few if drawn < _MIN_DRAWN else "every row has the action, or none has"
            return WarmUpPoint(bucket=self.name, note=note, support=support)
        estimate = interval(value, draws, self.table.config.confidence)
        return WarmUpPoint(bucket=self.name, interval=estimate, support=support)


def _hits(bucket: _Bucket, action: int) -> Iterator[_Found]:
    table, listed = bucket.table, bucket.table.listed
    positive = (table.judged.labels[listed, action] == 1) & bucket.rows[listed]
    hit = table.rank[positive] < table.config.k
    holds, on_top = metrics.list_hits(positive, table.rank, table.lists, table.list_count, table.config.k)
    lists = int(holds.sum())
    items = bucket.items[(listed & (table.judged.labels[:, action] == 1))[bucket.rows]]
    support = Support(rows=len(hit), lists=lists, positives=len(hit), items=len(np.unique(items)))
    rate = float(on_top.sum() / max(1, lists))
    # lists are alike but for the hit, so the hits among as many drawn lists are binomial
    draws = np.random.default_rng(table.config.seed).binomial(lists, rate, table.config.warm_up_draws) / max(1, lists)
    yield MetricName.HITS, Weighting.IMPRESSION, bucket.point(rate, draws, support, "lists")
    by_item = bucket.mean(items, hit.astype(np.float64), Weighting.ITEM, support)
    yield MetricName.HITS, Weighting.ITEM, by_item


def _rows(bucket: _Bucket, action: int) -> Iterator[_Found]:
    judged = bucket.table.judged
    labels = judged.labels[bucket.rows, action]
    known = ~np.isnan(labels)
    labels, items = labels[known], bucket.items[known]
    probabilities = judged.probabilities[bucket.rows, action][known].astype(np.float64)
    support = Support(
        rows=len(labels),
        positives=int(labels.sum()),
        items=len(np.unique(items)),
        lists=len(np.unique(judged.list_id[bucket.rows][known])),
    )
    losses = metrics.row_losses(probabilities, labels)
    for weighting in Weighting:
        yield MetricName.LOG_LOSS, weighting, bucket.mean(items, losses, weighting, support)
    for metric, value, draws in _areas(bucket, items, probabilities, labels):
        yield metric, Weighting.IMPRESSION, bucket.point(value, draws, support)


def _areas(
    bucket: _Bucket, items: Ints, probabilities: Floats, labels: Floats
) -> Iterator[tuple[MetricName, float, Floats]]:
    """Value and draws of both areas; all NaN where only one class occurs."""
    if len(labels):
        alike = np.ones(len(labels))
        points = metrics.areas(probabilities, labels, alike[None])
        drawn = bootstrap.drawn_areas(bucket.drawn, items, probabilities, labels, alike)
    else:
        points = drawn = (np.full(1, np.nan), np.full(1, np.nan))
    for metric, point, draws in zip((MetricName.PR_AUC, MetricName.AUC), points, drawn, strict=True):
        yield metric, float(point[0]), draws
