"""Dropout of historical features (Volkovs et al. 2017, DropoutNet; compared in the paper, section 4.2.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_rows(count: int, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw which of ``count`` rows lose their history: bool [count], each True with ``probability``.

    ``generator`` is a CPU generator of its own, so that switching dropout on leaves every other draw unchanged.
    """
    return torch.rand(count, generator=generator) < probability


def drop_rows(
    x: Tensor, dropped: Tensor, missing: Tensor | float, columns: Sequence[int] | Tensor | None = None
) -> Tensor:
    """``x`` with the dropped rows reading as rows without history; ``x`` itself is left as it is.

    In another training loop: ``dropped = draw_rows(len(x), 0.3)`` and one ``x = drop_rows(x, dropped, missing)`` per
    input that holds history, all with the same ``dropped``: an item whose counters are gone but whose id is known is
    not what serving meets.

    Args:
        x: an input of the ranker, [B, ..], of any dtype: ids, counters, rates, padded sequences.
        dropped: bool [B].
        missing: what ``x`` holds where there is no history, broadcastable to a row of ``x`` (to its ``columns``).
        columns: positions in the last dimension that are historical; all without it.

    Returns:
        As ``x``.
    """
    value = torch.as_tensor(missing, dtype=x.dtype, device=x.device)
    where = dropped.to(x.device).reshape(-1, *(1,) * (x.dim() - 1))
    if columns is None:
        return torch.where(where, value, x)
    result = x.clone()
    result[..., columns] = torch.where(where, value, x[..., columns])
    return result
