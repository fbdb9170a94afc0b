"""History masking: some warm items of a batch are shown as they would have looked when they were fresh.

The idea is DropoutNet's (Volkovs et al. 2017), made to look like what serving meets: a new item is not one without
numbers but one with few, all of them recent. So counters are downsampled rather than dropped; they fill the windows as
those of an item of the drawn age would, and the age is the drawn one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AgeMask(NamedTuple):
    """What is drawn per row: bool [B] whether it is masked, age in days [B], share of its impressions it keeps [B]."""

    masked: Tensor
    age_days: Tensor
    keep: Tensor


def draw_age_mask(
    count: int,
    share: float,
    unseen: float,
    keep: tuple[float, float],
    fresh_days: float,
    generator: torch.Generator | None = None,
) -> AgeMask:
    """Each row is masked with probability ``share``; ages are uniform in [0, fresh_days).

    A masked item keeps a share of its impressions that is log-uniform between the two values of ``keep``; with
    probability ``unseen`` it keeps none: it was just born. ``generator`` is a CPU generator of its own.
    """
    masked, newborn, age, place = torch.rand(4, count, generator=generator)
    low, high = torch.tensor(keep).log()
    share_kept = torch.exp(low + place * (high - low))
    return AgeMask(masked < share, age * fresh_days, torch.where(newborn < unseen, torch.zeros(()), share_kept))


def downsample_counters(
    impressions: Tensor,
    rates: Tensor,
    age_mask: AgeMask,
    windows: Sequence[int],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Counters of the same items had they been of the drawn age and rarely shown.

    In another training loop: thin the counters of ``age_mask.masked`` rows with this, give them ``age_mask.age_days``
    as their age, and replace their item ids by the one that unknown items share.

    Args:
        impressions: of the longest window, [B]; whole numbers.
        rates: positives per impression in that window, per action, [B, A]; NaN where none was observed.
        age_mask: of the B rows.
        windows: lengths in days, ascending.

    Returns:
        Impressions per window [B, W] and positives per window and action [B, W, A]: binomial draws, each window's
        within the next longer one's. Impressions spread evenly over the item's life, so an item of 2 days has half of
        them in the window of 1 day. Past impressions only are drawn from, so nothing learns a row's own label.
    """
    life = age_mask.age_days.clamp(min=1e-6)
    counts = [torch.binomial(impressions, age_mask.keep.to(impressions), generator=generator)]
    for shorter, longer in zip(windows[-2::-1], windows[:0:-1], strict=True):
        part = (shorter / life).clamp(max=1) / (longer / life).clamp(max=1)
        counts.append(torch.binomial(counts[-1], part.to(impressions), generator=generator))
    nested = torch.stack(counts[::-1], dim=1)
    between = nested.diff(dim=1, prepend=torch.zeros_like(nested[:, :1])).unsqueeze(2)
    chances = rates.nan_to_num().clamp(0, 1).to(impressions).unsqueeze(1)
    shape = between.shape[0], between.shape[1], chances.shape[2]
    positives = torch.binomial(between.expand(shape), chances.expand(shape), generator=generator)
    return nested, positives.cumsum(dim=1)
