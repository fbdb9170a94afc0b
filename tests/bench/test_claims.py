"""A claim of the paper is decided by intervals over seeds, by rules anyone can check by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freshrank.bench.paper.claims import Claim, Expectation, Outcome, SeedMean

HOLDS, FAILS, OPEN = Outcome.HOLDS, Outcome.FAILS, Outcome.OPEN


def _expectation(low: float | None, high: float | None, side: str = "below", bound: float = 1.0) -> Expectation:
    mean = None if low is None or high is None else (low + high) / 2
    return Expectation(name="ratio", estimate=SeedMean(mean=mean, low=low, high=high, seeds=5), side=side, bound=bound)


def test_the_interval_is_students_over_seeds() -> None:
    """1, 2, 3: mean 2, standard error 1 / sqrt 3, t(2 degrees, 97.5%) = 4.3027."""
    estimate = SeedMean.over([1, 2, 3])
    assert (estimate.mean, estimate.seeds) == (2, 3)
    assert estimate.high - estimate.mean == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert estimate.mean - estimate.low == pytest.approx(estimate.high - estimate.mean)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    """So nothing is decided by it."""
    assert SeedMean.over([0.5]) == SeedMean(mean=0.5, low=None, high=None, seeds=1)
    one = Expectation(name="ratio", estimate=SeedMean.over([0.5]), side="below", bound=1)
    assert one.outcome is OPEN
    assert str(one) == "ratio 0.5 (one seed, no interval)"


@pytest.mark.parametrize("values", [[], [None], [0.5, None, 0.7]])
def test_a_seed_without_a_value_leaves_none_to_the_whole(values: list[float | None]) -> None:
    """Averaging the seeds that happen to have one would flatter."""
    assert SeedMean.over(values) == SeedMean(mean=None, low=None, high=None, seeds=len(values))


@pytest.mark.parametrize(
    ("low", "high", "side", "expected"),
    [
        (0.6, 0.9, "below", HOLDS),
        (1.1, 1.3, "below", FAILS),
        (0.9, 1.1, "below", OPEN),
        (1.1, 1.3, "above", HOLDS),
        (0.6, 0.9, "above", FAILS),
        (0.9, 1.1, "above", OPEN),
        (0.6, 1.0, "below", OPEN),
        (None, None, "below", OPEN),
    ],
)
def test_an_interval_on_one_side_of_the_bound_decides(
    low: float | None, high: float | None, side: str, expected: Outcome
) -> None:
    """Bound 1; an interval that touches it does not decide."""
    assert _expectation(low, high, side).outcome is expected


@given(st.floats(-9, 9), st.floats(0, 5), st.floats(-9, 9))
def test_below_and_above_never_both_hold_and_one_fails_where_the_other_holds(
    low: float, width: float, bound: float
) -> None:
    """For any interval and bound."""
    below, above = (_expectation(low, low + width, side, bound).outcome for side in ("below", "above"))
    opposite = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}
    assert above is opposite[below]


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(0.5, 0.6), (0.7, 0.8)], HOLDS),
        ([(0.5, 0.6), (0.9, 1.1)], OPEN),
        ([(0.5, 0.6), (1.1, 1.2)], FAILS),
        ([(0.9, 1.1), (1.1, 1.2)], FAILS),
        ([], OPEN),
    ],
)
def test_a_claim_holds_when_all_its_inequalities_do_and_fails_with_any(
    intervals: list[tuple[float, float]], expected: Outcome
) -> None:
    """Two actions, say; one open inequality leaves the whole open."""
    claim = Claim(paper="below 1.", expectations=tuple(_expectation(*interval) for interval in intervals))
    assert claim.outcome is expected


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("number", "gap 0.137 (0.13 to 0.144)"),
        ("change", "gap +0.14 (+0.13 to +0.14)"),
        ("percent", "gap 13.7% (13.0% to 14.4%)"),
        ("points", "gap +13.7 points (+13.0 to +14.4)"),
    ],
)
def test_numbers_are_written_with_their_interval_and_unit(form: str, written: str) -> None:
    """Differences carry their sign."""
    estimate = SeedMean(mean=0.137, low=0.13, high=0.144, seeds=5)
    assert str(Expectation(name="gap", estimate=estimate, side="above", form=form)) == written


def test_a_claim_reads_as_one_sentence_with_its_outcome() -> None:
    """What the paper found, what was found here, and the verdict."""
    claim = Claim(paper="the ratio stays below 1.", expectations=(_expectation(0.6, 0.64),))
    assert str(claim) == "Paper: the ratio stays below 1. Here: ratio 0.62 (0.6 to 0.64): **holds**."
