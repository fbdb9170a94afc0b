"""Residual path for non-historical features (paper, section 3.2, eq. 3)."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """z_bar = [z; r(x_nh)]: lets non-historical features bypass the interaction module.

    ``r`` is one layer that reduces x_nh to ``dim``; the prediction module F takes ``z_dim + dim`` inputs.
    In another ranker: ``y = F(residual(z, x_nh))`` in place of ``y = F(z)``.
    """

    def __init__(self, x_nh_dim: int, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(x_nh_dim, dim), nn.ReLU())

    def forward(self, z: Tensor, x_nh: Tensor) -> Tensor:
        """z [B, d_I], x_nh [B, d_nh] -> z_bar [B, d_I + dim]."""
        return torch.cat([z, self.reduce(x_nh)], dim=-1)
