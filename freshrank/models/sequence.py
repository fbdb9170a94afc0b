"""The user's last engaged items as one vector: a transformer over padded or packed sequences."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from freshrank.config import ModelConfig

_LENGTHS = (4, 8, 16, 28)
"""Longest sequence of each group that attention computes together; the last group has the others."""


class SequenceEncoder(nn.Module):
    """Transformer over a user's last engaged items, read out as the mean of the present tokens.

    A learned token heads every sequence, so the empty sequence has an encoding of its own and no row of the
    attention is ever fully masked.
    """

    def __init__(self, token_dim: int, actions: int, length: int, config: ModelConfig) -> None:
        super().__init__()
        dim = config.sequence_dim
        self.project = nn.Linear(token_dim, dim)
        self.action = nn.Embedding(2**actions + 1, dim)
        self.position = nn.Embedding(length, dim)
        self.head = nn.Parameter(torch.zeros(1, 1, dim))
        block = EncoderBlock(
            dim, config.sequence_heads, 2 * dim, dropout=config.dropout, batch_first=True, norm_first=True
        )
        blocks = nn.ModuleList(deepcopy(block) for _ in range(config.sequence_layers))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.out_dim = 2 * dim

    def forward(self, tokens: Tensor, actions: Tensor) -> Tensor:
        """tokens [U, L, token_dim], actions [U, L] (0 = padding) -> [U, 2 * sequence_dim]: head token and mean."""
        absent = actions == 0
        x = self.project(tokens) + self.action(actions) + self.position(_distance(~absent))
        x = torch.cat([self.head.expand(x.shape[0], -1, -1), x], dim=1)
        valid = torch.cat([torch.ones_like(absent[:, :1]), ~absent], dim=1)
        encoded = self._encoded(x, partial(_padded_attention, valid))
        present = valid.to(encoded.dtype).unsqueeze(-1)
        mean = (encoded * present).sum(1) / present.sum(1)
        return torch.cat([encoded[:, 0], mean], dim=-1)

    def packed(self, tokens: Tensor, actions: Tensor) -> Tensor:
        """:meth:`forward` without computing for padding: tokens [T, token_dim], the present ones of ``actions``."""
        present = actions != 0
        packing = Packing.of(present)
        x = self.project(tokens) + self.action(actions[present]) + self.position(_distance(present)[present])
        x = torch.cat([self.head[0].expand(len(actions), -1), x])
        x = self._encoded(x, packing.attention)
        return torch.cat([x[: len(actions)], packing.means(x)], dim=-1)

    def _encoded(self, x: Tensor, attend: "Attend") -> Tensor:
        for block in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = block(x, attend)
        return x


Attend = Callable[[Tensor, int, float], Tensor]
"""Queries, keys and values [..., 3 d], heads and dropout -> attended values [..., d]."""


class EncoderBlock(nn.TransformerEncoderLayer):
    """torch's block, norms first, whose attention is given: what lies where is the caller's to know."""

    def forward(self, x: Tensor, attend: Attend) -> Tensor:  # type: ignore[override]
        """x [..., d] -> [..., d]."""
        attention = self.self_attn
        qkv = linear(self.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
        attended = attend(qkv, attention.num_heads, attention.dropout if self.training else 0.0)
        x = x + self.dropout1(attention.out_proj(attended))
        hidden = self.dropout(torch.relu(self.linear1(self.norm2(x))))
        updated: Tensor = x + self.dropout2(self.linear2(hidden))
        return updated


def _padded_attention(valid: Tensor, qkv: Tensor, heads: int, dropout: float) -> Tensor:
    """Scaled dot-product attention to the ``valid`` [U, L] places of each sequence: [U, L, 3 d] -> [U, L, d]."""
    users, length, width = qkv.shape
    q, k, v = qkv.view(users, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind()
    mask = valid.view(users, 1, 1, length)
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).reshape(users, length, width // 3)


def _distance(present: Tensor) -> Tensor:
    """How many places before a sequence's newest item each place is, [U, L]."""
    places = torch.arange(present.shape[1], device=present.device)
    return (present.sum(-1, keepdim=True) - 1 - places).clamp(min=0)


@dataclass(frozen=True)
class Packing:
    """Where the rows of a packed batch of sequences stand: U heads, then the T present tokens, user by user.

    For attention they are laid out in blocks of sequences of similar length, [users, length] each: ``padded``
    [sum of the blocks' sizes] is the packed row at each place, ``valid`` whether it belongs there, and ``back``
    [U + T] the place of each packed row.
    """

    counts: Tensor
    """Tokens of each user, [U]."""
    blocks: list[tuple[int, int]]
    padded: Tensor
    valid: Tensor
    back: Tensor

    @classmethod
    def of(cls, present: Tensor) -> "Packing":
        """``present`` bool [U, L]."""
        counts = present.sum(1)
        group = torch.bucketize(counts, torch.tensor(_LENGTHS, device=counts.device))
        blocks, padded, valid = [], [], []
        first = len(counts) + counts.cumsum(0) - counts - 1  # of a user's token number 1
        for number in range(len(_LENGTHS) + 1):
            users = (group == number).nonzero()
            longest = int(counts[users].amax()) if len(users) else -1
            places = torch.arange(longest + 1, device=counts.device)
            there = places <= counts[users]
            blocks.append((len(users), len(places)))
            padded.append(torch.where((places > 0) & there, first[users] + places, users).flatten())
            valid.append(there.flatten())
        places, there = torch.cat(padded), torch.cat(valid)
        back = torch.empty(len(counts) + int(counts.sum()), dtype=torch.long, device=counts.device)
        back[places[there]] = there.nonzero()[:, 0]
        return cls(counts, [block for block in blocks if all(block)], places, there, back)

    def attention(self, qkv: Tensor, heads: int, dropout: float) -> Tensor:
        """Scaled dot-product attention within each sequence: queries, keys and values [U + T, 3 d] -> [U + T, d]."""
        sizes = [users * length for users, length in self.blocks]
        parts = zip(self.blocks, qkv.index_select(0, self.padded).split(sizes), self.valid.split(sizes), strict=True)
        attended = [
            _padded_attention(valid.view(block), part.view(*block, -1), heads, dropout).flatten(0, 1)
            for block, part, valid in parts
        ]
        return torch.cat(attended).index_select(0, self.back)

    def means(self, x: Tensor) -> Tensor:
        """Mean of each sequence's rows, head included: [U + T, d] -> [U, d]."""
        users = torch.arange(len(self.counts), device=x.device)
        sums = x[: len(users)].index_add(0, users.repeat_interleave(self.counts), x[len(users) :])
        means: Tensor = sums / (self.counts[:, None] + 1)
        return means
