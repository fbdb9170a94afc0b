"""Pretraining of the ranker's item content on the items of the training days (techniques/pretraining.py)."""

import logging
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from freshrank.config import PretrainingConfig
from freshrank.errors import ConfigError
from freshrank.models.inputs import ContentVector, EntityInputs, MultiValued, Numeric
from freshrank.techniques.self_supervision import Contrastive, Vime, mutual_information, pretrain

log = logging.getLogger(__name__)
_INTEGER = ("categorical", "multi")


class ContentFields:
    """The content of an entity as one tensor per feature, and back into the blocks its inputs take."""

    def __init__(self, inputs: EntityInputs) -> None:
        self.inputs = inputs
        self.blocks = [name for name in inputs.blocks if name != "history"]
        self.counts: list[int] = []

    def split(self, blocks: dict[str, Tensor]) -> list[Tensor]:
        """One tensor per feature of ``blocks`` [I, ..]: categories [I, 1], multi-valued [I, width], floats."""
        parts = [self._parts(name, blocks[f"{self.inputs.entity}_{name}"]) for name in self.blocks]
        self.counts = [len(part) for part in parts]
        return [field for part in parts for field in part]

    def _parts(self, name: str, block: Tensor) -> Sequence[Tensor]:
        module = self.inputs.blocks[name]
        if isinstance(module, Numeric):
            block = block[:, self.inputs.columns[name]]
        widths = module.widths if isinstance(module, MultiValued) else 1
        parts: Sequence[Tensor] = [block] if isinstance(module, ContentVector) else block.split(widths, dim=-1)
        return parts

    def embed(self, fields: Sequence[Tensor]) -> list[Tensor]:
        """The dense vector of each field, as the ranker sees it, [B, d_f]."""
        ends = list(accumulate(self.counts))
        vectors: list[Tensor] = []
        for name, start, end in zip(self.blocks, [0, *ends], ends, strict=False):
            module = self.inputs.blocks[name]
            dense = module(torch.cat(list(fields[start:end]), dim=-1))
            if isinstance(module, Numeric):
                vectors += [dense[:, places] for places in _with_masks(module, end - start)]
            else:
                vectors += dense.flatten(1).chunk(end - start, dim=-1)
        return vectors


def _with_masks(numeric: Numeric, count: int) -> list[list[int]]:
    """Where each of ``count`` numbers stands in the block's output, and its missing mask, where it has one."""
    masks = {column: count + place for place, column in enumerate(numeric.nullable.tolist())}
    return [[column, masks[column]] if column in masks else [column] for column in range(count)]


def pretrain_items(item: EntityInputs, blocks: dict[str, Tensor], config: PretrainingConfig, seed: int) -> list[float]:
    """Train the embeddings of ``item`` on ``blocks`` (one row per item known by the window's end); losses per step.

    Draws of its own: the ranker's other weights, batches and hidden ids are what they are without it.

    Raises:
        ConfigError: the schema declares no categorical or multi-valued content of items.
    """
    content = ContentFields(item)
    if not set(_INTEGER) & set(content.blocks):
        raise ConfigError(
            "techniques.pretraining: the schema declares no categorical or multi-valued content of items, expected at "
            "least one to pretrain an embedding of; declare one in schema.yaml, or set techniques.pretraining=null"
        )
    fields = content.split(blocks)
    generator = torch.Generator().manual_seed(seed + 6)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 6)
        objective = _objective(content, fields, config).to(fields[0].device)
    losses = pretrain(
        objective,
        content.embed,
        fields,
        item.parameters(),
        config.steps,
        config.batch_size,
        config.learning_rate,
        generator,
    )
    log.info("pretraining: %s on %d items, loss %.3f to %.3f", config.objective, len(fields[0]), losses[0], losses[-1])
    return losses


def _objective(content: ContentFields, fields: list[Tensor], config: PretrainingConfig) -> Vime | Contrastive:
    with torch.no_grad():
        widths = [vector.shape[-1] for vector in content.embed([field[:1] for field in fields])]
    if config.objective == "vime":
        return Vime(widths, config.hidden, config.mask)
    information = mutual_information(fields) if config.correlated else None
    return Contrastive(widths, config.hidden, config.mask, config.temperature, information)
