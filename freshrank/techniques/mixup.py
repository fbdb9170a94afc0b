"""Manifold mixup at the output of the interaction module (paper, section 3.4, eq. 7-9)."""

import torch
from torch import Tensor


def mixup(z_bar: Tensor, y: Tensor, alpha: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Mix every row with another, distinct row of the batch; labels alike.

    In another training loop: ``z_mix, y_mix = mixup(z_bar, y, alpha)`` and
    ``loss = bce(F(z_bar), y) + weight * bce(F(z_mix), y_mix)``; only F runs twice.

    Args:
        z_bar: what F takes, [B, d].
        y: labels [B, A]; NaN (not observed) in either row of a pair stays NaN.
        alpha: lambda ~ Beta(alpha, alpha), one per row.
        generator: CPU generator of its own, so that switching mixup on leaves every other draw unchanged.

    Returns:
        (z_mix [B, d], y_mix [B, A]). A batch of one row is mixed with itself.
    """
    size = z_bar.shape[0]
    order = torch.randperm(size, generator=generator).to(z_bar.device)
    partner = torch.empty_like(order)
    partner[order] = order.roll(-1)  # neighbours in a random cycle: never a row with itself
    lam = _beta(alpha, size, generator).to(z_bar)
    return lam * z_bar + (1 - lam) * z_bar[partner], lam.to(y) * y + (1 - lam.to(y)) * y[partner]


def _beta(alpha: float, size: int, generator: torch.Generator | None) -> Tensor:
    """Beta(alpha, alpha) draws [size, 1], as g1 / (g1 + g2) of two gammas (torch.distributions takes no generator)."""
    shape = torch.full((2, size, 1), alpha, dtype=torch.float64)
    g1, g2 = torch._standard_gamma(shape, generator=generator)
    lam: Tensor = g1 / (g1 + g2).clamp(min=torch.finfo(torch.float64).tiny)
    return lam
