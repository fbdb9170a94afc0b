"""From encoded blocks to dense vectors: embeddings, missing masks, normalisation, sequence encoder."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from freshrank.config import ModelConfig
from freshrank.encoding import MISSING, NEW, Encoder, NumericStatistics, historical_columns
from freshrank.schema import ITEM_AGE, ITEM_ID, Entity, Feature

_LENGTHS = (4, 8, 16, 28)
"""Longest sequence of each group that attention computes together; the last group has the others."""


class EmbeddingTables(nn.Module):
    """One table for several categorical columns: [.., C] local rows -> [.., C, dim]."""

    offsets: Tensor

    def __init__(self, sizes: list[int], dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(sizes), dim)
        nn.init.normal_(self.table.weight, std=0.05)
        self.register_buffer("offsets", torch.tensor([0, *np.cumsum(sizes)[:-1]], dtype=torch.long))

    def forward(self, rows: Tensor) -> Tensor:
        embedded: Tensor = self.table(rows + self.offsets)
        return embedded


class Numeric(nn.Module):
    """Transform, fill, standardise and mask numeric columns: [N, C] with NaN -> [N, C + masked columns]."""

    mean: Tensor
    std: Tensor
    log: Tensor
    nullable: Tensor
    cap: Tensor

    def __init__(self, features: list[Feature], statistics: NumericStatistics, cap: list[float] | None = None) -> None:
        super().__init__()
        self.capped = cap is not None and min(cap) < math.inf
        self.register_buffer("cap", torch.tensor(cap or math.inf), persistent=False)
        self.register_buffer("mean", torch.from_numpy(statistics.mean))
        self.register_buffer("std", torch.from_numpy(statistics.std))
        self.register_buffer("log", torch.tensor([f.transform == "log1p" for f in features]))
        nullable = [i for i, f in enumerate(features) if f.default is None]
        self.register_buffer("nullable", torch.tensor(nullable, dtype=torch.long))
        self.out_dim = len(features) + len(nullable)

    def forward(self, x: Tensor) -> Tensor:
        """The mean stands in for a missing value; a mask column tells the model so."""
        missing = torch.isnan(x)
        x = torch.where(missing, torch.zeros_like(x), x)
        if self.capped:
            x = torch.minimum(x, self.cap)
        x = torch.where(self.log, torch.sign(x) * torch.log1p(torch.abs(x)), x)
        x = torch.where(missing, torch.zeros_like(x), (x - self.mean) / self.std)
        mask = missing.to(x.dtype).index_select(-1, self.nullable)
        return torch.cat([x.clamp(-8, 8), mask], dim=-1)


class ContentVector(nn.Module):
    """A dense content vector; a missing one (NaN) becomes zeros with its mask set: [N, D] -> [N, D + 1]."""

    def forward(self, x: Tensor) -> Tensor:
        missing = torch.isnan(x)
        mask = missing.any(dim=-1, keepdim=True).to(x.dtype)
        return torch.cat([torch.where(missing, torch.zeros_like(x), x), mask], dim=-1)


class MultiValued(nn.Module):
    """Mean embedding per multi-valued feature: [N, sum of widths] -> [N, features * dim]."""

    def __init__(self, features: list[Feature], sizes: list[int], dim: int) -> None:
        super().__init__()
        self.widths = [f.dim for f in features]
        self.tables = nn.ModuleList([nn.Embedding(size, dim) for size in sizes])
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.05)  # type: ignore[arg-type]
        self.out_dim = dim * len(features)

    def forward(self, rows: Tensor) -> Tensor:
        means = []
        for table, part in zip(self.tables, rows.split(self.widths, dim=-1), strict=True):
            embedded = table(part)
            present = (part != MISSING).to(embedded.dtype).unsqueeze(-1)
            total = (embedded * present).sum(-2)
            means.append(total / present.sum(-2).clamp(min=1))
        return torch.cat(means, dim=-1)


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


class _Age(NamedTuple):
    """How an item's age enters: its highest value, and the mean it is shifted by where not the training rows'."""

    cap: float
    mean: float | None


_AGES: dict[str, Callable[[float], _Age]] = {
    "raw": lambda fresh_days: _Age(math.inf, None),
    # All warm items read 0; statistics of the training rows, nearly all of them warm, would blow the young ones up.
    "capped": lambda fresh_days: _Age(fresh_days, math.log1p(fresh_days)),
    "none": lambda fresh_days: _Age(0.0, 0.0),
}


class EntityInputs(nn.Module):
    """The dense inputs of one entity (user, item or row), split by feature group.

    ``dense`` maps the entity's blocks to {group: [N, width]}; a group without features is absent.
    """

    def __init__(self, entity: Entity, encoder: Encoder, config: ModelConfig) -> None:
        super().__init__()
        self.entity = entity
        sizes = {name: len(v) for name, v in encoder.vocabularies.items()}
        self.blocks = nn.ModuleDict()
        self.widths: dict[str, int] = {}
        self.age = _AGES[config.item_age](encoder.schema.fresh_days)
        if features := encoder.categorical(entity):
            self._add("categorical", EmbeddingTables([sizes[f.name] for f in features], config.categorical_dim),
                      len(features) * config.categorical_dim)  # fmt: skip
        if features := encoder.multi_valued(entity):
            multi = MultiValued(features, [sizes[f.name] for f in features], config.categorical_dim)
            self._add("multi", multi, multi.out_dim)
        if features := encoder.embedding(entity):
            self._add("embedding", ContentVector(), sum(f.dim for f in features) + 1)
        self._add_numeric(encoder)

    def _add(self, name: str, block: nn.Module, width: int) -> None:
        self.blocks[name] = block
        self.widths[name] = width

    def _add_numeric(self, encoder: Encoder) -> None:
        features = encoder.numeric(self.entity)
        historical = historical_columns(features)
        declared = [i for i in range(len(features)) if i not in historical]
        self.columns = {"numeric": declared, "history": historical}
        for name, columns in self.columns.items():
            if columns:
                block = self._numeric([features[i] for i in columns], encoder.statistics[self.entity], columns)
                self._add(name, block, block.out_dim)

    def _numeric(self, features: list[Feature], moments: NumericStatistics, columns: list[int]) -> Numeric:
        mean, std = moments.mean[columns], moments.std[columns]
        cap = [self.age.cap if f.name == ITEM_AGE else math.inf for f in features]
        for place, feature in enumerate(features):
            if feature.name == ITEM_AGE and self.age.mean is not None:
                mean[place], std[place] = self.age.mean, 1.0
        return Numeric(features, NumericStatistics(mean, std), cap)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"content": non-historical [N, ..], "history": historical numerics [N, ..]}; absent where empty."""
        parts = {name: self._dense(name, block, inputs) for name, block in self.blocks.items()}
        history = parts.pop("history", None)
        dense = {"content": torch.cat(list(parts.values()), dim=-1)} if parts else {}
        return dense if history is None else dense | {"history": history}

    def _dense(self, name: str, block: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if name in self.columns:
            x = inputs[f"{self.entity}_numeric"]
            dense: Tensor = block(x[..., self.columns[name]])
            return dense
        dense = block(inputs[f"{self.entity}_{name}"])
        return dense.flatten(-2) if name == "categorical" else dense

    @property
    def dims(self) -> dict[str, int]:
        """Widths of what :meth:`forward` returns."""
        content = sum(width for name, width in self.widths.items() if name != "history")
        widths = {"content": content, "history": self.widths.get("history", 0)}
        return {name: width for name, width in widths.items() if width}


class ItemIds(nn.Module):
    """Item-id embedding (a historical feature). In training some ids are replaced by the new-item row."""

    def __init__(self, encoder: Encoder, config: ModelConfig) -> None:
        super().__init__()
        self.table = EmbeddingTables([len(encoder.vocabularies[ITEM_ID])], config.item_id_dim)

    def forward(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.table(ids.unsqueeze(-1)).squeeze(-2)
        return embedded

    @staticmethod
    def hide(ids: Tensor, probability: float, generator: torch.Generator) -> Tensor:
        """Replace each id by the new-item row with ``probability`` (CPU generator)."""
        hidden = torch.rand(ids.shape, generator=generator).to(ids.device) < probability
        return torch.where(hidden, torch.full_like(ids, NEW), ids)
