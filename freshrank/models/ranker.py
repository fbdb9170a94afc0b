"""The multi-task ranker (paper, section 4.1, figure 5): y_hat = F(I(x_h; x_nh)), eq. 1.

I: per-group embedding, user-sequence transformer, summarization (grouping, crossing), DCNv2, MLP -> z.
F: MMoE and one head per action. The user block is computed once per user and broadcast to its candidates.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from freshrank.config import PLAIN, MetaEmbeddingConfig, ModelConfig, TechniquesConfig
from freshrank.errors import ConfigError
from freshrank.features.encoder import Encoder
from freshrank.features.vocabulary import FIRST_KNOWN, NEW
from freshrank.models.inputs import EntityInputs, ItemIds
from freshrank.models.sequence import SequenceEncoder
from freshrank.schema import ITEM_AGE, Entity, impressions_of
from freshrank.techniques.aldi import Student, answer
from freshrank.techniques.meta_embedding import IdGenerator
from freshrank.techniques.residual import Residual

Inputs = dict[str, Tensor]
Groups = dict[str, Tensor]
_USER_HISTORY = ("user_history", "sequence", "row_history")


class Representation(NamedTuple):
    """z_bar [N, d] is what F takes; z [N, d_I] and x_nh [N, d_nh] are its parts before the residual; the student
    takes x_student [N, d_s], without a student x_nh itself; the generator of item ids x_item [N, d_c]."""

    z_bar: Tensor
    z: Tensor
    x_nh: Tensor
    x_student: Tensor
    x_item: Tensor


class LowRankCross(nn.Module):
    """One DCNv2 layer (Wang et al. 2021): x_{l+1} = x_0 * (U V x_l + b) + x_l."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(x, x0, self.up(self.down(x)))


class Summarization(nn.Module):
    """Project every feature group to one width (grouping) and add all pairwise dot products (crossing)."""

    pairs: Tensor

    def __init__(self, dims: dict[str, int], width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({name: nn.Linear(dim, width) for name, dim in dims.items()})
        count = len(dims)
        self.register_buffer("pairs", torch.triu_indices(count, count, offset=1))
        self.out_dim = count * width + self.pairs.shape[1]

    def forward(self, groups: Groups) -> Tensor:
        x = torch.stack([project(groups[name]) for name, project in self.projections.items()], dim=-2)
        dots = (x @ x.transpose(-1, -2)) * x.shape[-1] ** -0.5
        crossed = dots[..., self.pairs[0], self.pairs[1]]
        return torch.cat([torch.relu(x).flatten(-2), crossed], dim=-1)


class Interaction(nn.Module):
    """I(x_h; x_nh) -> z."""

    def __init__(self, dims: dict[str, int], config: ModelConfig) -> None:
        super().__init__()
        self.summarization = Summarization(dims, config.group_dim)
        dim = self.summarization.out_dim
        self.crosses = nn.ModuleList([LowRankCross(dim, config.cross_rank) for _ in range(config.cross_layers)])
        widths = [dim, *config.mlp]
        layers = [
            nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Dropout(config.dropout)) for a, b in itertools.pairwise(widths)
        ]
        self.mlp = nn.Sequential(*layers)
        self.out_dim = widths[-1]

    def forward(self, groups: Groups) -> Tensor:
        x0 = x = self.summarization(groups)
        for cross in self.crosses:
            x = cross(x0, x)
        z: Tensor = self.mlp(x)
        return z


class Prediction(nn.Module):
    """F: multi-gate mixture of experts (Ma et al. 2018) and one head per action; z_bar [N, d] -> logits [N, A]."""

    def __init__(self, dim: int, actions: int, config: ModelConfig) -> None:
        super().__init__()
        self.experts = nn.Linear(dim, config.experts * config.expert_dim)
        self.gates = nn.Linear(dim, actions * config.experts)
        self.hidden = nn.ModuleList([nn.Linear(config.expert_dim, config.head_dim) for _ in range(actions)])
        self.out = nn.ModuleList([nn.Linear(config.head_dim, 1) for _ in range(actions)])
        self.shape = (config.experts, config.expert_dim, actions)

    def forward(self, z_bar: Tensor) -> Tensor:
        experts, width, actions = self.shape
        expert = torch.relu(self.experts(z_bar)).unflatten(-1, (experts, width))
        gate = torch.softmax(self.gates(z_bar).unflatten(-1, (actions, experts)), dim=-1)
        mixed = gate @ expert
        heads = zip(self.hidden, self.out, strict=True)
        return torch.cat([out(torch.relu(hidden(mixed[..., a, :]))) for a, (hidden, out) in enumerate(heads)], dim=-1)


class Ranker(nn.Module):
    """Logits per action for N candidates of U users; see :class:`freshrank.features.encoder.Encoder` for the inputs."""

    def __init__(self, encoder: Encoder, config: ModelConfig, techniques: TechniquesConfig = PLAIN) -> None:
        super().__init__()
        schema = encoder.schema
        self.user = EntityInputs(Entity.USER, encoder, config)
        self.item = EntityInputs(Entity.ITEM, encoder, config)
        self.row = EntityInputs(Entity.ROW, encoder, config)
        self.item_ids = ItemIds(encoder, config)
        self.has_query = schema.has_query
        lookup_dim = config.item_id_dim + self.item.widths.get("categorical", 0)
        length = schema.history.sequence_length
        self.sequence = SequenceEncoder(lookup_dim, len(schema.actions), length, config)
        dims = self._group_dims(config, lookup_dim)
        self.interaction = Interaction(dims, config)
        self.x_nh_dim = sum(d for name, d in dims.items() if name.endswith("_content"))
        residual, aldi = techniques.residual, techniques.aldi
        self.residual = Residual(self.x_nh_dim, residual.dim) if residual else None
        d = self.interaction.out_dim + (residual.dim if residual else 0)
        self.prediction = Prediction(d, len(schema.actions), config)
        # Last, so that all other weights start as they would without it.
        self.student_groups = _USER_HISTORY if aldi and aldi.history == "user" else ()
        x_student_dim = self.x_nh_dim + sum(dims.get(name, 0) for name in self.student_groups)
        self.student = Student(x_student_dim, len(schema.actions), aldi.hidden) if aldi else None
        meta = techniques.meta_embedding
        self.id_generator = _id_generator(dims, config, meta) if meta else None
        self.fresh_days = schema.fresh_days
        self.age_column = _column(encoder, Entity.ROW, ITEM_AGE)
        self.impressions_column = _column(encoder, Entity.ITEM, impressions_of(Entity.ITEM, schema.lookback_days))

    def _group_dims(self, config: ModelConfig, lookup_dim: int) -> dict[str, int]:
        entities = {"user": self.user, "item": self.item, "row": self.row}
        dims = {f"{name}_{group}": d for name, entity in entities.items() for group, d in entity.dims.items()}
        dims |= {"sequence": self.sequence.out_dim, "item_id": config.item_id_dim}
        return dims | ({"query": lookup_dim} if self.has_query else {})

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits [N, A]."""
        representation = self.represent(inputs)
        logits: Tensor = self.prediction(representation.z_bar)
        if self.student is None:
            return logits
        return answer(logits, self.student(representation.x_student), self.cold(inputs))

    def cold(self, inputs: Inputs) -> Tensor:
        """Whom the student answers for, bool [N]: items younger than ``fresh_days``, and all without an id of their
        own (new, rare, unknown), whatever their age."""
        return self.fresh(inputs) | (inputs["item_id"] < FIRST_KNOWN)

    def fresh(self, inputs: Inputs) -> Tensor:
        """Items younger than ``fresh_days``, bool [N]."""
        return inputs["row_numeric"][:, self.age_column] < self.fresh_days

    def represent(self, inputs: Inputs) -> Representation:
        return self.combine(self.groups(inputs))

    def combine(self, groups: Groups) -> Representation:
        """What F takes, from the dense vectors of :meth:`groups`."""
        z = self.interaction(groups)
        x_nh = torch.cat([x for name, x in groups.items() if name.endswith("_content")], dim=-1)
        x_student = torch.cat([x_nh, *(groups[name] for name in self.student_groups if name in groups)], dim=-1)
        x_item = groups.get("item_content", x_nh[:, :0])
        return Representation(self.residual(z, x_nh) if self.residual else z, z, x_nh, x_student, x_item)

    def groups(self, inputs: Inputs) -> Groups:
        """Dense vectors per feature group, [N, ..] each: what the analyses switch off and differentiate by."""
        user = _named("user", self.user(inputs)) | {"sequence": self._sequence(inputs)}
        index = inputs["user_index"]
        groups = {name: x.index_select(0, index) for name, x in user.items()}
        groups |= _named("item", self.item(inputs)) | _named("row", self.row(inputs))
        ids = inputs["item_id"]
        groups["item_id"] = self.item_ids(ids)
        if self.id_generator is not None:
            groups["item_id"] = self.id_generator(groups["item_id"], groups["item_content"], ids == NEW)
        if self.has_query:
            groups["query"] = self._lookup(inputs["query_item_id"], inputs.get("query_categorical"))
        return groups

    def _sequence(self, inputs: Inputs) -> Tensor:
        if torch.compiler.is_exporting():  # one user per request there, and a graph without branches
            return self._padded_sequence(inputs)
        # Most sequences are far shorter than the padded length.
        actions, categories = inputs["sequence_actions"], inputs.get("sequence_categorical")
        present = actions != 0
        tokens = self._lookup(inputs["sequence_items"][present], None if categories is None else categories[present])
        return self.sequence.packed(tokens, actions)

    def _padded_sequence(self, inputs: Inputs) -> Tensor:
        tokens = self._lookup(inputs["sequence_items"], inputs.get("sequence_categorical"))
        encoded: Tensor = self.sequence(tokens, inputs["sequence_actions"])
        return encoded

    def _lookup(self, ids: Tensor, categories: Tensor | None) -> Tensor:
        """An item as a sequence or a query sees it: id embedding and content categories, [.., lookup_dim]."""
        vectors = [self.item_ids(ids)]
        if categories is not None:
            vectors.append(self.item.blocks["categorical"](categories).flatten(-2))
        return torch.cat(vectors, dim=-1)


def _id_generator(dims: dict[str, int], config: ModelConfig, meta: MetaEmbeddingConfig) -> IdGenerator:
    if "item_content" not in dims:
        raise ConfigError(
            "techniques.meta_embedding: the schema declares no content of items, expected at least one feature to make "
            "an id embedding of; declare one in schema.yaml, or set techniques.meta_embedding=null"
        )
    return IdGenerator(dims["item_content"], config.item_id_dim, meta.hidden)


def _column(encoder: Encoder, entity: Entity, name: str) -> int:
    return [feature.name for feature in encoder.numeric(entity)].index(name)


def _named(prefix: str, dense: dict[str, Tensor]) -> Groups:
    return {f"{prefix}_{group}": x for group, x in dense.items()}


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
