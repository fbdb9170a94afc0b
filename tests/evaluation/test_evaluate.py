"""Metrics with a clock: hand-computed lists, invariants, and slices that hold nothing."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freshrank.config import EvaluationConfig
from freshrank.errors import DataError
from freshrank.evaluation import bootstrap, metrics
from freshrank.evaluation.evaluate import compare, evaluate
from freshrank.evaluation.judged_rows import JudgedRows, slices
from freshrank.evaluation.results import ALL, FRESH, WARM, MetricName, Weighting
from tests.judging import Lists, judged_of, logit, schema_of, shuffled, sigmoid, with_logits, world

ONE = schema_of({"click": 1.0})
TWO = schema_of()
CONFIG = EvaluationConfig(bootstrap=200)
OLD, NEW = 30.0, 1.0
Rows = list[tuple[float, float, float]]


def hits(judged: JudgedRows, slice: str = ALL, metric: MetricName = MetricName.HITS) -> float | None:
    schema = ONE if judged.labels.shape[1] == 1 else TWO
    return evaluate(judged, schema, CONFIG).get(metric, slice, "click").value


FIRST: Rows = [(0.9, 0, OLD), (0.8, 0, OLD), (0.7, 1, NEW), (0.1, 0, OLD)]
FOURTH: Rows = [(0.9, 0, OLD), (0.8, 1, OLD), (0.7, 0, NEW), (0.1, 1, NEW)]
NO_CLICK: Rows = [(0.9, 0, OLD), (0.8, 0, NEW), (0.7, 0, NEW), (0.1, 0, OLD)]
SHORT: Rows = [(0.9, 1, NEW), (0.8, 0, OLD)]


@pytest.mark.parametrize(
    "lists, slice, expected",
    [
        pytest.param([FIRST], FRESH, 1.0, id="fresh click at place 3 is a hit"),
        pytest.param([FOURTH], FRESH, 0.0, id="fresh click at place 4 is a miss"),
        pytest.param([FOURTH], ALL, 1.0, id="a warm click at place 2 is a hit on all"),
        pytest.param([FIRST, FOURTH], FRESH, 0.5, id="one of two lists with a fresh click"),
        pytest.param([FIRST, NO_CLICK], FRESH, 1.0, id="a list without a click does not count"),
        pytest.param([FOURTH, SHORT], FRESH, 0.0, id="a list of fewer than 4 candidates does not count"),
        pytest.param([FIRST, FOURTH], WARM, 1.0, id="only the second list holds a warm click"),
        pytest.param([NO_CLICK], FRESH, None, id="no list with a click gives no value"),
    ],
)
def test_hits_at_3_counts_lists_as_defined(lists: Lists, slice: str, expected: float | None) -> None:
    """The share of lists holding a (fresh) click that have one among their top 3."""
    assert hits(judged_of(lists), slice) == expected


def test_ndcg_is_one_for_a_click_on_top_and_discounted_below() -> None:
    """A single click at place 3 has DCG 1 / log2(4) = 0.5 of an ideal 1."""
    row = evaluate(judged_of([FIRST]), ONE, CONFIG).get(MetricName.NDCG, ALL, "click")
    assert row.value == pytest.approx(0.5)


def test_unobserved_labels_are_neither_positive_nor_negative() -> None:
    """Rows whose label is NaN leave log loss, support and hits alone."""
    known = judged_of([FIRST])
    labels = known.labels.copy()
    labels[0] = np.nan
    row = evaluate(replace(known, labels=labels), ONE, CONFIG).get(MetricName.LOG_LOSS, ALL, "click")
    expected = -(np.log(0.2) + np.log(0.7) + np.log(0.9)) / 3
    assert row.value == pytest.approx(expected)
    assert row.support.rows == 3


def test_score_gap_is_relative_to_warm_predictions() -> None:
    """Warm positives predicted 0.8, fresh ones 0.6: a gap of 25%."""
    rows: Rows = [(0.8, 1, OLD), (0.6, 1, NEW), (0.5, 0, OLD), (0.5, 0, NEW)]
    evaluation = evaluate(judged_of([rows]), ONE, CONFIG)
    assert evaluation.get(MetricName.SCORE_GAP_POSITIVE, FRESH, "click").value == pytest.approx(0.25)
    assert evaluation.get(MetricName.SCORE_GAP_NEGATIVE, FRESH, "click").value == pytest.approx(0.0)


def test_the_score_gap_of_a_bucket_is_against_the_warm_rows() -> None:
    """Warm positives predicted 0.8, those of never shown items 0.4: half lower."""
    judged = replace(
        judged_of([[(0.8, 1, OLD), (0.8, 1, OLD), (0.4, 1, OLD), (0.1, 0, NEW)]]),
        exposures=np.array([500, 500, 0, 0]),
    )
    warm = (0.8 + 0.8 + 0.4) / 3
    evaluation = evaluate(judged, ONE, CONFIG)
    gap = evaluation.get(MetricName.SCORE_GAP_POSITIVE, "exposures:0", "click")
    assert gap.value == pytest.approx((warm - 0.4) / warm)
    assert evaluation.get(MetricName.SCORE_GAP_POSITIVE, "age:0-1", "click").note == (
        "3 warm and 0 'age:0-1' rows with 'click'; both need predictions above 0"
    )


def per_item(judged: JudgedRows, metric: MetricName, slice: str = ALL) -> tuple[float | None, float | None]:
    """The value per impression and the value per item."""
    schema = ONE if judged.labels.shape[1] == 1 else TWO
    evaluation = evaluate(judged, schema, CONFIG)
    first, second = (evaluation.get(metric, slice, "click", weighting).value for weighting in Weighting)
    return first, second


def test_the_head_hides_the_tail_per_list_and_not_per_item() -> None:
    """Nine lists put the clicked hit on top, one buries a clicked newcomer: 0.9 of the lists, half of the items."""
    hit: Rows = [(0.9, 1, OLD), (0.8, 0, OLD), (0.7, 0, OLD), (0.1, 0, OLD)]
    buried: Rows = [(0.9, 0, OLD), (0.8, 0, OLD), (0.7, 0, OLD), (0.1, 1, NEW)]
    judged = judged_of([*[hit] * 9, buried])
    head, tail = 1, 2
    items = np.where(judged.labels[:, 0] == 0, 0, np.where(judged.age_days < 7, tail, head))
    assert per_item(replace(judged, item_id=items), MetricName.HITS) == (0.9, 0.5)


def test_hits_per_item_are_the_mean_over_items_of_the_share_on_top() -> None:
    """Item 1 is clicked at places 1 and 4 (a half), item 2 at place 2 of the second list (whole): 0.75."""
    rows: list[Rows] = [
        [(0.9, 1, OLD), (0.8, 0, OLD), (0.7, 0, OLD), (0.1, 0, OLD)],
        [(0.9, 0, OLD), (0.8, 1, OLD), (0.7, 0, OLD), (0.1, 1, OLD)],
    ]
    judged = replace(judged_of(rows), item_id=np.array([1, 3, 4, 5, 3, 2, 4, 1]))
    row = evaluate(judged, ONE, CONFIG).get(MetricName.HITS, ALL, "click", Weighting.ITEM)
    assert (row.value, row.support.items, row.support.positives) == (0.75, 2, 3)
    assert hits(judged) == 1.0


HEAD_AND_TAIL = replace(
    judged_of([[(0.5, 1, OLD), (0.5, 1, OLD), (0.5, 0, OLD), (0.5, 0, OLD), (0.9, 0, NEW)]]),
    item_id=np.array([1, 1, 1, 1, 2]),
)
"""Item 1 has four rows and is predicted rightly; item 2 has one and is predicted far too high."""


@pytest.mark.parametrize(
    "metric, per_impression, by_item",
    [
        (MetricName.LOG_LOSS, (4 * np.log(2) + np.log(10)) / 5, (np.log(2) + np.log(10)) / 2),
        (MetricName.CALIBRATION_RATIO, (4 * 0.5 + 0.9) / 2, (0.5 + 0.9) / 0.5),
        (MetricName.ECE, 0.58 - 0.4, 0.7 - 0.25),
        (MetricName.AUC, (1 / 2 + 1 / 2 + 0) / 3, (0.5 * 0.5) / 1.5),
        (MetricName.PR_AUC, 2 / 5, 0.5 / 2),
    ],
)
def test_rows_weigh_one_over_the_rows_of_their_item(metric: MetricName, per_impression: float, by_item: float) -> None:
    """The tail item is one row of five per impression, and one item of two per item."""
    assert per_item(HEAD_AND_TAIL, metric) == (pytest.approx(per_impression), pytest.approx(by_item))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), copies=st.integers(2, 5))
def test_showing_one_item_more_often_moves_nothing_that_is_per_item(seed: int, copies: int) -> None:
    """Every row of one item is repeated: rows of the head weigh less, the head as a whole does not."""
    judged = world(lists=9, seed=seed)
    repeats = np.where(judged.item_id == judged.item_id[0], copies, 1)
    often = replace(judged, **{name: np.repeat(value, repeats, axis=0) for name, value in vars(judged).items()})
    for metric in (MetricName.LOG_LOSS, MetricName.CALIBRATION_RATIO, MetricName.PR_AUC, MetricName.AUC):
        (_, before), (_, after) = per_item(judged, metric), per_item(often, metric)
        assert after == pytest.approx(before)
    (before, _), (after, _) = per_item(judged, MetricName.LOG_LOSS), per_item(often, MetricName.LOG_LOSS)
    assert after != pytest.approx(before)


def test_every_slice_has_every_metric_per_impression_and_per_item() -> None:
    """Ages and exposures are not second-class: whatever all items have, each bucket has."""
    evaluation = evaluate(world(lists=300), TWO, CONFIG)
    buckets = [name for name in evaluation.slices if ":" in name]
    assert len(buckets) == 9
    both = (
        MetricName.HITS,
        MetricName.LOG_LOSS,
        MetricName.PR_AUC,
        MetricName.AUC,
        MetricName.ECE,
        MetricName.CALIBRATION_RATIO,
    )
    expected = {(metric, weighting) for metric in both for weighting in Weighting}
    expected |= {(MetricName.NDCG, Weighting.IMPRESSION)}
    cold = {(MetricName.MATCHED_HITS, weighting) for weighting in Weighting}
    cold |= {(gap, Weighting.IMPRESSION) for gap in (MetricName.SCORE_GAP_POSITIVE, MetricName.SCORE_GAP_NEGATIVE)}
    for name in (ALL, FRESH, WARM, *buckets):
        for action in TWO.actions:
            rows = [row for row in evaluation.metrics if (row.slice, row.action) == (name, action)]
            assert {(row.metric, row.weighting) for row in rows} == expected | (set() if name in (ALL, WARM) else cold)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), digits=st.integers(1, 6))
def test_both_areas_are_those_of_scikit_learn(seed: int, digits: int) -> None:
    """With ties and with weights."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = np.random.default_rng(seed)
    p, labels, weights = rng.random(60).round(digits), (np.arange(60) % 3 == 0) * 1.0, rng.uniform(0.01, 3, (2, 60))
    precision_recall, roc = metrics.areas(p, labels, weights)
    for place in range(2):
        known = {"sample_weight": weights[place]}
        assert precision_recall[place] == pytest.approx(average_precision_score(labels, p, **known))
        assert roc[place] == pytest.approx(roc_auc_score(labels, p, **known))


def test_an_area_needs_weight_on_both_classes() -> None:
    """A draw that holds clicks only has none."""
    areas = metrics.areas(np.array([0.2, 0.8]), np.array([0.0, 1.0]), np.array([[1.0, 1.0], [0.0, 1.0]]))
    assert [area.tolist()[0] for area in areas] == [1.0, 1.0]
    assert all(np.isnan(area[1]) for area in areas)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), lists=st.sampled_from([3, 300, 70_000]))
def test_places_are_by_list_then_score_then_tie_key(seed: int, lists: int) -> None:
    """As sorting tuples gives them, with many equal scores and with list numbers of any width."""
    rng = np.random.default_rng(seed)
    list_of, score = rng.integers(0, lists, 80), rng.integers(0, 4, 80) / 4
    ties = rng.integers(0, 2**60, 80).astype(np.uint64)
    ordered = sorted(range(80), key=lambda row: (list_of[row], -score[row], ties[row]))
    expected = np.empty(80, np.int64)
    for place, row in enumerate(ordered):
        expected[row] = place - next(i for i, other in enumerate(ordered) if list_of[other] == list_of[row])
    assert metrics.ranks(score, list_of, ties).tolist() == expected.tolist()


def test_fresh_share_of_top_k_counts_slots() -> None:
    """One fresh item among three slots, one among four candidates."""
    evaluation = evaluate(judged_of([FIRST]), ONE, CONFIG)
    assert evaluation.get(MetricName.FRESH_SHARE_TOP, ALL).value == pytest.approx(1 / 3)
    assert evaluation.get(MetricName.FRESH_SHARE_CANDIDATES, ALL).value == pytest.approx(1 / 4)


def test_buckets_split_age_at_their_lower_and_exposures_at_their_upper_end() -> None:
    """An item of exactly 7 days is in 7-28; one shown exactly 10 times is in 1-10."""
    config = EvaluationConfig(age_buckets=(1, 7, 28), exposure_buckets=(0, 10))
    ages, exposures = np.array([0.0, 1.0, 7.0, 28.0]), np.array([0, 1, 10, 11])
    named = slices(ages, exposures, 7, config)
    members = {name: np.flatnonzero(mask).tolist() for name, mask in named.items()}
    assert members == {
        "all": [0, 1, 2, 3],
        "fresh": [0, 1],
        "warm": [2, 3],
        "age:0-1": [0],
        "age:1-7": [1],
        "age:7-28": [2],
        "age:28+": [3],
        "exposures:0": [0],
        "exposures:1-10": [1, 2],
        "exposures:11+": [3],
    }


def test_every_metric_without_support_says_why_and_none_is_nan() -> None:
    """A log of warm items only leaves the fresh slices empty, with a note."""
    rows = [(p, label, OLD) for p, label, _ in FIRST]
    evaluation = evaluate(judged_of([rows]), ONE, CONFIG)
    fresh = [row for row in evaluation.metrics if row.slice in (FRESH, "age:0-1") and "shift" not in row.metric]
    assert fresh
    assert all(row.value is None and row.note for row in fresh)
    assert all(row.value is None or np.isfinite(row.value) for row in evaluation.metrics)


def test_predictions_that_are_not_finite_give_no_metric_at_all() -> None:
    """One NaN prediction is a broken model, not a row to leave out."""
    judged = judged_of([FIRST])
    broken = replace(judged, probabilities=np.array([[np.nan], [0.1], [0.1], [0.1]]))
    evaluation = evaluate(broken, ONE, CONFIG)
    assert evaluation.metrics == []
    assert evaluation.get(MetricName.HITS, FRESH).note == "1 of 4 predictions are not finite probabilities"
    assert compare(broken, judged, ONE, CONFIG).invalid == f"challenger: {evaluation.invalid}"


def test_no_rows_at_all_is_said_not_crashed() -> None:
    """An empty evaluation day judges nothing."""
    empty = judged_of([])
    assert evaluate(empty, ONE, CONFIG).invalid == "there is no row to judge"
    assert compare(empty, empty, ONE, CONFIG).rows == []


def test_lists_that_are_all_too_short_leave_row_metrics() -> None:
    """Without a list of 4 candidates nothing is ranked, but log loss needs no list."""
    evaluation = evaluate(judged_of([SHORT]), ONE, CONFIG)
    assert evaluation.get(MetricName.LOG_LOSS, ALL, "click").value is not None
    assert evaluation.get(MetricName.HITS, ALL).value is None
    assert "at least 4 candidates" in str(compare(judged_of([SHORT]), judged_of([SHORT]), ONE, CONFIG).invalid)


def test_the_average_weighs_actions_by_utility_and_names_those_without_support() -> None:
    """Hits of 1 (click, utility 1) and 0 (save, utility 2) average to 1/3; an action nobody took is left out."""
    labels = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    single = judged_of([FIRST])
    both = replace(single, labels=labels, probabilities=np.repeat(single.probabilities, 2, axis=1))
    assert evaluate(both, TWO, CONFIG).get(MetricName.HITS, ALL).value == pytest.approx(1 / 3)
    clicks_only = replace(both, labels=labels * [1.0, 0.0])
    row = evaluate(clicks_only, TWO, CONFIG).get(MetricName.HITS, ALL)
    assert (row.value, row.note) == (1.0, "without save: no list holds it")


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-3, 3), scale=st.floats(0.1, 5))
def test_hits_depend_only_on_the_order_of_the_scores(seed: int, shift: float, scale: float) -> None:
    """A monotone transform of all scores, a constant added to all included, changes no Hits@k."""
    judged = world(lists=30, seed=seed)
    moved = replace(judged, score=scale * judged.score + shift)
    exponential = replace(judged, score=np.exp(judged.score))
    for slice in (ALL, FRESH):
        assert hits(judged, slice) == hits(moved, slice) == hits(exponential, slice)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_nothing_depends_on_the_order_of_the_rows(seed: int) -> None:
    """Shuffled rows give the same metrics, with many equal scores too."""
    judged = world(lists=40, seed=seed)
    coarse = replace(judged, probabilities=judged.probabilities.round(1), score=judged.score.round(1))
    first, second = (evaluate(each, TWO, CONFIG) for each in (coarse, shuffled(coarse, seed)))
    for ours, theirs in zip(first.metrics, second.metrics, strict=True):
        assert ours.value == pytest.approx(theirs.value) if ours.value is not None else theirs.value is None


def test_equal_scores_are_ordered_by_chance_not_by_label() -> None:
    """With one constant score, a single click among 10 is in the top 3 of 30% of the lists."""
    lists = [[(0.5, float(place == 0), OLD) for place in range(10)] for _ in range(3000)]
    assert hits(judged_of(lists)) == pytest.approx(0.3, abs=0.03)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), boost=st.floats(1, 4))
def test_a_boost_of_all_fresh_logits_raises_raw_but_not_exposure_matched_hits(seed: int, boost: float) -> None:
    """Exposure matching takes the constant back; what is left is how well fresh items are told apart."""
    judged = world(lists=80, seed=seed)
    fresh = (judged.age_days < TWO.fresh_days)[:, None]
    boosted = with_logits(judged, logit(judged.probabilities) + boost * fresh, TWO.utilities)
    assert hits(boosted, FRESH) > hits(judged, FRESH)  # type: ignore[operator]
    matched = [hits(each, FRESH, MetricName.MATCHED_HITS) for each in (judged, boosted)]
    assert matched[0] == pytest.approx(matched[1])
    shifts = [evaluate(each, TWO, CONFIG).get(MetricName.MATCHED_SHIFT, FRESH).value for each in (judged, boosted)]
    assert shifts[0] - shifts[1] == pytest.approx(boost, abs=0.05)  # type: ignore[operator]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.6))
def test_exposure_matching_gives_fresh_rows_the_share_asked_for(seed: int, share: float) -> None:
    """Of all top-3 slots, to within one slot."""
    judged = world(lists=50, seed=seed)
    lists = np.unique(judged.list_id, return_inverse=True)[1]
    ties = metrics.tie_key(0, judged.list_id, judged.item_id)
    fresh = judged.age_days < 7
    rank, _ = metrics.matched_ranks(judged.probabilities, np.array([1.0, 2.0]), fresh, lists, ties, 3, share)
    assert fresh[rank < 3].mean() == pytest.approx(share, abs=1 / 150)


def test_exposure_matching_is_refused_where_the_score_is_not_made_of_the_probabilities() -> None:
    """Logits cannot be shifted behind a score that does not follow from them."""
    judged = world(lists=30)
    row = evaluate(replace(judged, score=-judged.score), TWO, CONFIG).get(MetricName.MATCHED_HITS, FRESH)
    assert row.value is None
    assert "utility-weighted sum" in str(row.note)


def test_a_perfectly_calibrated_model_has_a_small_calibration_error() -> None:
    """Labels drawn from the very probabilities; a halved prediction is off by half the mean."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.6, 20_000)
    labels = (rng.random(20_000) < p).astype(float)
    assert metrics.expected_calibration_error(p, labels, 15) < 0.015
    assert metrics.expected_calibration_error(p / 2, labels, 15) == pytest.approx(p.mean() / 2, abs=0.015)


def test_a_constant_prediction_is_one_bin_however_the_labels_lie() -> None:
    """Equal predictions share a bin: sorted labels must not look miscalibrated."""
    predicted, observed, rows = metrics.reliability(np.full(1000, 0.3), np.sort(np.arange(1000) % 10 < 3) * 1.0, 15)
    assert (predicted.tolist(), observed.tolist(), rows.tolist()) == ([pytest.approx(0.3)], [0.3], [1000])


def test_a_model_compared_with_itself_differs_by_exactly_nothing() -> None:
    """The bootstrap is paired: the same lists are drawn for both."""
    judged = world(lists=100)
    for row in compare(judged, judged, TWO, CONFIG).rows:
        assert row.difference is not None
        assert (row.difference.value, row.difference.low, row.difference.high) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_drawing_lists_one_by_one() -> None:
    """Multinomial draws over indicator patterns agree with a plain loop over resampled lists."""
    rng = np.random.default_rng(3)
    holds = rng.random((400, 1)) < 0.7
    challenger, baseline = (holds & (rng.random((400, 1)) < rate) for rate in (0.7, 0.5))
    draws = bootstrap.paired_bootstrap(holds, challenger, baseline, 2000, 0)
    fast = (draws.challenger - draws.baseline)[:, 0]
    picked = rng.integers(0, 400, (2000, 400))
    slow = (challenger[picked, 0].sum(1) - baseline[picked, 0].sum(1)) / holds[picked, 0].sum(1)
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.003)
    assert np.quantile(fast, [0.025, 0.975]) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.01)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """95% intervals of equally good models hold 0 in some 95 of 100 worlds."""
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        judged = world(lists=150, seed=seed)
        one, other = (
            with_logits(judged, logit(judged.probabilities) + 0.5 * rng.normal(size=judged.labels.shape), TWO.utilities)
            for _ in range(2)
        )
        row = compare(one, other, TWO, CONFIG).get(MetricName.HITS, ALL)
        assert row.difference is not None
        held += row.difference.low <= 0 <= row.difference.high
    assert held >= 52


def test_models_judged_on_other_rows_are_not_compared() -> None:
    """The error names the array, the row and both values."""
    judged = judged_of([FIRST])
    other = replace(judged, item_id=np.array([0, 1, 9, 3]))
    with pytest.raises(DataError, match="item_id differs at row 2: challenger 2, baseline 9"):
        compare(judged, other, ONE, CONFIG)
    with pytest.raises(DataError, match=r"list_id has shape \(4,\) for the challenger and \(8,\)"):
        compare(judged, judged_of([FIRST, FIRST]), ONE, CONFIG)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": np.zeros(3)}, r"Judged.score: received shape \(3,\), expected \(4,\)"),
        ({"labels": np.full((4, 1), 2.0)}, "Judged.labels: received 2.0, expected 0, 1 or NaN"),
        ({"age_days": np.array([1, 2, np.nan, 3])}, "Judged.age_days: received a value that is not finite"),
    ],
)
def test_arrays_that_cannot_be_judged_are_named(change: dict[str, np.ndarray], message: str) -> None:
    """Shape, label and age problems are the caller's to mend."""
    with pytest.raises(DataError, match=message):
        replace(judged_of([FIRST]), **change)


def test_time_grows_with_the_rows_not_with_their_square() -> None:
    """To 42,000 rows, three evaluation days of KuaiRand, each with 1000 bootstrap draws."""

    def seconds(lists: int) -> float:
        judged = world(lists)
        started = time.process_time()
        evaluate(judged, TWO, EvaluationConfig())
        compare(judged, judged, TWO, EvaluationConfig())
        return time.process_time() - started

    assert seconds(4200) < 24 * seconds(525)


def test_an_evaluation_survives_json() -> None:
    """Steps hand it on as a file."""
    evaluation = evaluate(world(lists=30), TWO, CONFIG)
    assert type(evaluation).model_validate_json(evaluation.model_dump_json()) == evaluation


def test_sigmoid_and_logit_of_the_builders_are_inverse() -> None:
    """The boost test rests on it."""
    assert logit(sigmoid(np.array([-2.0, 0.5]))) == pytest.approx([-2.0, 0.5])
