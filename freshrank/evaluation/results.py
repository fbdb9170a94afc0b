"""What an evaluation says, as data: metrics with their support, intervals, curves, comparisons."""

from enum import StrEnum

import numpy as np
from pydantic import BaseModel, ConfigDict

from freshrank.evaluation.metrics import Floats

ALL, FRESH, WARM = "all", "fresh", "warm"


class Weighting(StrEnum):
    IMPRESSION = "impression"
    """Every row counts the same; where lists are ranked, every list."""
    ITEM = "item"
    """Every item counts the same: a row weighs 1 / (rows of its item that the metric reads in this slice).

    For Hits@k those are the item's rows with the action in lists long enough, so it is the mean over items of the
    share of them that are among the first k. NDCG, the score gap and the exposure shares have no such form.
    """


class MetricName(StrEnum):
    HITS = "hits_at_k"
    MATCHED_HITS = "exposure_matched_hits_at_k"
    """Hits@k once one constant on all fresh logits gives fresh rows their due share of all top-k slots."""
    MATCHED_SHIFT = "exposure_matched_logit_shift"
    """That constant: above 0 the model scores fresh items too low as a group."""
    NDCG = "ndcg_at_k"
    PR_AUC = "pr_auc"
    """Average precision; it moves with the rate of the action, so slices cannot be compared by it."""
    AUC = "auc"
    """Chance that a row with the action is predicted above one without; it does not move with the rate."""
    LOG_LOSS = "log_loss"
    ECE = "ece"
    """Expected calibration error over equal-mass bins (statistics.reliability)."""
    CALIBRATION_RATIO = "calibration_ratio"
    """Mean prediction / observed rate; 1 is calibrated, above 1 too high."""
    SCORE_GAP_POSITIVE = "score_gap_positive"
    """(mean warm - mean fresh prediction) / mean warm, among rows with the action (paper, fig. 2c and 6c).

    On a bucket of age or exposures the bucket's rows stand in for the fresh ones. Its support counts the positives of
    the smaller side.
    """
    SCORE_GAP_NEGATIVE = "score_gap_negative"
    """The same among rows without the action."""
    FRESH_SHARE_TOP = "fresh_share_of_top_k"
    FRESH_SHARE_CANDIDATES = "fresh_share_of_candidates"


class Support(BaseModel):
    """What a value rests on: observed rows, the lists that count, rows with the action, items."""

    rows: int = 0
    lists: int = 0
    positives: int = 0
    items: int = 0
    """Distinct items of the rows the metric reads; counted for row metrics and for Hits@k per item."""


class Metric(BaseModel):
    """One row of the metric table; ``note`` says why a value is missing or what it leaves out."""

    model_config = ConfigDict(frozen=True)

    slice: str
    metric: MetricName
    action: str | None = None
    weighting: Weighting = Weighting.IMPRESSION
    value: float | None = None
    note: str | None = None
    support: Support = Support()


class ReliabilityBin(BaseModel):
    slice: str
    action: str
    predicted: float
    observed: float
    rows: int


class Interval(BaseModel):
    """Point estimate with the ends of its bootstrap percentile interval."""

    value: float
    low: float
    high: float


class WarmUpPoint(BaseModel):
    """One bucket of a warm-up curve."""

    bucket: str
    """Impressions since birth: ``0``, ``1-3``, ``1001+``."""
    interval: Interval | None = None
    note: str | None = None
    """Why the interval is missing."""
    support: Support = Support()


class WarmUpCurve(BaseModel):
    """Quality against the number of impressions an item had since birth; warm_up.py says how it is drawn."""

    metric: MetricName
    action: str
    weighting: Weighting = Weighting.IMPRESSION
    points: list[WarmUpPoint]
    warm_from: str | None = None
    """The bucket from which on no interval lies wholly on the worse side of the warmest bucket's."""

    @property
    def key(self) -> tuple[MetricName, str, Weighting]:
        return self.metric, self.action, self.weighting


class Evaluation(BaseModel):
    """All metrics of one model on one set of rows."""

    k: int
    fresh_days: float
    rows: int
    lists: int
    """Lists of at least ``min_candidates`` rows."""
    utilities: dict[str, float]
    invalid: str | None = None
    """Set where no metric could be computed: the sentence that says why."""
    metrics: list[Metric]
    reliability: list[ReliabilityBin] = []
    warm_up: list[WarmUpCurve] = []
    """Filled by :func:`freshrank.evaluation.warm_up_curve.with_warm_up`."""

    def get(
        self,
        metric: MetricName,
        slice: str,
        action: str | None = None,
        weighting: Weighting = Weighting.IMPRESSION,
    ) -> Metric:
        """The row asked for; one without value where it was never computed."""
        for row in self.metrics:
            if (row.metric, row.slice, row.action, row.weighting) == (metric, slice, action, weighting):
                return row
        return Metric(
            slice=slice, metric=metric, action=action, weighting=weighting, note=self.invalid or "was not computed"
        )

    @property
    def slices(self) -> list[str]:
        return list(dict.fromkeys(row.slice for row in self.metrics))


class Difference(BaseModel):
    """Hits@k (in a threshold sweep log loss too) of both models on the same rows, and challenger minus baseline."""

    slice: str
    metric: MetricName
    action: str | None = None
    baseline: Interval | None = None
    challenger: Interval | None = None
    difference: Interval | None = None
    lists: int = 0
    items: int = 0
    """Items that were drawn; 0 where lists were."""
    note: str | None = None


class Threshold(BaseModel):
    """What the two models differ by on fresh items, had an item been fresh below another age."""

    fresh_days: float
    rows: int
    """Rows of items younger than that."""
    items: int
    fresh_share: float | None = None
    """As in :class:`Comparison`."""
    differences: list[Difference]
    """Hits@k, exposure-matched Hits@k (per action, and None: weighted by utility) and log loss per action."""

    def get(self, metric: MetricName, action: str | None = None) -> Difference:
        for row in self.differences:
            if (row.metric, row.action) == (metric, action):
                return row
        return Difference(slice=FRESH, metric=metric, action=action, note="was not computed")


class Comparison(BaseModel):
    """Paired bootstrap over lists of every Hits@k, per action and (action None) weighted by utility."""

    k: int
    confidence: float
    draws: int
    lists: int
    fresh_share: float | None = None
    """Share of top-k slots that exposure matching gave the fresh rows of both models."""
    invalid: str | None = None
    rows: list[Difference]
    thresholds: list[Threshold] = []
    """In ascending order of age; filled by :func:`freshrank.evaluation.threshold_sweep.with_thresholds`."""

    def get(self, metric: MetricName, slice: str, action: str | None = None) -> Difference:
        for row in self.rows:
            if (row.metric, row.slice, row.action) == (metric, slice, action):
                return row
        return Difference(slice=slice, metric=metric, action=action, note=self.invalid or "was not computed")


def interval(value: float, draws: Floats, confidence: float) -> Interval:
    """Percentile interval; draws without any supporting list are left out."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws[~np.isnan(draws)], (tail, 1 - tail))
    return Interval(value=value, low=float(low), high=float(high))
