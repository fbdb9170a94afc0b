"""Sweep of the age threshold for "fresh": any single value is arbitrary, and what holds at one only is not a
finding.
"""

import numpy as np

from freshrank.config import EvaluationConfig
from freshrank.evaluation import bootstrap, metrics
from freshrank.evaluation.evaluate import compare
from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.evaluation.results import FRESH, Comparison, Difference, MetricName, Threshold, interval
from freshrank.schema import Schema


def with_thresholds(
    comparison: Comparison, challenger: JudgedRows, baseline: JudgedRows, schema: Schema, config: EvaluationConfig
) -> Comparison:
    """``comparison`` with one :class:`Threshold` per age of :func:`ages`; unchanged where nothing could be compared.

    Hits@k is compared as in :func:`freshrank.evaluation.evaluate.compare`, in pairs over lists. For exposure matching,
    fresh items get at every threshold their share of the candidates (at the schema's own what ``comparison`` gave
    them).
    """
    if comparison.invalid:
        return comparison
    thresholds = []
    for days in ages(schema, config):
        moved = schema.model_copy(update={"fresh_days": days})
        at = comparison if days == schema.fresh_days else compare(challenger, baseline, moved, config)
        thresholds.append(_threshold(at, (challenger, baseline), moved, config))
    return comparison.model_copy(update={"thresholds": thresholds})


def ages(schema: Schema, config: EvaluationConfig) -> list[float]:
    """The schema's ``fresh_days`` and the further thresholds of the configuration, in days, ascending."""
    further = config.fresh_thresholds
    if further is None:
        further = (schema.fresh_days / 2, schema.fresh_days * 2)
    return sorted({schema.fresh_days, *further})


def _threshold(
    comparison: Comparison, models: tuple[JudgedRows, JudgedRows], schema: Schema, config: EvaluationConfig
) -> Threshold:
    fresh = models[0].age_days < schema.fresh_days
    losses = [_log_loss(models, fresh, action, label, config) for action, label in enumerate(schema.actions)]
    return Threshold(
        fresh_days=schema.fresh_days,
        rows=int(fresh.sum()),
        items=len(np.unique(models[0].item_id[fresh])),
        fresh_share=comparison.fresh_share,
        differences=[*(row for row in comparison.rows if row.slice == FRESH), *losses],
    )


def _log_loss(
    models: tuple[JudgedRows, JudgedRows], fresh: np.ndarray, action: int, label: str, config: EvaluationConfig
) -> Difference:
    """In pairs over items: an item is drawn with all its rows, the same items for both models."""
    labels = models[0].labels[:, action]
    rows = fresh & ~np.isnan(labels)
    distinct, items = np.unique(models[0].item_id[rows], return_inverse=True)
    row = Difference(
        slice=FRESH,
        metric=MetricName.LOG_LOSS,
        action=label,
        items=len(distinct),
        lists=len(np.unique(models[0].list_id[rows])),
    )
    if not len(distinct):
        return row.model_copy(update={"note": f"no fresh row has '{label}' observed"})
    drawn = bootstrap.item_draws(len(distinct), config.warm_up_draws, config.seed)
    ours, theirs = (metrics.row_losses(model.probabilities[rows, action], labels[rows]) for model in models)
    losses = {"challenger": ours, "baseline": theirs, "difference": ours - theirs}
    alike = np.ones(len(items))
    return row.model_copy(
        update={
            name: interval(float(values.mean()), bootstrap.drawn_means(drawn, items, values, alike), config.confidence)
            for name, values in losses.items()
        }
    )
