"""The gate: may the challenger replace the served model?

Each check passes (True), fails (False) or is open (None: the data cannot tell). Any failed check rejects; else any
open one means not enough evidence; only when all pass is the challenger blessed. The champion stays unless blessed.

=====================  =========================  ==========================  ====================================
check                  passes                     fails                       open
=====================  =========================  ==========================  ====================================
predictions            all finite in [0, 1]       any is not
support                lists >= min_lists                                     fewer
fresh support          lists >= min_fresh_lists                               fewer
fresh Hits@k           point >= -margin           interval wholly < -margin   point < -margin <= high end
overall Hits@k         low end > -margin          interval wholly < -margin   low end <= -margin <= high end
calibration error      <= max_ece                 above                       fewer than min_positives
calibration ratio      in [1 / max, max]          outside                     fewer than min_positives
score gap              |gap| <= max_score_gap     above                       fewer than min_positives, fresh or warm
plausibility           PR-AUC <= max_pr_auc       above                       fewer than min_positives
parameters             <= max_parameter_increase  above                       not a number
=====================  =========================  ==========================  ====================================

Every check that needs the support it lacks, or a metric that could not be computed, is open, never passed and never
failed. Checks per action skip the actions whose utility is 0: they have no say in the score. So a model judged against
itself is blessed when it is calibrated and ``overall_margin`` is above 0; with margin 0 its overall check stays open.
"""

import math
from collections.abc import Iterator
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from freshrank.config import GateConfig
from freshrank.evaluation.results import ALL, FRESH, WARM, Comparison, Evaluation, Interval, Metric, MetricName


class Decision(StrEnum):
    BLESSED = "blessed"
    REJECTED = "rejected"
    NOT_ENOUGH_EVIDENCE = "not_enough_evidence"


class Reason(BaseModel):
    """One check of the gate; ``sentence`` carries its numbers for a person."""

    model_config = ConfigDict(frozen=True)

    check: str
    passed: bool | None
    """None: the data cannot tell."""
    value: float | None = None
    bound: float | None = None
    sentence: str


class Verdict(BaseModel):
    model_config = ConfigDict(frozen=True)

    verdict: Decision
    reasons: list[Reason]

    @property
    def unmet_checks(self) -> list[Reason]:
        """The checks that did not pass, failed ones first, then open ones."""
        return sorted((r for r in self.reasons if not r.passed), key=lambda reason: reason.passed is None)


def judge(comparison: Comparison, challenger: Evaluation, config: GateConfig, parameter_increase: float) -> Verdict:
    """Every check of the table above; ``parameter_increase`` is a share, 0.05 = 5% more than the reference model."""
    reasons = [_predictions(comparison, challenger), *_comparison_checks(comparison, config)]
    reasons += [
        reason for action in _judged_actions(challenger) for reason in _action_checks(challenger, action, config)
    ]
    return conclude([*reasons, _parameters(parameter_increase, config)])


def conclude(reasons: list[Reason]) -> Verdict:
    """The verdict that follows from ``reasons``; for adding checks made elsewhere, as golden requests on the server."""
    outcomes = {reason.passed for reason in reasons}
    if False in outcomes:
        return Verdict(verdict=Decision.REJECTED, reasons=reasons)
    if None in outcomes or not outcomes:
        return Verdict(verdict=Decision.NOT_ENOUGH_EVIDENCE, reasons=reasons)
    return Verdict(verdict=Decision.BLESSED, reasons=reasons)


def _judged_actions(challenger: Evaluation) -> list[str]:
    return [action for action, utility in challenger.utilities.items() if utility]


def _predictions(comparison: Comparison, challenger: Evaluation) -> Reason:
    if challenger.invalid:
        return Reason(
            check="predictions",
            passed=False if challenger.rows else None,
            sentence=f"The challenger cannot be judged: {challenger.invalid}.",
        )
    if comparison.invalid:
        return Reason(
            check="predictions", passed=None, sentence=f"The two models cannot be compared: {comparison.invalid}."
        )
    return Reason(
        check="predictions",
        passed=True,
        value=challenger.rows,
        sentence=f"All {challenger.rows:,} predictions are finite probabilities.",
    )


def _comparison_checks(comparison: Comparison, config: GateConfig) -> Iterator[Reason]:
    for slice, check, needed in ((FRESH, "fresh support", config.min_fresh_lists), (ALL, "support", config.min_lists)):
        row = comparison.get(MetricName.HITS, slice)
        enough = row.lists >= needed
        of_slice = "" if slice == ALL else " on a fresh item"
        yield Reason(
            check=check,
            passed=enough or None,
            value=row.lists,
            bound=needed,
            sentence=f"{row.lists:,} lists hold an action{of_slice}; {needed:,} are needed.",
        )
        margin = config.overall_margin if slice == ALL else config.fresh_margin
        yield _hits(comparison, slice, margin, enough)


def _hits(comparison: Comparison, slice: str, margin: float, enough: bool) -> Reason:
    row = comparison.get(MetricName.HITS, slice)
    check = f"{'overall' if slice == ALL else 'fresh'} Hits@{comparison.k}"
    if row.difference is None or row.challenger is None or row.baseline is None:
        return Reason(
            check=check, passed=None, bound=-margin, sentence=f"{_capital(check)} could not be compared: {row.note}."
        )
    gained = row.difference
    passed = _not_worse(gained, margin, slice) if enough else None
    needed = f"its low end must exceed {-margin:.4f}" if slice == ALL else f"it must be at least {-margin + 0.0:.4f}"
    sentence = (
        f"{_capital(check)} is {row.challenger.value:.4f} against {row.baseline.value:.4f}: {gained.value:+.4f}, "
        f"{comparison.confidence:.0%} interval {gained.low:+.4f} to {gained.high:+.4f}; {needed}{_so(passed, enough)}."
    )
    value = gained.low if slice == ALL else gained.value
    return Reason(check=check, passed=passed, value=value, bound=-margin, sentence=sentence)


def _not_worse(gained: Interval, margin: float, slice: str) -> bool | None:
    if gained.high < -margin:
        return False
    proven = gained.low > -margin if slice == ALL else gained.value >= -margin
    return proven or None


def _so(passed: bool | None, enough: bool) -> str:
    if not enough:
        return ", but too few lists support it"
    return {True: "", False: ", so it is worse", None: ", but the interval leaves that open"}[passed]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _action_checks(challenger: Evaluation, action: str, config: GateConfig) -> Iterator[Reason]:
    for slice in (FRESH, WARM):
        ece = challenger.get(MetricName.ECE, slice, action)
        yield _bounded(ece, "calibration error", config, (None, config.max_ece))
        ratio = challenger.get(MetricName.CALIBRATION_RATIO, slice, action)
        limits = (1 / config.max_calibration_ratio, config.max_calibration_ratio)
        yield _bounded(ratio, "calibration ratio", config, limits)
    gap = challenger.get(MetricName.SCORE_GAP_POSITIVE, FRESH, action)
    yield _bounded(gap, "score gap", config, (-config.max_score_gap, config.max_score_gap))
    yield _bounded(challenger.get(MetricName.PR_AUC, ALL, action), "plausibility", config, (None, config.max_pr_auc))


_PHRASES = {
    "calibration error": "Expected calibration error of '{action}' on {slice} rows",
    "calibration ratio": "Mean prediction over observed rate of '{action}' on {slice} rows",
    "score gap": "The share by which fresh rows with '{action}' are predicted lower than warm ones",
    "plausibility": "PR-AUC of '{action}'",
}


def _bounded(metric: Metric, check: str, config: GateConfig, limits: tuple[float | None, float]) -> Reason:
    low, high = limits
    name = f"{check}: {metric.action}, {metric.slice}"
    what = _PHRASES[check].format(action=metric.action, slice=metric.slice)
    if metric.value is None:
        return Reason(check=name, passed=None, bound=high, sentence=f"{what} could not be computed: {metric.note}.")
    bound = low if low is not None and metric.value < low else high
    allowed = f"at most {high:.3f}" if low is None else f"between {low:.3f} and {high:.3f}"
    passed: bool | None = metric.value <= high and (low is None or metric.value >= low)
    few = metric.support.positives < config.min_positives
    support_note = (
        f", but rests on {metric.support.positives} positives; {config.min_positives} are needed" if few else ""
    )
    return Reason(
        check=name,
        passed=None if few else passed,
        value=metric.value,
        bound=bound,
        sentence=f"{what} is {metric.value:.3f}; {allowed} is allowed{support_note}.",
    )


def _parameters(increase: float, config: GateConfig) -> Reason:
    known = math.isfinite(increase)
    return Reason(
        check="parameters",
        passed=increase <= config.max_parameter_increase if known else None,
        value=increase if known else None,
        bound=config.max_parameter_increase,
        sentence=f"The model has {increase:+.2%} parameters; at most {config.max_parameter_increase:+.2%} is allowed."
        if known
        else f"How many parameters were added is not known ({increase}).",
    )
