"""Score regularization between warm and cold instances (paper, section 3.3, eq. 6)."""

from torch import Tensor


def score_reg(y_hat: Tensor, cold: Tensor) -> Tensor:
    """L_MMD: squared distance of the mean predictions of warm and of cold rows, summed over actions.

    In another training loop: ``loss = bce + weight * score_reg(y_hat, cold)``. Give it the ORIGINAL batch, never
    mixed rows.

    Args:
        y_hat: predicted probabilities, [B, A].
        cold: True where the item is cold, bool [B].

    Returns:
        A scalar; exactly 0, with zero gradient, where the batch has no cold or no warm row.
    """
    c = cold.to(y_hat.dtype).unsqueeze(-1)
    w = 1 - c
    gap = (y_hat * w).sum(0) / w.sum().clamp(min=1) - (y_hat * c).sum(0) / c.sum().clamp(min=1)
    both = (c.sum() > 0) & (w.sum() > 0)
    return both.to(y_hat.dtype) * gap.square().sum()
