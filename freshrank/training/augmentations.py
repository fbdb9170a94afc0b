"""Augmentations of a training batch: functions from a batch to a batch, applied in order."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from freshrank.config import FeatureDropoutConfig, HistoryMaskingConfig, TechniquesConfig, TrainingConfig
from freshrank.features.encoder import Encoder, absent_history
from freshrank.features.vocabulary import MISSING, NEW
from freshrank.models.inputs import ItemIds
from freshrank.models.ranker import Inputs
from freshrank.schema import ITEM_AGE, Entity, hourly_names, impressions_of
from freshrank.techniques.feature_dropout import draw_rows, drop_rows
from freshrank.techniques.history_masking import downsample_counters, draw_age_mask
from freshrank.training.batches import Batch
from freshrank.training.state import Generators

Transform = Callable[[Batch], Batch]
Absent = dict[Entity, tuple[list[int], Tensor]]
"""Per entity: positions of the historical columns of its numeric block, and what they hold without history."""


def batch_transforms(
    encoder: Encoder, techniques: TechniquesConfig, training: TrainingConfig, draws: Generators
) -> list[Transform]:
    """The transforms of one training run.

    Each draws from a generator of its own, so switching one on leaves batches, hidden ids and all else as they were.
    """

    generator = draws.generator
    transforms: list[Transform] = [partial(hide_ids, probability=training.new_item_probability, generator=generator(1))]
    if techniques.meta_embedding:
        share = techniques.meta_embedding.share
        transforms.append(partial(hide_ids, probability=share, generator=generator(5)))
    if techniques.feature_dropout:
        dropout = techniques.feature_dropout
        transforms.append(partial(drop_history, absent=absent_of(encoder), config=dropout, generator=generator(3)))
    if masking := techniques.history_masking:
        transforms.append(partial(mask_history, counters=Counters.of(encoder), config=masking, generator=generator(4)))
    return transforms


@dataclass(frozen=True)
class Counters:
    """Where an item's counters and age stand in the numeric blocks, by window and action."""

    windows: tuple[int, ...]
    """In days, ascending; [W]."""
    window: list[int]
    """Which of them each of C counters counts; hourly ones count a day, as the daily window of 1 does."""
    impressions: list[int]
    """[C] columns of ``item_numeric``; the last is that of the longest window."""
    positives: list[list[int]]
    """[C, A]."""
    rates: list[list[int]]
    """[C, A]."""
    age: int
    """Column of ``row_numeric``."""
    fresh_days: float

    @classmethod
    def of(cls, encoder: Encoder) -> "Counters":
        schema, actions = encoder.schema, encoder.schema.actions
        place = {feature.name: column for column, feature in enumerate(encoder.numeric(Entity.ITEM))}
        names = [
            (
                days,
                impressions_of(Entity.ITEM, days),
                [f"item_{a}_{days}d" for a in actions],
                [f"item_{a}_rate_{days}d" for a in actions],
            )
            for days in schema.history.windows
        ]
        if schema.history.hourly:
            names.insert(0, (1, *hourly_names(actions)))
        windows = sorted({days for days, *_ in names})
        return cls(
            windows=tuple(windows),
            window=[windows.index(days) for days, *_ in names],
            impressions=[place[impressions] for _, impressions, *_ in names],
            positives=[[place[name] for name in positives] for *_, positives, _ in names],
            rates=[[place[name] for name in rates] for *_, rates in names],
            age=[feature.name for feature in encoder.numeric(Entity.ROW)].index(ITEM_AGE),
            fresh_days=schema.fresh_days,
        )


def mask_history(batch: Batch, counters: Counters, config: HistoryMaskingConfig, generator: torch.Generator) -> Batch:
    """History masking: in some rows the item has the id, the counters and the age of a new one, and counts as cold."""
    numeric, rows = batch.inputs["item_numeric"].clone(), batch.inputs["row_numeric"].clone()
    age_mask = draw_age_mask(len(numeric), config.share, config.unseen, config.keep, counters.fresh_days, generator)
    age_mask = type(age_mask)(*(drawn.to(numeric.device) for drawn in age_mask))
    drawn = downsample_counters(
        numeric[:, counters.impressions[-1]].cpu(),
        numeric[:, counters.rates[-1]].cpu(),
        age_mask,
        counters.windows,
        generator,
    )
    impressions, positives = (counts.to(numeric) for counts in drawn)
    observed, masked = ~numeric[:, counters.rates[-1]].isnan(), age_mask.masked
    for place, window in enumerate(counters.window):
        shown = impressions[:, window, None]
        numeric[:, counters.impressions[place]] = shown[:, 0]
        numeric[:, counters.positives[place]] = positives[:, window]
        numeric[:, counters.rates[place]] = torch.where(observed & (shown > 0), positives[:, window] / shown, torch.nan)
    rows[:, counters.age] = age_mask.age_days
    masked_batch = _with(
        batch,
        item_id=drop_rows(batch.inputs["item_id"], masked, NEW),
        item_numeric=torch.where(masked[:, None], numeric, batch.inputs["item_numeric"]),
        row_numeric=torch.where(masked[:, None], rows, batch.inputs["row_numeric"]),
    )
    return replace(masked_batch, cold=batch.cold | masked)


def hide_ids(batch: Batch, probability: float, generator: torch.Generator) -> Batch:
    """Some item ids become the new-item row, so that the row is trained."""
    return _with(batch, item_id=ItemIds.hide(batch.inputs["item_id"], probability, generator))


def absent_of(encoder: Encoder) -> Absent:
    """What the numeric blocks hold for an entity without history."""
    absent = {entity: absent_history(encoder.numeric(entity)) for entity in Entity}
    return {entity: (columns, torch.from_numpy(values)) for entity, (columns, values) in absent.items() if columns}


def drop_history(batch: Batch, absent: Absent, config: FeatureDropoutConfig, generator: torch.Generator) -> Batch:
    """Feature dropout: per row the item's history, per user of the batch the user's, or both independently.

    A user's history is the counters, the sequence and the crosses with the candidates' categories.
    """
    if config.history in ("item", "all"):
        dropped = draw_rows(len(batch.inputs["item_id"]), config.probability, generator)
        batch = _with(batch, **without_item_history(batch.inputs, dropped, absent))
    if config.history in ("user", "all"):
        dropped = draw_rows(len(batch.inputs["sequence_actions"]), config.probability, generator)
        batch = _with(batch, **without_user_history(batch.inputs, dropped, absent))
    return batch


def without_item_history(inputs: Inputs, dropped: Tensor, absent: Absent) -> Inputs:
    return {"item_id": drop_rows(inputs["item_id"], dropped, NEW)} | _numeric(Entity.ITEM, inputs, dropped, absent)


def without_user_history(inputs: Inputs, dropped: Tensor, absent: Absent) -> Inputs:
    sequences = {name: drop_rows(x, dropped, MISSING) for name, x in inputs.items() if name.startswith("sequence_")}
    rows = dropped.to(inputs["user_index"].device)[inputs["user_index"]]
    return sequences | _numeric(Entity.USER, inputs, dropped, absent) | _numeric(Entity.ROW, inputs, rows, absent)


def _numeric(entity: Entity, inputs: Inputs, dropped: Tensor, absent: Absent) -> Inputs:
    if entity not in absent:
        return {}
    columns, values = absent[entity]
    name = f"{entity}_numeric"
    return {name: drop_rows(inputs[name], dropped, values, columns)}


def _with(batch: Batch, **blocks: Tensor) -> Batch:
    return replace(batch, inputs=batch.inputs | blocks)
