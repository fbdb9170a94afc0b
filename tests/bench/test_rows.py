"""The rows as data."""

import pytest

from freshrank.bench.paper.rows import (
    BASELINE,
    CANDIDATES,
    ROWS,
    Row,
    chosen,
    config_of,
    laid_over,
    layers_of,
    techniques,
)
from freshrank.config import MixupConfig, ResidualConfig, TechniquesConfig
from freshrank.errors import ConfigError

TUNED = {name: row for name, row in ROWS.items() if not row.like}


@pytest.mark.parametrize("row", TUNED.values(), ids=list(TUNED))
def test_every_candidate_of_a_row_is_a_valid_configuration_and_differs_from_the_others(row: Row) -> None:
    """As many for every row, the first the paper's values."""
    configs = [config_of(row, 0, candidate).model_dump_json() for candidate in row.candidates]
    assert len(set(configs)) == CANDIDATES


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_row_switches_on_its_techniques_and_no_other(row: Row) -> None:
    """And no candidate of it does either."""
    for candidate in row.candidates:
        config = config_of(row, 3, candidate)
        on = {name for name in TechniquesConfig.model_fields if getattr(config.techniques, name) is not None}
        assert on == row.techniques
        assert config.training.seed == 3


def test_the_papers_rows_are_there() -> None:
    """Baseline, the three techniques, each pair, all three."""
    combinations = [row.techniques for row in ROWS.values()]
    mine = {"residual", "score_reg", "mixup"}
    for wanted in (set(), *({name} for name in mine), *(mine - {name} for name in mine), mine):
        assert wanted in combinations


def test_an_empty_override_takes_the_papers_values() -> None:
    """Table 1: alpha and weight of mixup, the width of the residual."""
    config = config_of(ROWS["residual+mixup"], 0)
    assert config.techniques == TechniquesConfig(residual=ResidualConfig(), mixup=MixupConfig())


def test_layers_replace_leaves_and_leave_their_neighbours() -> None:
    """A section that was None becomes the layer's."""
    tree = {"a": {"x": 1, "y": 2}, "b": None}
    assert laid_over(tree, {"a": {"y": 3}, "b": {"z": 4}}) == {"a": {"x": 1, "y": 3}, "b": {"z": 4}}


def test_the_baselines_winning_settings_hold_for_every_row() -> None:
    """Else a row could win by a learning rate that the baseline was not given."""
    winners = {BASELINE: {"training": {"learning_rate": 0.004}}, "mixup": techniques(mixup={"weight": 0.5})}
    baseline, mixup = (config_of(ROWS[name], 0, *layers_of(ROWS[name], winners)) for name in (BASELINE, "mixup"))
    assert baseline.training == mixup.training
    assert mixup.techniques.mixup == MixupConfig(weight=0.5)
    assert baseline.techniques == TechniquesConfig()


def test_an_unknown_row_is_named_and_the_baseline_is_always_chosen() -> None:
    """In the table's order, whatever the order asked for."""
    assert [row.name for row in chosen(["mixup", "residual"])] == [BASELINE, "residual", "mixup"]
    with pytest.raises(ConfigError, match="received \\['nonsense'\\]"):
        chosen(["nonsense"])


def test_a_row_with_fewer_trials_than_the_others_is_refused() -> None:
    """Tuning one row harder than another decides the table."""
    with pytest.raises(ConfigError, match="same number of trials"):
        Row("unfair", "Unfair", {}, ({},))


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.like], ids=lambda row: row.name)
def test_a_row_like_another_takes_its_tuned_settings_and_is_not_tuned_itself(row: Row) -> None:
    """What differs is its own: here the calibration alone."""
    assert row.candidates == ()
    model = ROWS[row.like]
    winners = {name: TUNED[name].candidates[1] for name in {BASELINE, row.like}}
    ours, theirs = (config_of(each, 0, *layers_of(each, winners)) for each in (row, model))
    assert ours.calibration.exposure == "parity"
    same = {"recipe": theirs.recipe, "calibration": theirs.calibration}
    assert ours.model_copy(update=same) == theirs
