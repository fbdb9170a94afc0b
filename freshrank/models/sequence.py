"""The user's last engaged items as one vector: a transformer over padded or packed sequences."""

from dataclasses import dataclass

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
        layer = nn.TransformerEncoderLayer(
            dim, config.sequence_heads, 2 * dim, dropout=config.dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.sequence_layers, enable_nested_tensor=False)
        self.out_dim = 2 * dim

    def forward(self, tokens: Tensor, actions: Tensor) -> Tensor:
        """tokens [U, L, token_dim], actions [U, L] (0 = padding) -> [U, 2 * sequence_dim]: head token and mean."""
        absent = actions == 0
        x = self.project(tokens) + self.action(actions) + self.position(_distance(~absent))
        x = torch.cat([self.head.expand(x.shape[0], -1, -1), x], dim=1)
        masked = torch.cat([torch.zeros_like(absent[:, :1]), absent], dim=1)
        encoded = self.encoder(x, src_key_padding_mask=masked)
        present = (~masked).to(encoded.dtype).unsqueeze(-1)
        mean = (encoded * present).sum(1) / present.sum(1)
        return torch.cat([encoded[:, 0], mean], dim=-1)

    def packed(self, tokens: Tensor, actions: Tensor) -> Tensor:
        """:meth:`forward` without computing for padding: tokens [T, token_dim], the present ones of ``actions``."""
        present = actions != 0
        packing = Packing.of(present)
        x = self.project(tokens) + self.action(actions[present]) + self.position(_distance(present)[present])
        x = torch.cat([self.head[0].expand(len(actions), -1), x])
        for layer in self.encoder.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            x = _packed_layer(layer, x, packing)
        return torch.cat([x[: len(actions)], packing.means(x)], dim=-1)


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
        found = []
        for (users, length), part, valid in parts:
            q, k, v = part.view(users, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
            mask = valid.view(users, 1, 1, length)
            y = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            found.append(y.transpose(1, 2).reshape(users * length, -1))
        return torch.cat(found).index_select(0, self.back)

    def means(self, x: Tensor) -> Tensor:
        """Mean of each sequence's rows, head included: [U + T, d] -> [U, d]."""
        users = torch.arange(len(self.counts), device=x.device)
        sums = x[: len(users)].index_add(0, users.repeat_interleave(self.counts), x[len(users) :])
        means: Tensor = sums / (self.counts[:, None] + 1)
        return means


def _packed_layer(layer: nn.TransformerEncoderLayer, x: Tensor, packing: Packing) -> Tensor:
    """torch's layer, norms first, on packed rows [U + T, d]."""
    attention = layer.self_attn
    qkv = linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
    attended = packing.attention(qkv, attention.num_heads, attention.dropout if layer.training else 0.0)
    x = x + layer.dropout1(attention.out_proj(attended))
    hidden = layer.dropout(torch.relu(layer.linear1(layer.norm2(x))))
    updated: Tensor = x + layer.dropout2(layer.linear2(hidden))
    return updated
