"""Lifts, gaps closed, intervals and corrections by hand-computable numbers."""

import time

import numpy as np
import pytest

from freshrank.bench.paper import lifts
from freshrank.bench.paper.lifts import Estimate
from freshrank.errors import DataError


def rates_of(hits: dict[str, list[list[float]]], counts: list[float], draws: int = 400) -> lifts.Rates:
    """Row -> seeds -> hits of each list, one column; counts are alike for all."""
    sums = np.array([hits[name] for name in hits], np.float32)[..., None]
    return lifts.rates(list(hits), sums, np.array(counts, np.float32)[:, None], draws)


def test_a_lift_is_the_relative_difference_of_the_means_over_seeds() -> None:
    """Seeds of the baseline hit 1 and 1 of 4 lists, those of the row 2 and 3: 0.625 / 0.25 - 1 = 150%."""
    hits = {"baseline": [[1, 0, 0, 0], [0, 1, 0, 0]], "row": [[1, 1, 0, 0], [1, 1, 1, 0]]}
    assert rates_of(hits, [1, 1, 1, 1]).lift("row", "baseline", 0).value == pytest.approx(150)


def test_a_list_without_support_counts_neither_as_hit_nor_as_miss() -> None:
    """Two of three lists hold a positive and one of them is hit."""
    assert rates_of({"row": [[1, 0, 0]]}, [1, 1, 0]).observed[0, 0] == pytest.approx(0.5)


def test_the_gap_closed_is_the_share_of_the_way_from_baseline_to_oracle() -> None:
    """Baseline 2, row 3, oracle 6 of 10 lists, by lists that all differ alike: a quarter."""
    hits = {name: [[value / 10] * 10] * 3 for name, value in (("baseline", 2), ("row", 3), ("oracle", 6))}
    closed = rates_of(hits, [1] * 10).gap_closed("row", "baseline", "oracle", 0)
    assert closed is not None
    assert (closed.value, closed.low, closed.high) == pytest.approx((0.25, 0.25, 0.25))


def test_there_is_no_gap_to_close_where_the_oracle_is_not_better() -> None:
    """An oracle below the baseline would turn every loss into a gain; low is good for a loss."""
    hits = {name: [[value / 10] * 10] * 3 for name, value in (("baseline", 6), ("row", 3), ("oracle", 2))}
    rates = rates_of(hits, [1] * 10)
    assert rates.gap_closed("row", "baseline", "oracle", 0) is None
    closed = rates.gap_closed("row", "baseline", "oracle", 0, better=-1)
    assert closed is not None
    assert closed.value == pytest.approx(0.75)


def test_a_row_equal_to_the_baseline_on_every_list_has_no_interval_and_no_significance() -> None:
    """Pairing: the chance of who came is the same for both and cancels."""
    rng = np.random.default_rng(0)
    same = rng.integers(0, 2, (5, 80)).tolist()
    lift = rates_of({"baseline": same, "row": same}, [1] * 80).lift("row", "baseline", 0)
    assert (lift.value, lift.low, lift.high, lift.p) == (0, 0, 0, 1)


def test_pairing_makes_the_interval_of_a_difference_narrower_than_without() -> None:
    """A row that hits all lists of the baseline and a few more, against one that hits as many others."""
    rng = np.random.default_rng(1)
    base = (rng.random((6, 400)) < 0.5).astype(float)
    more = np.maximum(base, rng.random((6, 400)) < 0.05)
    other = np.stack([rng.permutation(seed) for seed in more])
    rates = rates_of({"baseline": base.tolist(), "paired": more.tolist(), "other": other.tolist()}, [1] * 400)
    paired, unpaired = (rates.lift(name, "baseline", 0) for name in ("paired", "other"))
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)
    assert paired.p < 0.01 < unpaired.p


def test_lists_are_drawn_alike_for_all_seeds() -> None:
    """Twenty seeds that agree list by list know no more about who came than one: the interval does not shrink."""
    rng = np.random.default_rng(2)
    base, row = (rng.random(100) < 0.3).astype(float).tolist(), (rng.random(100) < 0.6).astype(float).tolist()
    few, many = (rates_of({"baseline": [base] * n, "row": [row] * n}, [1] * 100, 2000) for n in (2, 20))
    widths = [e.high - e.low for e in (r.lift("row", "baseline", 0) for r in (few, many))]
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_the_interval_holds_the_spread_of_the_seeds_too() -> None:
    """Seeds that disagree widen the interval although the lists are the same."""
    base = [[0.5] * 50] * 8
    calm, wild = [[0.6] * 50] * 8, [[0.6 + 0.1 * (-1) ** s] * 50 for s in range(8)]
    rates = rates_of({"baseline": base, "calm": calm, "wild": wild}, [1] * 50)
    assert rates.lift("calm", "baseline", 0).high == pytest.approx(20, rel=1e-4)
    assert rates.lift("wild", "baseline", 0).high > 25


def test_one_seed_gives_no_significance() -> None:
    """What another training would give cannot be known from one."""
    lift = rates_of({"baseline": [[0.0, 1.0]], "row": [[1.0, 1.0]]}, [1, 1]).lift("row", "baseline", 0)
    assert lift.p is None
    assert not lift.significant


def test_the_p_value_is_students_with_as_many_degrees_of_freedom_as_seeds_less_one() -> None:
    """t = 2.776 on 4 degrees of freedom is the textbook's 5%."""
    draws = np.array([-1.0, 1.0]) / np.sqrt(2)
    assert lifts.p_value(2.776, draws, seeds=5) == pytest.approx(0.05, abs=1e-4)


def test_holms_correction_multiplies_the_smallest_p_by_the_number_of_rows() -> None:
    """p of 0.01, 0.02, 0.04: 3 x 0.01, 2 x 0.02, 1 x 0.04, never decreasing; a row without p is not of the family."""
    corrected = lifts.corrected([Estimate(value=0, p=p) for p in (0.04, 0.01)] + [None, Estimate(value=0, p=0.02)])
    assert [e.adjusted if e else None for e in corrected] == pytest.approx([0.04, 0.03, None, 0.04])


def test_a_metric_that_lists_do_not_add_up_to_is_tested_over_seeds() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 3.46 on 2 degrees of freedom."""
    estimate = lifts.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert estimate is not None
    assert estimate.value == 4
    assert estimate.p == pytest.approx(0.0742, abs=1e-4)
    assert lifts.paired([None], [1.0]) is None


def test_models_judged_on_other_rows_are_not_compared() -> None:
    """Neither rows of another fingerprint nor lists of other support."""
    ones, zeros = np.ones((3, 1), np.float32), np.zeros((3, 1), np.float32)
    sums, counts = lifts.stacked([[("a", zeros, ones)], [("a", ones, ones)]])
    assert (sums.shape, counts.shape) == ((2, 1, 3, 1), (3, 1))
    with pytest.raises(DataError, match="judged on rows b and a"):
        lifts.stacked([[("a", zeros, ones)], [("b", ones, ones)]])
    with pytest.raises(DataError, match="same rows"):
        lifts.stacked([[("a", zeros, ones)], [("a", ones, zeros)]])


def test_time_grows_with_the_lists_not_with_their_square() -> None:
    """To a table of 17 rows, 20 seeds and 10 columns over 3,000 lists, with 2,000 draws."""
    rng = np.random.default_rng(0)
    sums = rng.integers(0, 2, (17, 20, 3000, 10)).astype(np.float32)

    def seconds(lists: int) -> float:
        started = time.process_time()
        lifts.rates([str(i) for i in range(17)], sums[:, :, :lists], np.ones((lists, 10), np.float32))
        return time.process_time() - started

    assert seconds(3000) < 24 * seconds(375)
