"""Warm items shown as they would have looked when they were young."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freshrank.config import HistoryMaskingConfig, ModelConfig, TechniquesConfig, TrainingConfig
from freshrank.features.encoder import Catalog, Encoder
from freshrank.features.vocabulary import NEW
from freshrank.models.ranker import Ranker
from freshrank.schema import ITEM_AGE, Entity
from freshrank.techniques.history_masking import AgeMask, downsample_counters, draw_age_mask
from freshrank.training.augmentations import Counters, batch_transforms, mask_history
from freshrank.training.batches import Batch, TensorFrame
from freshrank.training.state import Generators
from tests.worlds import random_frame, tiny_schema

SCHEMA = tiny_schema()
FRAME = random_frame(SCHEMA, items=200)
ENCODER = Encoder.fit(FRAME, SCHEMA, 1)
COUNTERS = Counters.of(ENCODER)


def batch() -> Batch:
    data = TensorFrame(FRAME, ENCODER, Catalog.build(FRAME.items, ENCODER))
    whole = data.batch(torch.arange(len(data)))
    whole.inputs["item_numeric"][:, COUNTERS.impressions] = 100.0
    return whole


def masked(config: HistoryMaskingConfig, seed: int = 0) -> Batch:
    return mask_history(batch(), COUNTERS, config, torch.Generator().manual_seed(seed))


def age_mask(age_days: list[float], keep: float) -> AgeMask:
    count = len(age_days)
    return AgeMask(torch.ones(count, dtype=torch.bool), torch.tensor(age_days), torch.full((count,), keep))


def test_an_item_that_keeps_everything_fills_the_windows_as_its_age_says() -> None:
    """At 0.5 days all lies within the last day; at 4 days a quarter of 10,000 does, and all within the last 7."""
    counts, _ = downsample_counters(
        torch.full((2,), 10_000.0),
        torch.zeros(2, 1),
        age_mask([0.5, 4.0], 1.0),
        (1, 7, 28),
        torch.Generator().manual_seed(0),
    )
    assert counts[0].tolist() == [10_000, 10_000, 10_000]
    assert counts[1, 1:].tolist() == [10_000, 10_000]
    assert counts[1, 0].item() == pytest.approx(2_500, abs=200)


def test_positives_follow_the_items_own_rate() -> None:
    """3 of 10 impressions of the item were clicked, none saved."""
    counts, positives = downsample_counters(
        torch.full((1,), 10_000.0),
        torch.tensor([[0.3, 0.0]]),
        age_mask([2.0], 0.5),
        (1, 7),
        torch.Generator().manual_seed(0),
    )
    assert counts[0, 1].item() == pytest.approx(5_000, abs=250)
    assert (positives[0, :, 0] / counts[0]).tolist() == pytest.approx([0.3, 0.3], abs=0.03)
    assert positives[0, :, 1].tolist() == [0, 0]


@given(st.integers(0, 5000), st.floats(0, 1), st.floats(0, 13.9), st.floats(0, 1), st.integers(0, 999))
def test_windows_are_nested_and_positives_never_exceed_impressions(
    impressions: int, rate: float, age: float, keep: float, seed: int
) -> None:
    """Whatever is drawn, the counters are those of some item."""
    counts, positives = downsample_counters(
        torch.tensor([float(impressions)]),
        torch.tensor([[rate, math.nan]]),
        age_mask([age], keep),
        (1, 7, 28),
        torch.Generator().manual_seed(seed),
    )
    assert (counts.diff(dim=1) >= 0).all()
    assert (positives.diff(dim=1) >= 0).all()
    assert (positives <= counts.unsqueeze(2)).all()
    assert counts[0, -1] <= impressions


def test_the_drawn_shares_are_those_asked_for() -> None:
    """Half masked, a fifth of all unseen, kept shares between the bounds, ages below fresh_days."""
    drawn = draw_age_mask(20_000, 0.5, 0.2, (0.01, 0.1), 14.0, torch.Generator().manual_seed(1))
    assert drawn.masked.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (drawn.keep == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    shares = drawn.keep[drawn.keep > 0]
    assert 0.01 <= shares.min() <= shares.max() <= 0.1 + 1e-6
    assert shares.log().mean().exp().item() == pytest.approx(math.sqrt(0.001), rel=0.05)
    assert 0 <= drawn.age_days.min() <= drawn.age_days.max() < 14


def test_masked_rows_have_the_new_id_a_young_age_and_thin_counters_and_the_others_are_untouched() -> None:
    """Content, context and everything about the user stay."""
    before, after = batch(), masked(HistoryMaskingConfig(share=0.5, unseen=0.0, keep=(0.05, 0.1)))
    changed = (after.inputs["item_id"] == NEW) & (after.inputs["item_numeric"][:, COUNTERS.impressions[-1]] < 100)
    assert 0.4 < changed.float().mean() < 0.6
    for name, block in before.inputs.items():
        rows = ~changed if len(block) == len(changed) else slice(None)
        assert torch.equal(block[rows].nan_to_num(-1), after.inputs[name][rows].nan_to_num(-1)), name
    assert (after.inputs["row_numeric"][changed, COUNTERS.age] < SCHEMA.fresh_days).all()
    assert after.cold[changed].all()
    assert torch.equal(after.labels.isnan(), before.labels.isnan())


def test_an_unseen_item_looks_as_an_item_without_history_does() -> None:
    """Counters 0, rates missing."""
    after = masked(HistoryMaskingConfig(share=1.0, unseen=1.0))
    numeric = after.inputs["item_numeric"]
    assert (numeric[:, COUNTERS.impressions] == 0).all()
    assert all((numeric[:, columns] == 0).all() for columns in COUNTERS.positives)
    assert all(numeric[:, columns].isnan().all() for columns in COUNTERS.rates)


def test_hourly_counters_of_a_masked_row_are_those_of_a_day() -> None:
    """Both count a day of the young item's life; rows that are not masked keep what they had."""
    history = SCHEMA.history.model_copy(update={"hourly": True})
    schema = SCHEMA.model_copy(update={"history": history})
    frame = random_frame(schema, items=200)
    encoder = Encoder.fit(frame, schema, 1)
    counters, data = Counters.of(encoder), TensorFrame(frame, encoder, Catalog.build(frame.items, encoder))
    before = data.batch(torch.arange(len(data)))
    before.inputs["item_numeric"][:, counters.impressions[-1]] = 100.0
    after = mask_history(before, counters, HistoryMaskingConfig(share=0.5), torch.Generator().manual_seed(0))
    changed = after.inputs["item_id"] == NEW
    hourly, daily, longest = (after.inputs["item_numeric"][changed][:, column] for column in counters.impressions)
    assert counters.windows == (1, 7)
    assert torch.equal(hourly, daily)
    assert (daily <= longest).all()
    assert 0 < daily.max() < 100
    untouched, after_masking = (
        inputs["item_numeric"][~changed].nan_to_num(-1) for inputs in (before.inputs, after.inputs)
    )
    assert torch.equal(untouched, after_masking)


def test_a_rows_own_label_plays_no_part() -> None:
    """What is shown depends on past counters and draws alone."""
    turned = batch()
    turned.labels[:] = 1 - turned.labels
    config = HistoryMaskingConfig()
    other = mask_history(turned, COUNTERS, config, torch.Generator().manual_seed(0))
    assert torch.equal(
        other.inputs["item_numeric"].nan_to_num(-1), masked(config).inputs["item_numeric"].nan_to_num(-1)
    )


def test_switched_off_there_is_no_transform_of_it() -> None:
    """Hidden ids are the only one left."""
    assert len(batch_transforms(ENCODER, TechniquesConfig(), TrainingConfig(), Generators(0))) == 1
    on = TechniquesConfig(history_masking=HistoryMaskingConfig())
    assert len(batch_transforms(ENCODER, on, TrainingConfig(), Generators(0))) == 2


@pytest.mark.parametrize("setting, sees", [("raw", [True, True]), ("capped", [True, False]), ("none", [False, False])])
def test_item_age_enters_raw_capped_or_not_at_all(setting: str, sees: list[bool]) -> None:
    """Ages 2 and 3 differ below fresh_days (7), ages 20 and 30 above it."""
    column = [feature.name for feature in ENCODER.numeric(Entity.ROW)].index(ITEM_AGE)
    torch.manual_seed(0)
    ranker = Ranker(ENCODER, ModelConfig(item_age=setting)).eval()
    rows = batch().inputs["row_numeric"][:1].repeat(4, 1)
    rows[:, column] = torch.tensor([2.0, 3.0, 20.0, 30.0])
    dense = ranker.row({**batch().inputs, "row_numeric": rows, "row_categorical": torch.zeros(4, 1, dtype=torch.long)})
    young, old = (not torch.equal(dense["content"][a], dense["content"][a + 1]) for a in (0, 2))
    assert [young, old] == sees
    assert dense["content"].isfinite().all()
