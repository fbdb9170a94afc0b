"""Tuning: on days before the evaluation days, by a criterion that a constant cannot raise, alike for all rows."""

import csv
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from freshrank.bench.paper import rows, tune
from freshrank.bench.paper.evidence_data import EvidenceSource, Prepared, load_evidence
from freshrank.bench.paper.rows import BASELINE, CANDIDATES, ROWS, techniques, tuned, tuned_under
from freshrank.bench.paper.task import TaskResult
from freshrank.bench.paper.tune import PENALTY, Reference, Trial, TuneOptions
from freshrank.config import WindowConfig
from freshrank.errors import DataError
from freshrank.evaluation.results import ALL, FRESH, MetricName
from freshrank.storage.files import read_json, write_json

pytestmark = pytest.mark.integration

QUIET = Console(quiet=True)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 7), st.integers(0, 400))
def test_no_tuning_day_is_an_evaluation_day_or_later(train: int, calibration: int, evaluation: int, shift: int) -> None:
    """Whatever the windows, all that tuning trains on, calibrates on and judges precedes the first judged day."""
    windows = WindowConfig(train_days=train, calibration_days=calibration, evaluation_days=evaluation)
    source = EvidenceSource(Path("data"), date(2022, 1, 1 + shift % 28), windows)
    before = source.before_evaluation().split
    assert max((*before.train, *before.calibration, *before.evaluation)) < min(source.split.evaluation)
    assert len(before.evaluation) == evaluation


def test_the_tuning_windows_of_the_evidence_are_those_that_were_agreed() -> None:
    """KuaiRand: train 04-25 .. 05-01, calibrate 05-02, judge 05-03 .. 05-05."""
    split = EvidenceSource(Path("data"), date(2022, 5, 9), rows.EVIDENCE_WINDOWS).before_evaluation().split
    assert (split.train[0], split.train[-1]) == (date(2022, 4, 25), date(2022, 5, 1))
    assert split.calibration == (date(2022, 5, 2),)
    assert (split.evaluation[0], split.evaluation[-1]) == (date(2022, 5, 3), date(2022, 5, 5))


def result(matched: float, loss: float, overall: float, fresh: float = 0.5) -> TaskResult:
    """One action, one seed."""
    values = {
        (MetricName.MATCHED_HITS, FRESH): matched,
        (MetricName.LOG_LOSS, FRESH): loss,
        (MetricName.HITS, ALL): overall,
        (MetricName.HITS, FRESH): fresh,
    }
    metrics = [{"metric": str(m), "slice": s, "action": "click", "value": v} for (m, s), v in values.items()]
    return TaskResult("row", 0, "rows", 1, 0.0, metrics, np.zeros(0), np.zeros(0))


BASE, ORACLE = result(0.60, 0.60, 0.90), result(0.70, 0.50, 0.90)
REFERENCE = Reference([BASE], [ORACLE], ["click"])


def test_the_criterion_is_the_mean_gap_closed_on_matched_hits_and_log_loss() -> None:
    """0.65 is half of the way in Hits@3, 0.58 a fifth in log loss."""
    assert REFERENCE.criterion([result(0.65, 0.58, 0.90)]) == pytest.approx((0.5 + 0.2) / 2)
    assert REFERENCE.criterion([BASE]) == 0
    assert REFERENCE.criterion([ORACLE]) == pytest.approx(1)


def test_raw_fresh_hits_have_no_part_in_the_criterion() -> None:
    """A constant on all fresh logits raises them at will."""
    assert REFERENCE.criterion([result(0.60, 0.60, 0.90, fresh=0.99)]) == 0


def test_overall_hits_may_fall_by_half_a_percent_and_cost_beyond() -> None:
    """0.4% lower is free; 0.7% lower costs PENALTY x 0.2%."""
    assert REFERENCE.criterion([result(0.70, 0.50, 0.90 * 0.996)]) == pytest.approx(1)
    assert REFERENCE.criterion([result(0.70, 0.50, 0.90 * 0.993)]) == pytest.approx(1 - PENALTY * 0.002)


def test_without_an_oracle_the_relative_improvement_is_judged() -> None:
    """10% more Hits@3 and 20% less loss."""
    assert Reference([BASE], None, ["click"]).criterion([result(0.66, 0.48, 0.9)]) == pytest.approx(0.15)


def test_a_tie_goes_to_the_earlier_candidate() -> None:
    """The first one is the paper's."""
    trials = [Trial("mixup", number, techniques(mixup={}), [BASE]) for number in range(3)]
    assert tune.best(trials, REFERENCE).number == 0


def test_a_metric_without_support_is_an_error_and_not_a_zero() -> None:
    """Too few tuning days to hold a fresh positive."""
    with pytest.raises(DataError, match="has no value in the tuning days"):
        tune.mean_of([BASE], MetricName.PR_AUC, FRESH, "click")


def test_every_row_gets_as_many_trials_and_table_1_reads_the_winners(
    world: Prepared, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole tuning of two rows on the small world, two candidates that differ and four that do not train twice."""
    few = {name: replace(ROWS[name], candidates=_repeated(ROWS[name].candidates)) for name in (BASELINE, "mixup")}
    monkeypatch.setattr(rows, "ROWS", few)
    winners = home / "tuned.json"
    assert tune.tune(world, TuneOptions(1, None, 1, home / "evidence", winners), QUIET) == []
    with (home / "evidence" / "tuning-simulated.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == ("row", "candidate", "seed", "metric", "value")
    trials = {(line["row"], line["candidate"]) for line in lines}
    assert trials == {(row, str(number)) for row in few for number in range(CANDIDATES)}
    assert set(tuned("simulated", winners)) == {BASELINE, "mixup"}
    assert read_json(winners)["simulated"][BASELINE] in few[BASELINE].candidates
    judged = load_evidence(world.source.before_evaluation()).evaluation.rows["day"].max()
    assert judged < min(world.source.split.evaluation)


def _repeated(candidates: tuple[dict, ...]) -> tuple[dict, ...]:
    return (candidates[0], *[candidates[1]] * (CANDIDATES - 1))


def test_a_protocol_that_was_not_tuned_has_no_winners(tmp_path: Path) -> None:
    """Table 1 then takes the papers' settings and says so."""
    assert tuned("strict", tmp_path / "absent.json") == {}


def test_protocols_of_kuairand_that_were_not_tuned_take_the_settings_of_the_main_one(tmp_path: Path) -> None:
    """A dataset of another schema does not: its columns are others."""
    path = tmp_path / "tuned.json"
    write_json(path, {"sparse": {"mixup": {"a": 1}}, "strict": {"mixup": {"a": 2}}})
    assert tuned("staggered", path) == {"mixup": {"a": 1}}
    assert tuned("strict", path) == {"mixup": {"a": 2}}
    assert tuned("simulated", path) == {}
    assert [tuned_under(name, path) for name in ("staggered", "strict")] == ["sparse", "strict"]
