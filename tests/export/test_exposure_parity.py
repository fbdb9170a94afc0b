"""Exposure parity: a constant for fresh items, found from scores alone."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from freshrank.bundle.onnx_ranker import OnnxRanker
from freshrank.config import CalibrationConfig, ModelConfig, TechniquesConfig, TrainingConfig
from freshrank.export.calibration import Platt
from freshrank.export.exposure_parity import SHARE, parity_shift, with_fresh_candidates, with_parity
from freshrank.export.onnx_export import export_bundle
from freshrank.features.encoder import Catalog
from freshrank.features.frames import Frame
from freshrank.schema import ITEM_AGE
from freshrank.training.loop import train_ranker
from freshrank.training.trained import Trained
from tests.worlds import random_frame, tiny_schema

pytestmark = pytest.mark.integration

SCHEMA = tiny_schema()
FRAME = random_frame(SCHEMA)
SMALL = ModelConfig(
    item_id_dim=4,
    categorical_dim=4,
    min_count=1,
    sequence_dim=8,
    group_dim=8,
    cross_rank=4,
    mlp=(16, 8),
    experts=2,
    expert_dim=8,
    head_dim=4,
)
IDENTITY = Platt(slope=(1.0, 1.0), intercept=(0.0, 0.0))


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train_ranker(FRAME, FRAME.items, SCHEMA, SMALL, TechniquesConfig(), TrainingConfig(batch_size=64))


def test_fresh_items_scored_two_logits_too_low_are_moved_by_two() -> None:
    """300 lists of 3 fresh and 7 warm rows with logits of the same spread, the fresh ones lowered by 2."""
    rng = np.random.default_rng(0)
    fresh = np.tile([True] * 3 + [False] * 7, 300)
    logits = (rng.normal(size=3000) - 2 * fresh)[:, None]
    lists, items = np.repeat(np.arange(300), 10), np.arange(3000)
    assert parity_shift(logits, np.ones(1), fresh, lists, items, 3) == pytest.approx(2, abs=0.15)


def test_lists_as_short_as_the_top_decide_nothing() -> None:
    """All of a list of 3 is on top whatever the shift."""
    lists, items = np.repeat(np.arange(5), 3), np.arange(15)
    assert parity_shift(np.zeros((15, 1)), np.ones(1), items % 3 == 0, lists, items, 3) == 0


def test_a_fifth_of_the_candidates_is_fresh_and_hosts_lend_all_but_the_item() -> None:
    """Fresh rows of the log are only the pool that guests come from."""
    mixed = with_fresh_candidates(FRAME, SCHEMA)
    assert mixed is not None
    fresh = mixed.rows[ITEM_AGE] < SCHEMA.fresh_days
    assert fresh.mean() == pytest.approx(SHARE, abs=0.03)
    pool = FRAME.rows.filter(pl.col(ITEM_AGE) < SCHEMA.fresh_days)
    assert set(mixed.rows.filter(fresh)["item_row"]) <= set(pool["item_row"])
    warm = FRAME.rows.filter(pl.col(ITEM_AGE) >= SCHEMA.fresh_days)
    assert (
        mixed.rows.filter(~fresh)
        .sort("item_row", "event_timestamp")
        .equals(warm.sort("item_row", "event_timestamp"), null_equal=True)
    )


def test_no_label_plays_a_part(trained: Trained) -> None:
    """Turned labels give the same constant."""
    turned = Frame(FRAME.users, FRAME.items, FRAME.rows.with_columns(click=1 - pl.col("click")))
    catalog = Catalog.build(FRAME.items, trained.encoder)
    one, other = (
        with_parity(IDENTITY, trained, frame, catalog, CalibrationConfig(exposure="parity"))
        for frame in (FRAME, turned)
    )
    assert one == other
    assert one.fresh_shift != 0


def test_the_constant_is_bounded(trained: Trained) -> None:
    """Exposure is set right as far as the bound allows, in the same direction."""
    catalog = Catalog.build(FRAME.items, trained.encoder)

    def shift(bound: float) -> float:
        config = CalibrationConfig(exposure="parity", max_fresh_shift=bound)
        return with_parity(IDENTITY, trained, FRAME, catalog, config).fresh_shift

    free = shift(9.0)
    assert free != 0
    assert shift(abs(free) / 2) == pytest.approx(free / 2)
    assert shift(0.0) == 0


def test_without_a_fresh_item_nothing_is_moved(trained: Trained) -> None:
    """The calibration stays what it was."""
    old = Frame(FRAME.users, FRAME.items, FRAME.rows.with_columns(pl.lit(99, pl.Float32).alias(ITEM_AGE)))
    catalog = Catalog.build(FRAME.items, trained.encoder)
    assert with_parity(IDENTITY, trained, old, catalog, CalibrationConfig(exposure="parity")) == IDENTITY


def test_the_exported_graph_moves_fresh_items_and_no_other(trained: Trained, tmp_path: Path) -> None:
    """By 0.5 in logits of every action with a positive utility."""
    answers = []
    for name, shift in (("plain", 0.0), ("moved", 0.5)):
        facts = {"fingerprint": name, "run_date": "2024-03-11"}
        (tmp_path / name).mkdir()
        export_bundle(
            trained, IDENTITY.model_copy(update={"fresh_shift": shift}), FRAME, FRAME.items, tmp_path / name, facts
        )
        answers.append(OnnxRanker(tmp_path / name).score(FRAME, FRAME.items)["probabilities"])
    plain, moved = (np.log(p / (1 - p)) for p in answers)
    fresh = (FRAME.rows[ITEM_AGE] < SCHEMA.fresh_days).to_numpy()
    assert moved[fresh] - plain[fresh] == pytest.approx(0.5, abs=1e-3)
    assert np.array_equal(answers[0][~fresh], answers[1][~fresh])
