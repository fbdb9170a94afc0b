"""From encoded blocks to dense vectors: embeddings, missing masks, normalisation, sequence encoder."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from freshrank.config import ModelConfig
from freshrank.features.encoder import Encoder, historical_columns
from freshrank.features.vocabulary import MISSING, NEW, NumericStatistics
from freshrank.schema import ITEM_AGE, ITEM_ID, Entity, Feature


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
            self._add(
                "categorical",
                EmbeddingTables([sizes[f.name] for f in features], config.categorical_dim),
                len(features) * config.categorical_dim,
            )
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
