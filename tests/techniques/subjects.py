"""The rankers every technique is tried on: ours, a plain MLP, torch-rechub's MMOE, deepctr-torch's DCN.

Each is told how to run (logits, z_bar and x_nh of one pass), how to predict from another z_bar, and what its inputs
look like without the item's history. Nothing else of a technique depends on the ranker.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freshrank.config import PLAIN, HistoryMaskingConfig, ModelConfig, ResidualConfig, TechniquesConfig
from freshrank.features.encoder import Catalog, Encoder
from freshrank.features.vocabulary import NEW
from freshrank.models.ranker import Ranker
from freshrank.schema import Entity
from freshrank.techniques.activation_hook import ActivationHook
from freshrank.techniques.feature_dropout import drop_rows
from freshrank.techniques.history_masking import AgeMask, downsample_counters, draw_age_mask
from freshrank.techniques.residual import Residual
from freshrank.techniques.self_supervision import Fields
from freshrank.training.augmentations import Counters, absent_of, mask_history, without_item_history
from freshrank.training.batches import Batch, TensorFrame
from freshrank.training.pretrain_items import ContentFields
from tests.worlds import random_frame, tiny_schema

ITEMS, GENRES, TONES, DIM = 30, 4, 8, 6
REDUCED = 3
"""Width the residual reduces x_nh to."""
MASKING = HistoryMaskingConfig(keep=(0.1, 0.5))
"""Items have tens of impressions here; of the shares that suit thousands, none would be left."""


@dataclass(frozen=True)
class Example:
    """inputs as the ranker takes them; labels [B, A]; cold bool [B]; impressions of the item [B]."""

    inputs: Any
    labels: Tensor
    cold: Tensor
    impressions: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Pass(NamedTuple):
    logits: Tensor
    z_bar: Tensor
    x_nh: Tensor


class Subject:
    """A ranker under test; ``residual`` is None where it was built without."""

    model: nn.Module
    residual: Residual | None

    def example(self, rows: int, seed: int = 0) -> Example:
        raise NotImplementedError

    def own(self, example: Example) -> Tensor:
        """Logits [B, A] as somebody gets them who has never heard of techniques."""
        raise NotImplementedError

    def run(self, example: Example) -> Pass:
        raise NotImplementedError

    def predict(self, example: Example, z_bar: Tensor) -> Tensor:
        """Logits [B, A] of F(z_bar)."""
        raise NotImplementedError

    def drop(self, example: Example, dropped: Tensor) -> Example:
        """The item's history reads as missing in the dropped rows."""
        raise NotImplementedError

    def young(self, example: Example, masking: HistoryMaskingConfig, generator: torch.Generator) -> Example:
        """Masked rows show their item as a new one: the unknown id, downsampled counters; they count as cold."""
        raise NotImplementedError

    def other_history(self, example: Example) -> Example:
        """Every row with the id and the counters of another row's item, and the content of its own."""
        raise NotImplementedError

    def fields(self, example: Example) -> list[Tensor]:
        """The item's content, a tensor per feature."""
        raise NotImplementedError

    def embed(self, fields: Fields) -> list[Tensor]:
        """What the ranker makes of each field, [B, d_f]."""
        raise NotImplementedError

    def embeddings(self) -> Iterable[nn.Parameter]:
        """Of the item's content."""
        raise NotImplementedError

    def new_row(self) -> Tensor:
        """Embedding of an unknown item's id, [d]."""
        raise NotImplementedError

    def with_ids(self, example: Example, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits [B, A], where ``change`` gets the embedding [B, d] of the candidate's id and answers with another."""
        raise NotImplementedError


def _simple(rows: int, seed: int, actions: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Items of four genres, two tones each; a click goes with an odd genre, a save with a high one; a third is cold.

    Row 0 uses id 0 for an unknown item. Counters come with the id: cold items have none.
    """
    generator = torch.Generator().manual_seed(seed)
    item = torch.randint(1, ITEMS, (rows,), generator=generator)
    genre, tone, cold = item % GENRES, item % TONES, item % 3 == 0
    seen = torch.where(cold, 0, 20.0 + item)
    labels = torch.stack([genre % 2, genre // 2], dim=1)[:, :actions].float()
    return {"item_id": item, "genre": genre, "tone": tone, "seen": seen.log1p()}, labels, cold


def _age_mask(rows: int, masking: HistoryMaskingConfig, generator: torch.Generator) -> AgeMask:
    return draw_age_mask(rows, masking.share, masking.unseen, masking.keep, 7.0, generator)


def _downsampled(seen: Tensor, age_mask: AgeMask, generator: torch.Generator) -> Tensor:
    """The counter of `_simple`, log1p of impressions in one window, [B]; of masked rows what age_mask leaves of it."""
    few, _ = downsample_counters(seen.expm1().round(), torch.zeros(len(seen), 1), age_mask, (7,), generator)
    return torch.where(age_mask.masked, few[:, 0].log1p(), seen)


class Ours(Subject):
    """freshrank's ranker on the tiny world."""

    config = ModelConfig(
        item_id_dim=4,
        categorical_dim=4,
        min_count=1,
        sequence_dim=8,
        group_dim=8,
        cross_rank=4,
        mlp=(16, 8),
        experts=2,
        expert_dim=8,
        head_dim=4,
    )

    def __init__(self, residual: bool = False) -> None:
        schema = tiny_schema()
        frame = random_frame(schema)
        self.encoder = Encoder.fit(frame, schema, 1)
        self.data = TensorFrame(frame, self.encoder, Catalog.build(frame.items, self.encoder))
        techniques = TechniquesConfig(residual=ResidualConfig(dim=REDUCED)) if residual else PLAIN
        self.model: Ranker = Ranker(self.encoder, self.config, techniques)
        self.residual = self.model.residual
        self.content = ContentFields(self.model.item)

    def example(self, rows: int, seed: int = 0) -> Example:
        batch = self.data.batch(torch.arange(rows) + seed)
        impressions = batch.inputs["item_numeric"][:, self.model.impressions_column]
        return Example(batch.inputs, batch.labels, batch.cold, impressions)

    def own(self, example: Example) -> Tensor:
        return self.model(example.inputs)

    def run(self, example: Example) -> Pass:
        there = self.model.represent(example.inputs)
        return Pass(self.model.prediction(there.z_bar), there.z_bar, there.x_nh)

    def predict(self, example: Example, z_bar: Tensor) -> Tensor:
        return self.model.prediction(z_bar)

    def drop(self, example: Example, dropped: Tensor) -> Example:
        changed = without_item_history(example.inputs, dropped, absent_of(self.encoder))
        return replace(example, inputs=example.inputs | changed)

    def young(self, example: Example, masking: HistoryMaskingConfig, generator: torch.Generator) -> Example:
        counters, numeric = Counters.of(self.encoder), example.inputs["item_numeric"].clone()
        # The tiny world's counters are any numbers; impressions are whole.
        numeric[:, counters.impressions] = numeric[:, counters.impressions].round()
        batch = Batch(example.inputs | {"item_numeric": numeric}, example.labels, example.cold)
        masked = mask_history(batch, counters, masking, generator)
        return replace(example, inputs=masked.inputs, cold=masked.cold)

    def other_history(self, example: Example) -> Example:
        columns, _ = absent_of(self.encoder)[Entity.ITEM]
        numeric = example.inputs["item_numeric"].clone()
        numeric[:, columns] = numeric[:, columns].roll(1, 0)
        changed = {"item_id": example.inputs["item_id"].roll(1), "item_numeric": numeric}
        return replace(example, inputs=example.inputs | changed)

    def fields(self, example: Example) -> list[Tensor]:
        return self.content.split(example.inputs)

    def embed(self, fields: Fields) -> list[Tensor]:
        return self.content.embed(fields)

    def embeddings(self) -> Iterable[nn.Parameter]:
        return self.model.item.parameters()

    def new_row(self) -> Tensor:
        return self.model.item_ids(torch.tensor([NEW]))[0]

    def with_ids(self, example: Example, change: Callable[[Tensor], Tensor]) -> Tensor:
        groups = self.model.groups(example.inputs)
        return self.model.prediction(self.model.interaction(groups | {"item_id": change(groups["item_id"])}))


class Mlp(nn.Module):
    """I: three embeddings and a counter through one layer; F: one layer."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.item, self.genre, self.tone = nn.Embedding(ITEMS, DIM), nn.Embedding(GENRES, DIM), nn.Embedding(TONES, DIM)
        self.interact = nn.Sequential(nn.Linear(3 * DIM + 1, 16), nn.ReLU())
        self.head = nn.Linear(16 + extra, 2)

    def content(self, x: dict[str, Tensor]) -> Tensor:
        return torch.cat([self.genre(x["genre"]), self.tone(x["tone"])], dim=1)

    def z(self, x: dict[str, Tensor]) -> Tensor:
        return self.interact(torch.cat([self.item(x["item_id"]), self.content(x), x["seen"][:, None]], dim=1))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.head(self.z(x))


class PlainMlp(Subject):
    """A model one writes oneself, taken apart at the hook."""

    def __init__(self, residual: bool = False) -> None:
        self.model: Mlp = Mlp(REDUCED if residual else 0)
        self.residual = Residual(2 * DIM, REDUCED) if residual else None

    def example(self, rows: int, seed: int = 0) -> Example:
        x, labels, cold = _simple(rows, seed, 2)
        return Example(x, labels, cold, x["seen"].expm1())

    def own(self, example: Example) -> Tensor:
        return self.model(example.inputs)

    def run(self, example: Example) -> Pass:
        z, x_nh = self.model.z(example.inputs), self.model.content(example.inputs)
        z_bar = self.residual(z, x_nh) if self.residual else z
        return Pass(self.model.head(z_bar), z_bar, x_nh)

    def predict(self, example: Example, z_bar: Tensor) -> Tensor:
        return self.model.head(z_bar)

    def drop(self, example: Example, dropped: Tensor) -> Example:
        x = example.inputs
        changed = {"item_id": drop_rows(x["item_id"], dropped, 0), "seen": drop_rows(x["seen"], dropped, 0.0)}
        return replace(example, inputs=x | changed)

    def young(self, example: Example, masking: HistoryMaskingConfig, generator: torch.Generator) -> Example:
        x, age_mask = example.inputs, _age_mask(len(example), masking, generator)
        ids = drop_rows(x["item_id"], age_mask.masked, 0)
        changed = {"item_id": ids, "seen": _downsampled(x["seen"], age_mask, generator)}
        return replace(example, inputs=x | changed, cold=example.cold | age_mask.masked)

    def other_history(self, example: Example) -> Example:
        x = example.inputs
        return replace(example, inputs=x | {name: x[name].roll(1) for name in ("item_id", "seen")})

    def fields(self, example: Example) -> list[Tensor]:
        return [example.inputs["genre"], example.inputs["tone"]]

    def tables(self) -> tuple[nn.Embedding, nn.Embedding, nn.Embedding]:
        """Of item ids, genres, tones."""
        return self.model.item, self.model.genre, self.model.tone

    def embed(self, fields: Fields) -> list[Tensor]:
        return [table(field) for table, field in zip(self.tables()[1:], fields, strict=True)]

    def embeddings(self) -> Iterable[nn.Parameter]:
        return [table.weight for table in self.tables()[1:]]

    def new_row(self) -> Tensor:
        return self.tables()[0].weight[0]

    @cached_property
    def id_seam(self) -> ActivationHook:
        return ActivationHook(self.tables()[0], "output")

    def with_ids(self, example: Example, change: Callable[[Tensor], Tensor]) -> Tensor:
        with self.id_seam.through(lambda e: change(e.flatten(1)).reshape(e.shape)):
            return self.own(example)


class RechubMmoe(PlainMlp):
    """torch-rechub's MMOE: I is its embedding layer, F everything behind it."""

    def __init__(self, residual: bool = False) -> None:
        from torch_rechub.basic.features import DenseFeature, SparseFeature
        from torch_rechub.models.multi_task import MMOE

        self.content = [SparseFeature("genre", GENRES, DIM), SparseFeature("tone", TONES, DIM)]
        features = [SparseFeature("item_id", ITEMS, DIM), *self.content, DenseFeature("seen")]
        # Dense features are appended to the embeddings, and so is the residual: z_bar = [z; r(x_nh)].
        features += [DenseFeature("residual", REDUCED)] if residual else []
        tower = {"dims": [8]}
        self.model = MMOE(features, ["classification"] * 2, 2, {"dims": [16]}, [tower, tower])
        self.residual = Residual(2 * DIM, REDUCED) if residual else None

    @cached_property
    def hook(self) -> ActivationHook:
        return ActivationHook(self.model.embedding, "output")

    def tables(self) -> tuple[nn.Embedding, nn.Embedding, nn.Embedding]:
        tables = self.model.embedding.embed_dict
        return tables["item_id"], tables["genre"], tables["tone"]

    def own(self, example: Example) -> Tensor:
        return torch.logit(self.model(example.inputs), eps=1e-6)

    def run(self, example: Example) -> Pass:
        x = example.inputs
        x_nh = self.model.embedding(x, self.content, squeeze_dim=True)
        reduced = {"residual": self.residual.reduce(x_nh)} if self.residual else {}
        hook = self.hook
        logits = torch.logit(self.model(x | reduced), eps=1e-6)
        return Pass(logits, hook.z, x_nh)

    def predict(self, example: Example, z_bar: Tensor) -> Tensor:
        unused = {"residual": torch.zeros(len(example), REDUCED)} if self.residual else {}
        with self.hook.through(lambda _: z_bar):
            return torch.logit(self.model(example.inputs | unused), eps=1e-6)


class DeepctrDcn(PlainMlp):
    """deepctr-torch's DCN: I is its cross and deep network, F its last layer; one action, one matrix of inputs."""

    def __init__(self, residual: bool = False) -> None:
        from deepctr_torch.inputs import DenseFeat, SparseFeat
        from deepctr_torch.models import DCN

        self.content = [SparseFeat("genre", GENRES, DIM), SparseFeat("tone", TONES, DIM)]
        columns = [SparseFeat("item_id", ITEMS, DIM), *self.content, DenseFeat("seen", 1)]
        with torch.random.fork_rng():
            # No linear columns: what bypasses the hook could be neither mixed nor widened.
            self.model = DCN([], columns, dnn_hidden_units=(16,), init_std=0.1, seed=torch.initial_seed() % 2**31)
        if residual:
            self.model.dnn_linear = nn.Linear(self.model.dnn_linear.in_features + REDUCED, 1, bias=False)
        self.residual = Residual(2 * DIM, REDUCED) if residual else None

    @cached_property
    def hook(self) -> ActivationHook:
        return ActivationHook(self.model.dnn_linear, "input")

    def example(self, rows: int, seed: int = 0) -> Example:
        x, labels, cold = _simple(rows, seed, 1)
        matrix = torch.stack([x[name].float() for name in self.model.feature_index], dim=1)
        return Example(matrix, labels, cold, x["seen"].expm1())

    def own(self, example: Example) -> Tensor:
        return torch.logit(self.model(example.inputs), eps=1e-6)

    def run(self, example: Example) -> Pass:
        x = example.inputs
        x_nh = torch.cat(self.model.input_from_feature_columns(x, self.content, self.model.embedding_dict)[0], -1)
        x_nh = x_nh.flatten(1)
        hook = self.hook
        if self.residual is None:
            return Pass(self.own(example), hook.z, x_nh)
        with hook.through(lambda z: self.residual(z, x_nh)):
            return Pass(self.own(example), hook.z, x_nh)

    def predict(self, example: Example, z_bar: Tensor) -> Tensor:
        with self.hook.through(lambda _: z_bar):
            return self.own(example)

    def drop(self, example: Example, dropped: Tensor) -> Example:
        return replace(example, inputs=drop_rows(example.inputs, dropped, 0.0, self._history))

    def young(self, example: Example, masking: HistoryMaskingConfig, generator: torch.Generator) -> Example:
        age_mask, (item_id, seen) = _age_mask(len(example), masking, generator), self._history
        x = drop_rows(example.inputs, age_mask.masked, 0.0, [item_id])
        x[:, seen] = _downsampled(x[:, seen], age_mask, generator)
        return replace(example, inputs=x, cold=example.cold | age_mask.masked)

    def other_history(self, example: Example) -> Example:
        x = example.inputs.clone()
        x[:, self._history] = x[:, self._history].roll(1, 0)
        return replace(example, inputs=x)

    def fields(self, example: Example) -> list[Tensor]:
        return [example.inputs[:, self.model.feature_index[name][0]].long() for name in ("genre", "tone")]

    def tables(self) -> tuple[nn.Embedding, nn.Embedding, nn.Embedding]:
        tables = self.model.embedding_dict
        return tables["item_id"], tables["genre"], tables["tone"]

    @property
    def _history(self) -> list[int]:
        return [self.model.feature_index[name][0] for name in ("item_id", "seen")]


SUBJECTS: dict[str, Callable[[bool], Subject]] = {
    "freshrank": Ours,
    "plain MLP": PlainMlp,
    "torch-rechub MMOE": RechubMmoe,
    "deepctr-torch DCN": DeepctrDcn,
}
