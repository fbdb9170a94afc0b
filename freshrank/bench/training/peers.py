"""torch-rechub and FuxiCTR on a ranker of the shape of ours, fed the very rows ours is fed.

Same features, vocabularies, widths of embeddings, sequence transformer (torch's own, as in both libraries' BST), cross
layers of the same rank, MLP, experts and towers, batch size, Adam. What differs is theirs: a row is an impression with
its user's features and padded sequence beside it, every categorical feature has a table of its own, the inputs are
crossed without being summarised first, their low-rank cross layer (CrossNetMix, one expert) has a further matrix and
two tanh, torch-rechub's MLPs normalise batches, FuxiCTR clips gradients, a missing label counts as 0. Numbers are
standardised beforehand, which ours does in the step.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from freshrank.config import ModelConfig
from freshrank.errors import ConfigError
from freshrank.features.encoder import Encoder
from freshrank.models.ranker import Ranker, count_parameters
from freshrank.schema import ITEM_ID, Entity
from freshrank.training.batches import Batch

ENTITIES = (Entity.USER, Entity.ITEM, Entity.ROW)
PeerRows = dict[str, Tensor]
DENSE = "dense"


@dataclass(frozen=True)
class Fields:
    """Names of a row's columns by kind, with (vocabulary, width of the embedding) of the categorical ones."""

    single: dict[str, tuple[int, int]]
    several: dict[str, tuple[int, int]]
    sequence: dict[str, tuple[int, int, str]]
    """The third entry names the column of ``single`` whose table is shared."""
    dense: int
    actions: list[str]
    length: int

    @classmethod
    def of(cls, encoder: Encoder, config: ModelConfig, dense: int) -> "Fields":
        sizes = {name: len(vocabulary) for name, vocabulary in encoder.vocabularies.items()}
        dim = config.categorical_dim
        single = {"id": (sizes[ITEM_ID], config.item_id_dim)}
        single |= {f"{e}_{f.name}": (sizes[f.name], dim) for e in ENTITIES for f in encoder.categorical(e)}
        several = {f"{e}_{f.name}": (sizes[f.name], dim) for e in ENTITIES for f in encoder.multi_valued(e)}
        names = ["id", *(f"item_{f.name}" for f in encoder.categorical(Entity.ITEM))]
        sequence = {f"seen_{name}": (*single[name], name) for name in names}
        return cls(
            single, several, sequence, dense, list(encoder.schema.actions), encoder.schema.history.sequence_length
        )


def rows_of(batch: Batch, encoder: Encoder, ranker: Ranker) -> tuple[PeerRows, Tensor]:
    """Columns of :class:`Fields`, [B, ..] each, ``action`` [B, L] of the sequence, and labels [B, A], 0 = missing."""
    index = batch.inputs["user_index"]
    inputs = {
        name: block[index] if name.startswith(("user_", "sequence_")) else block
        for name, block in batch.inputs.items()
        if name != "user_index"
    }
    rows: PeerRows = {"id": inputs["item_id"]}
    dense: list[Tensor] = []
    for entity in ENTITIES:
        for place, feature in enumerate(encoder.categorical(entity)):
            rows[f"{entity}_{feature.name}"] = inputs[f"{entity}_categorical"][:, place]
        if features := encoder.multi_valued(entity):
            parts = inputs[f"{entity}_multi"].split([feature.dim for feature in features], dim=1)
            rows |= {f"{entity}_{feature.name}": part for feature, part in zip(features, parts, strict=True)}
        dense += _dense(entity, inputs, getattr(ranker, entity.value))
    rows |= {"seen_id": inputs["sequence_items"], "action": inputs["sequence_actions"]}
    for place, feature in enumerate(encoder.categorical(Entity.ITEM)):
        rows[f"seen_item_{feature.name}"] = inputs["sequence_categorical"][:, :, place]
    rows[DENSE] = torch.cat(dense, dim=1)
    return {name: block.contiguous() for name, block in rows.items()}, batch.labels.nan_to_num(0)


def _dense(entity: Entity, inputs: PeerRows, module: Any) -> list[Tensor]:
    with torch.no_grad():
        return [
            module._dense(name, block, inputs)
            for name, block in module.blocks.items()
            if name in ("numeric", "history", "embedding")
        ]


@dataclass(frozen=True)
class BuildingBlocks:
    """A library's own building blocks: from a width to a module."""

    cross: Callable[[int], nn.Module]
    mlp: Callable[[int], nn.Module]
    expert: Callable[[int], nn.Module]
    tower: Callable[[int], nn.Module]


class PeerRanker(nn.Module):
    """Probabilities [B, A] of rows; ``embed`` is the library's embedding of them."""

    def __init__(self, embed: nn.Module, columns: Fields, blocks: BuildingBlocks, config: ModelConfig) -> None:
        super().__init__()
        self.embed, self.actions = embed, len(columns.actions)
        dim = config.sequence_dim
        self.project = nn.Linear(sum(width for _, width, _ in columns.sequence.values()), dim)
        self.action = nn.Embedding(2**self.actions + 1, dim)
        self.position = nn.Parameter(torch.zeros(columns.length, dim))
        layer = nn.TransformerEncoderLayer(dim, config.sequence_heads, 2 * dim, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.sequence_layers, enable_nested_tensor=False)
        embedded = sum(width for table in (columns.single, columns.several) for _, width in table.values())
        width = embedded + columns.dense + dim
        self.cross, self.mlp = blocks.cross(width), blocks.mlp(width)
        z = config.mlp[-1]
        self.experts = nn.ModuleList(blocks.expert(z) for _ in range(config.experts))
        self.gates = nn.ModuleList(nn.Linear(z, config.experts) for _ in range(self.actions))
        self.towers = nn.ModuleList(blocks.tower(config.expert_dim) for _ in range(self.actions))

    def forward(self, rows: PeerRows) -> Tensor:
        flat, tokens = self.embed(rows)
        z = self.mlp(self.cross(torch.cat([flat, self._interest(tokens, rows["action"])], dim=1)))
        experts = torch.stack([expert(z) for expert in self.experts], dim=1)
        mixed = [(torch.softmax(gate(z), dim=1)[:, :, None] * experts).sum(1) for gate in self.gates]
        towers = [tower(x) for tower, x in zip(self.towers, mixed, strict=True)]
        return torch.sigmoid(torch.cat(towers, dim=1))

    def _interest(self, tokens: Tensor, action: Tensor) -> Tensor:
        absent = action == 0
        absent[:, 0] = False  # an empty sequence would be attended to by nobody
        encoded = self.encoder(self.project(tokens) + self.action(action) + self.position, src_key_padding_mask=absent)
        present = (~absent)[:, :, None].to(encoded.dtype)
        mean: Tensor = (encoded * present).sum(1) / present.sum(1)
        return mean


class _RechubEmbedding(nn.Module):
    """Their EmbeddingLayer, once per width: it cannot join embeddings of different ones."""

    def __init__(self, columns: Fields) -> None:
        from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
        from torch_rechub.basic.layers import EmbeddingLayer

        super().__init__()
        sparse = [SparseFeature(name, size, dim) for name, (size, dim) in columns.single.items()]
        sparse += [
            SequenceFeature(name, size, dim, "mean", padding_idx=0) for name, (size, dim) in columns.several.items()
        ]
        widths = sorted({feature.embed_dim for feature in sparse})
        self.flat = [[feature for feature in sparse if feature.embed_dim == width] for width in widths]
        self.flat[-1].append(DenseFeature(DENSE, columns.dense))
        sequence = [
            SequenceFeature(name, size, dim, "concat", shared_with=shared)
            for name, (size, dim, shared) in columns.sequence.items()
        ]
        self.sequence = [[feature for feature in sequence if feature.embed_dim == width] for width in widths]
        self.layer = EmbeddingLayer([feature for group in self.flat for feature in group])

    def forward(self, rows: PeerRows) -> tuple[Tensor, Tensor]:
        flat = [self.layer(rows, group, squeeze_dim=True) for group in self.flat]
        tokens = [self.layer(rows, group).transpose(1, 2).flatten(2) for group in self.sequence if group]
        return torch.cat(flat, dim=1), torch.cat(tokens, dim=2)


class Rechub:
    """torch-rechub's trainer, optimiser and loss around a ranker of its blocks."""

    def __init__(self, columns: Fields, config: ModelConfig, learning_rate: float) -> None:
        from torch_rechub.basic.layers import MLP, CrossNetMix
        from torch_rechub.trainers import MTLTrainer

        blocks = BuildingBlocks(
            cross=lambda width: CrossNetMix(width, config.cross_layers, config.cross_rank, num_experts=1),
            mlp=lambda width: MLP(width, output_layer=False, dims=list(config.mlp)),
            expert=lambda width: MLP(width, output_layer=False, dims=[config.expert_dim]),
            tower=lambda width: MLP(width, dims=[config.head_dim]),
        )
        model = PeerRanker(_RechubEmbedding(columns), columns, blocks, config)
        self.parameters = count_parameters(model)
        self.trainer = MTLTrainer(
            model, ["classification"] * len(columns.actions), optimizer_params={"lr": learning_rate}
        )

    def train(self, batches: Iterable[tuple[PeerRows, Tensor]]) -> list[float]:
        """One epoch over ``batches``; mean loss by action."""
        losses: list[float] = self.trainer.train_one_epoch(batches)
        return losses

    def loader(self, rows: PeerRows, labels: Tensor, size: int) -> Iterable[tuple[PeerRows, Tensor]]:
        """What feeds its users' trainings."""
        from torch_rechub.utils.data import DataGenerator

        few = ({name: block[:2] for name, block in rows.items()}, labels[:2])
        loader: Iterable[tuple[PeerRows, Tensor]] = DataGenerator(rows, labels).generate_dataloader(
            *few, *few, batch_size=size
        )[0]
        return loader


class Fuxi:
    """FuxiCTR's multi-task model, optimiser and train_step around a ranker of its blocks."""

    def __init__(self, columns: Fields, config: ModelConfig, learning_rate: float) -> None:
        from fuxictr.pytorch.layers import CrossNetMix, MLP_Block

        blocks = BuildingBlocks(
            cross=lambda width: CrossNetMix(width, config.cross_layers, config.cross_rank, num_experts=1),
            mlp=lambda width: MLP_Block(width, hidden_units=list(config.mlp)),
            expert=lambda width: MLP_Block(width, hidden_units=[config.expert_dim]),
            tower=lambda width: MLP_Block(width, hidden_units=[config.head_dim], output_dim=1),
        )
        self.actions = columns.actions
        self.model = _fuxi_model(columns, blocks, config, learning_rate)
        self.parameters = count_parameters(self.model)

    def train(self, batches: Iterable[tuple[PeerRows, Tensor]]) -> list[float]:
        """One epoch over ``batches``; mean loss."""
        self.model.train()
        losses = []
        for rows, labels in batches:
            named = dict(zip(self.actions, labels.T, strict=True))
            losses.append(self.model.train_step(rows | named).item())
        return [sum(losses) / len(losses)]


def _feature_map(columns: Fields) -> Any:
    from fuxictr.features import FeatureMap

    feature_map = FeatureMap("bench", tempfile.gettempdir())
    feature_map.labels = columns.actions
    for name, (size, dim) in columns.single.items():
        feature_map.features[name] = {"type": "categorical", "vocab_size": size, "embedding_dim": dim}
    for name, (size, dim) in columns.several.items():
        feature_map.features[name] = {
            "type": "sequence",
            "vocab_size": size,
            "embedding_dim": dim,
            "padding_idx": 0,
            "feature_encoder": "layers.MaskedAveragePooling()",
        }
    for name, (size, dim, shared) in columns.sequence.items():
        feature_map.features[name] = {
            "type": "sequence",
            "vocab_size": size,
            "embedding_dim": dim,
            "share_embedding": shared,
        }
    feature_map.features[DENSE] = {"type": "embedding", "feature_encoder": "nn.Identity()"}
    return feature_map


def _fuxi_model(columns: Fields, blocks: BuildingBlocks, config: ModelConfig, learning_rate: float) -> Any:
    from fuxictr.pytorch.layers import FeatureEmbeddingDict
    from fuxictr.pytorch.models import MultiTaskModel

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = FeatureEmbeddingDict(_feature_map(columns), config.categorical_dim)

        def forward(self, rows: PeerRows) -> tuple[Tensor, Tensor]:
            embedded = self.tables({name: block for name, block in rows.items() if name != "action"})
            flat = [embedded[name] for name in (*columns.single, *columns.several, DENSE)]
            return torch.cat(flat, dim=1), torch.cat([embedded[name] for name in columns.sequence], dim=2)

    class Model(MultiTaskModel):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__(
                _feature_map(columns),
                task="binary_classification",
                num_tasks=len(columns.actions),
                verbose=0,
                model_root=tempfile.gettempdir(),
                metrics=["AUC"],
            )
            self.ranker = PeerRanker(Embedding(), columns, blocks, config)
            self._max_gradient_norm = 10.0  # their default, which fit() would set
            self.compile("adam", "binary_crossentropy", learning_rate)

        def forward(self, inputs: PeerRows) -> dict[str, Tensor]:
            rows = {name: block for name, block in inputs.items() if name not in columns.actions}
            answers = self.ranker(rows).split(1, dim=1)
            return {f"{name}_pred": answer for name, answer in zip(columns.actions, answers, strict=True)}

    return Model()


PEERS: dict[str, Callable[[Fields, ModelConfig, float], Rechub | Fuxi]] = {"torch-rechub": Rechub, "FuxiCTR": Fuxi}


def require(names: Iterable[str]) -> None:
    """Raise :class:`ConfigError` unless the libraries behind ``names`` can be imported."""
    modules = {"torch-rechub": "torch_rechub.trainers", "FuxiCTR": "fuxictr.pytorch.models"}
    for name in names:
        try:
            __import__(modules[name])
        except ImportError as problem:
            raise ConfigError(
                f"bench train: {name} cannot be imported ({problem}); install it with `pip install "
                "'freshrank[bench]'`, or leave it out with --peers"
            ) from problem


def version(name: str) -> str:
    """Installed version of a peer."""
    return metadata.version(name.lower())


@contextmanager
def silent() -> Iterator[None]:
    """Without the progress bars and prints of a library."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # noqa: PTH123
            yield
    finally:
        root.setLevel(level)
