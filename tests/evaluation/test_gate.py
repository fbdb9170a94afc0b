"""The gate's truth table, and challengers broken on purpose: none may pass."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from freshrank.config import EvaluationConfig, GateConfig
from freshrank.evaluation.evaluate import compare, evaluate
from freshrank.evaluation.gate import Decision, Reason, Verdict, conclude, judge
from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.evaluation.results import ALL, FRESH, Comparison, Difference, Interval, MetricName
from tests.judging import logit, schema_of, with_logits, world

SCHEMA = schema_of()
CONFIG = EvaluationConfig(bootstrap=300)
CHAMPION = world(lists=500)


def verdict(
    challenger: JudgedRows,
    champion: JudgedRows = CHAMPION,
    parameters: float = 0.0,
    gate: GateConfig | None = None,
) -> Verdict:
    comparison = compare(challenger, champion, SCHEMA, CONFIG)
    return judge(comparison, evaluate(challenger, SCHEMA, CONFIG), gate or GateConfig(), parameters)


def predicting(probabilities: np.ndarray) -> JudgedRows:
    return replace(CHAMPION, probabilities=probabilities, score=probabilities @ np.asarray(SCHEMA.utilities))


def scaled(factor: float) -> JudgedRows:
    return predicting(np.clip(factor * CHAMPION.probabilities, 0, 1))


def fresh() -> np.ndarray:
    return (CHAMPION.age_days < SCHEMA.fresh_days)[:, None]


def of(result: Verdict, check: str) -> Reason:
    return next(reason for reason in result.reasons if reason.check == check)


def test_a_calibrated_model_against_itself_is_blessed() -> None:
    """No difference, within every bound."""
    result = verdict(CHAMPION)
    assert (result.verdict, result.unmet_checks) == (Decision.BLESSED, [])


def test_against_itself_with_no_overall_margin_the_evidence_is_not_enough() -> None:
    """The low end of a difference of exactly 0 does not exceed 0."""
    assert verdict(CHAMPION, gate=GateConfig(overall_margin=0)).verdict is Decision.NOT_ENOUGH_EVIDENCE


def test_a_better_model_is_blessed() -> None:
    """The champion sees the logits through noise, the challenger does not."""
    noise = np.random.default_rng(0).normal(size=CHAMPION.labels.shape)
    worse = with_logits(CHAMPION, logit(CHAMPION.probabilities) + noise, SCHEMA.utilities)
    assert verdict(CHAMPION, worse).verdict is Decision.BLESSED


def _nan(seed: int = 0) -> JudgedRows:
    probabilities = CHAMPION.probabilities.copy()
    probabilities[seed] = np.nan
    return predicting(probabilities)


BROKEN: dict[str, Callable[[], JudgedRows]] = {
    "constant score": lambda: predicting(np.broadcast_to(np.nanmean(CHAMPION.labels, axis=0), CHAMPION.labels.shape)),
    "inverted": lambda: with_logits(CHAMPION, -logit(CHAMPION.probabilities), SCHEMA.utilities),
    "inverted at the right level": lambda: with_logits(
        CHAMPION, 2 * logit(CHAMPION.probabilities).mean(axis=0) - logit(CHAMPION.probabilities), SCHEMA.utilities
    ),
    "random": lambda: predicting(np.random.default_rng(1).uniform(0.05, 0.4, CHAMPION.labels.shape)),
    "labels leaked": lambda: predicting(np.clip(CHAMPION.labels, 0.001, 0.999)),
    "one prediction is NaN": _nan,
    "all predictions are NaN": lambda: predicting(np.full_like(CHAMPION.labels, np.nan)),
    "infinite score": lambda: replace(CHAMPION, score=np.full(len(CHAMPION.score), np.inf)),
    "probabilities above 1": lambda: predicting(CHAMPION.probabilities * 5),
    "three times too high": lambda: scaled(3),
    "three times too low": lambda: scaled(1 / 3),
    "fresh items at the bottom": lambda: with_logits(
        CHAMPION, logit(CHAMPION.probabilities) - 2 * fresh(), SCHEMA.utilities
    ),
    "fresh items all alike": lambda: predicting(np.where(fresh(), [0.3, 0.1], CHAMPION.probabilities)),
    "fresh items boosted without measure": lambda: with_logits(
        CHAMPION, logit(CHAMPION.probabilities) + 3 * fresh(), SCHEMA.utilities
    ),
    "warm items all alike": lambda: predicting(np.where(fresh(), CHAMPION.probabilities, [0.3, 0.1])),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_challenger_is_rejected(name: str) -> None:
    """Each for at least one reason that names what is wrong with it."""
    result = verdict(BROKEN[name]())
    assert result.verdict is Decision.REJECTED, result.unmet_checks
    assert result.unmet_checks[0].passed is False


def test_one_rare_action_out_of_calibration_is_enough() -> None:
    """An ECE of an action of 2% of rows is small however wrong the level is; its ratio is not."""
    drawn = np.random.default_rng(2).random(CHAMPION.labels.shape) < [1, 0.1]
    probabilities = CHAMPION.probabilities * [1, 0.3]
    rare = replace(predicting(probabilities), labels=CHAMPION.labels * drawn)
    result = verdict(rare, replace(rare))
    assert of(result, "calibration error: save, warm").passed
    assert of(result, "calibration ratio: save, warm").passed is False


@pytest.mark.parametrize(
    "increase, passed, decision",
    [
        (0.05, True, Decision.BLESSED),
        (-0.3, True, Decision.BLESSED),
        (0.0501, False, Decision.REJECTED),
        (0.2889, False, Decision.REJECTED),
        (float("nan"), None, Decision.NOT_ENOUGH_EVIDENCE),
    ],
)
def test_parameters_may_grow_by_five_percent(increase: float, passed: bool | None, decision: Decision) -> None:
    """ALDI's +28.89% would not pass."""
    result = verdict(CHAMPION, parameters=increase)
    assert (of(result, "parameters").passed, result.verdict) == (passed, decision)


def _comparison(fresh: tuple[float, float, float], overall: tuple[float, float, float], lists: int) -> Comparison:
    def row(slice: str, difference: tuple[float, float, float]) -> Difference:
        low, value, high = difference
        at = Interval(value=0.5, low=0.4, high=0.6)
        return Difference(
            slice=slice,
            metric=MetricName.HITS,
            baseline=at,
            challenger=at,
            lists=lists,
            difference=Interval(value=value, low=low, high=high),
        )

    return Comparison(k=3, confidence=0.95, draws=300, lists=lists, rows=[row(FRESH, fresh), row(ALL, overall)])


GOOD = (-0.01, 0.01, 0.03)


@pytest.mark.parametrize(
    "fresh, overall, expected",
    [
        pytest.param(GOOD, GOOD, Decision.BLESSED, id="both not worse"),
        pytest.param((-0.05, 0.0, 0.05), GOOD, Decision.BLESSED, id="fresh point exactly at the margin"),
        pytest.param((-0.05, -0.01, 0.03), GOOD, Decision.NOT_ENOUGH_EVIDENCE, id="fresh point worse, interval open"),
        pytest.param((-0.05, -0.03, -0.01), GOOD, Decision.REJECTED, id="fresh proven worse"),
        pytest.param(GOOD, (-0.03, 0.01, 0.05), Decision.NOT_ENOUGH_EVIDENCE, id="overall interval too wide"),
        pytest.param(GOOD, (-0.02, 0.0, 0.02), Decision.NOT_ENOUGH_EVIDENCE, id="overall low end at the margin"),
        pytest.param(GOOD, (-0.019, -0.01, -0.001), Decision.BLESSED, id="overall worse, but within the margin"),
        pytest.param(GOOD, (-0.06, -0.04, -0.021), Decision.REJECTED, id="overall proven worse than the margin"),
        pytest.param(
            (-0.05, -0.03, -0.01), (-0.03, 0.0, 0.05), Decision.REJECTED, id="a failure outweighs an open one"
        ),
    ],
)
def test_the_truth_table_of_the_two_comparisons(
    fresh: tuple[float, float, float], overall: tuple[float, float, float], expected: Decision
) -> None:
    """Margins 0 (fresh, point) and 0.02 (overall, low end)."""
    evaluation = evaluate(CHAMPION, SCHEMA, CONFIG)
    assert judge(_comparison(fresh, overall, 500), evaluation, GateConfig(), 0.0).verdict is expected


def test_too_few_lists_prove_neither_good_nor_bad() -> None:
    """20 lists: a difference that would reject or bless is not evidence."""
    evaluation = evaluate(CHAMPION, SCHEMA, CONFIG)
    for difference in (GOOD, (-0.5, -0.4, -0.3)):
        result = judge(_comparison(difference, difference, 20), evaluation, GateConfig(), 0.0)
        assert result.verdict is Decision.NOT_ENOUGH_EVIDENCE
        assert {r.check for r in result.unmet_checks} == {"support", "fresh support", "overall Hits@3", "fresh Hits@3"}


def test_a_small_day_is_not_enough_evidence() -> None:
    """25 lists of a model judged against itself."""
    small = world(lists=25)
    assert verdict(small, small).verdict is Decision.NOT_ENOUGH_EVIDENCE


def test_a_day_without_fresh_items_is_not_enough_evidence() -> None:
    """Nothing about fresh items can be computed, and that is no pass."""
    old = replace(CHAMPION, age_days=CHAMPION.age_days + 30)
    result = verdict(old, replace(old))
    assert result.verdict is Decision.NOT_ENOUGH_EVIDENCE
    assert of(result, "score gap: click, fresh").passed is None


def test_an_action_nobody_took_is_open_unless_it_has_no_utility() -> None:
    """An action that moves the score must be proven; one with utility 0 need not be."""
    no_saves = replace(CHAMPION, labels=CHAMPION.labels * [1, 0])
    assert verdict(no_saves, replace(no_saves)).verdict is Decision.NOT_ENOUGH_EVIDENCE
    ignored = schema_of({"click": 1.0, "save": 0.0})
    ranked = replace(no_saves, score=no_saves.probabilities[:, 0])
    comparison = compare(ranked, ranked, ignored, CONFIG)
    assert judge(comparison, evaluate(ranked, ignored, CONFIG), GateConfig(), 0.0).verdict is Decision.BLESSED


def test_a_champion_that_cannot_be_judged_leaves_the_question_open() -> None:
    """The challenger is not to blame."""
    result = verdict(CHAMPION, _nan())
    assert result.verdict is Decision.NOT_ENOUGH_EVIDENCE
    assert "baseline" in of(result, "predictions").sentence


def test_an_empty_day_is_not_enough_evidence() -> None:
    """No row at all: nothing passes, nothing fails but nothing is shipped."""
    empty = JudgedRows(**{name: value[:0] for name, value in vars(CHAMPION).items()})
    assert verdict(empty, empty).verdict is Decision.NOT_ENOUGH_EVIDENCE


def test_every_reason_is_a_sentence_with_its_numbers() -> None:
    """A person reads them, in the report and on the terminal."""
    for reason in [*verdict(CHAMPION).reasons, *verdict(scaled(3)).reasons]:
        assert not reason.sentence[0].islower()
        assert reason.sentence.endswith(".")
        assert any(character.isdigit() for character in reason.sentence)


def test_a_check_made_elsewhere_can_only_take_the_blessing_away() -> None:
    """Golden requests on the real server are added to the reasons."""
    blessed = verdict(CHAMPION).reasons
    for passed, expected in [
        (True, Decision.BLESSED),
        (False, Decision.REJECTED),
        (None, Decision.NOT_ENOUGH_EVIDENCE),
    ]:
        assert conclude([*blessed, Reason(check="golden", passed=passed, sentence="1 of 1.")]).verdict is expected


def test_no_reasons_at_all_bless_nothing() -> None:
    """A gate without checks is not open."""
    assert conclude([]).verdict is Decision.NOT_ENOUGH_EVIDENCE
