"""What a trained ranker relies on: the analyses of the paper (sections 1, 3.2 and 4.2.4-4.2.6, figures 2, 6 and 7).

Historical is what the log gives (counters, rates, affinities, the sequence, the item's id); non-historical is content,
profile, context and item age. Every Delta PR-AUC is *after minus before*: below 0 the model has lost something.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from freshrank.errors import DataError
from freshrank.evaluation.metrics import Bools, Floats
from freshrank.features.encoder import Catalog, Encoder
from freshrank.features.frames import Frame
from freshrank.features.vocabulary import MISSING, NEW
from freshrank.models.ranker import Groups, Ranker
from freshrank.schema import Entity, Feature, FeatureGroup, Kind
from freshrank.training.batches import Batch, TensorFrame
from freshrank.training.objective import masked_bce
from freshrank.training.trained import Trained

How = Literal["missing", "permuted"]
SEQUENCE, ITEM_ID_FEATURE, QUERY = "sequence", "item_id", "query_item"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_PARTS = ("users", "items", "rows")
_BATCH = 8192


# ---------------------------------------------------------------- feature ablation (figures 2a, 6a)


@dataclass(frozen=True)
class Cells:
    """Columns of an encoded block, and what the encoder writes there for a missing value."""

    columns: slice
    missing: float


@dataclass(frozen=True)
class Removal:
    """One feature as the encoder holds it: {block: cells}."""

    name: str
    group: FeatureGroup
    blocks: dict[str, Cells]
    entity: Entity | None = None
    """Whose dense vectors alone depend on it; None where sequences or ids do."""


def removals(encoder: Encoder) -> list[Removal]:
    """Every feature the ranker is given, one by one, in the schema's order.

    A user's sequence is one feature, with its actions. The lists behind the affinity crosses reach the ranker only as
    crosses, so they are not listed. An item's id is never missing: it is replaced by the row of a new item.
    """
    single = [_of_feature(encoder, entity, kind) for entity in Entity for kind in _CELLS]
    ids = Removal(ITEM_ID_FEATURE, FeatureGroup.HISTORICAL, {"item_id": Cells(slice(None), NEW)})
    blank = Cells(slice(None), MISSING)
    sequence = Removal(SEQUENCE, FeatureGroup.HISTORICAL, {"places": blank, "sequence_actions": blank})
    query = {"query_item_id": blank} | ({"query_categorical": blank} if encoder.categorical(Entity.ITEM) else {})
    queries = [Removal(QUERY, FeatureGroup.HISTORICAL, query)] if encoder.schema.has_query else []
    return [removal for group in single for removal in group] + [ids, sequence, *queries]


_CELLS: dict[Kind, tuple[str, Callable[[Feature], float]]] = {
    Kind.CATEGORICAL: ("categorical", lambda _: MISSING),
    Kind.MULTI_VALUED: ("multi", lambda _: MISSING),
    Kind.NUMERIC: ("numeric", lambda feature: feature.missing),
    Kind.EMBEDDING: ("embedding", lambda _: float("nan")),
}


def _of_feature(encoder: Encoder, entity: Entity, kind: Kind) -> list[Removal]:
    suffix, missing = _CELLS[kind]
    features = encoder.schema.select(entity, kind)
    wide = kind in (Kind.MULTI_VALUED, Kind.EMBEDDING)
    widths = [f.dim if wide else 1 for f in features]
    ends = list(itertools.accumulate(widths))
    return [
        Removal(f.name, f.group, {f"{entity}_{suffix}": Cells(slice(end - width, end), missing(f))}, entity)
        for f, width, end in zip(features, widths, ends, strict=True)
    ]


def without(data: TensorFrame, removed: Iterable[Removal], how: How = "missing", seed: int = 0) -> TensorFrame:
    """``data`` with features removed; ``data`` itself is not changed.

    ``missing`` writes what the encoder gives for a missing value. ``permuted`` shuffles each feature among the
    user-days, item-days or impressions that carry it, which keeps its distribution but not its meaning.
    """
    changed = copy(data)
    for part in _PARTS:
        setattr(changed, part, dict(getattr(data, part)))
    draws = torch.Generator().manual_seed(seed)
    for removal in removed:
        orders: dict[int, Tensor] = {}
        for name, cells in removal.blocks.items():
            part = next(getattr(changed, part) for part in _PARTS if name in getattr(changed, part))
            block = part[name].clone()
            if how == "permuted":
                order = orders.setdefault(len(block), torch.randperm(len(block), generator=draws))
                block[..., cells.columns] = block[order.to(block.device)][..., cells.columns]
            else:
                block[..., cells.columns] = cells.missing
            part[name] = block
    return changed


class Probe:
    """A trained ranker on fixed rows, scored repeatedly with features removed.

    Holds the dense vectors of all rows (a few hundred float32 per row), so that only what a feature feeds is computed
    anew; hand it a sample where the evaluation days hold tens of millions of rows.
    """

    def __init__(self, trained: Trained, data: TensorFrame) -> None:
        self.ranker = trained.ranker.eval()
        self.actions = trained.encoder.schema.actions
        self.data = data
        self.rows = list(data.batches(_BATCH))
        with torch.inference_mode():
            self.groups = [self.ranker.groups(data.batch(rows).inputs) for rows in self.rows]

    @classmethod
    def of(cls, trained: Trained, frame: Frame, items: pl.DataFrame) -> "Probe":
        return cls(trained, TensorFrame(frame, trained.encoder, Catalog.build(items, trained.encoder)))

    def logits(self, removed: Sequence[Removal] = (), how: How = "missing", seed: int = 0) -> Floats:
        """Uncalibrated logits [N, A] float32 without the features of ``removed``."""
        data = without(self.data, removed, how, seed)
        by_place = [self._logits(self._regrouped(data, place, removed)) for place in range(len(self.rows))]
        return self._in_order(by_place)

    def z(self) -> Floats:
        """The interaction module's output [N, d_I] float32, before the residual."""
        with torch.inference_mode():
            return self._in_order([self.ranker.combine(groups).z for groups in self.groups])

    def _regrouped(self, data: TensorFrame, place: int, removed: Sequence[Removal]) -> Groups:
        if not removed:
            return self.groups[place]
        entities = {removal.entity for removal in removed}
        with torch.inference_mode():
            inputs = data.batch(self.rows[place]).inputs
            if None in entities:
                return self.ranker.groups(inputs)
            fresh = [self._entity(entity, inputs) for entity in entities if entity]
        return self.groups[place] | {name: x for dense in fresh for name, x in dense.items()}

    def _entity(self, entity: Entity, inputs: dict[str, Tensor]) -> Groups:
        dense = getattr(self.ranker, entity.value)(inputs)
        if entity is Entity.USER:
            dense = {name: x.index_select(0, inputs["user_index"]) for name, x in dense.items()}
        return {f"{entity}_{name}": x for name, x in dense.items()}

    def _logits(self, groups: Groups) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.ranker.prediction(self.ranker.combine(groups).z_bar)
        return logits

    def _in_order(self, batches: list[Tensor]) -> Floats:
        out = torch.empty(len(self.data), batches[0].shape[1])
        for rows, values in zip(self.rows, batches, strict=True):
            out[rows] = values.float().cpu()
        return out.numpy()


def pr_auc(labels: Floats, scores: Floats) -> float | None:
    """Average precision of scores [N] for labels [N] in {0, 1, NaN}; None without both classes."""
    from sklearn.metrics import average_precision_score  # 1 s to import

    observed = ~np.isnan(labels)
    positives = labels[observed]
    if not len(positives) or positives.min() == positives.max():
        return None
    return float(average_precision_score(positives, scores[observed]))


class Drop(BaseModel):
    """Delta PR-AUC of an action on the rows of a slice once ``removed`` is taken away."""

    model_config = ConfigDict(frozen=True)

    removed: str
    group: FeatureGroup
    slice: str
    action: str
    full: float
    delta: float


def drops(
    probe: Probe,
    tries: dict[str, list[Removal]],
    labels: Floats,
    slices: dict[str, Bools],
    how: How = "missing",
    seed: int = 0,
) -> list[Drop]:
    """Delta PR-AUC of each of ``tries``: name -> features of one group that go together; labels [N, A].

    A slice without both classes of an action has no row in the answer.
    """
    full = probe.logits()
    drops_found = []
    for name, removed in tries.items():
        reduced = probe.logits(removed, how, seed)
        for slice_name, rows in slices.items():
            for action, label in enumerate(probe.actions):
                before = pr_auc(labels[rows, action], full[rows, action])
                after = pr_auc(labels[rows, action], reduced[rows, action])
                if before is not None and after is not None:
                    drops_found.append(
                        Drop(
                            removed=name,
                            group=removed[0].group,
                            slice=slice_name,
                            action=label,
                            full=before,
                            delta=after - before,
                        )
                    )
    return drops_found


def by_group(features: list[Removal]) -> dict[str, list[Removal]]:
    """The two tries of figure 2a: all historical features at once, all non-historical ones at once."""
    return {group.value: [f for f in features if f.group is group] for group in FeatureGroup}


def one_by_one(features: list[Removal]) -> dict[str, list[Removal]]:
    """The tries of figure 6a: every feature on its own."""
    return {feature.name: [feature] for feature in features}


# ---------------------------------------------------------------- gradients (figures 2b, 6b)


class GradientNorms(BaseModel):
    """Mean over a batch's rows of the l2 norm of d (the row's loss) / d (its dense vector), at one training step."""

    model_config = ConfigDict(frozen=True)

    step: int
    groups: dict[str, float]
    """Per feature group, as :meth:`Ranker.groups` names them."""
    historical: float
    """Of all historical groups as one vector x_h."""
    non_historical: float
    """Of all non-historical groups as one vector x_nh."""

    @property
    def ratio(self) -> float:
        """Non-historical to historical: below 1 the updates are dominated by history."""
        return self.non_historical / self.historical

    @property
    def group_ratio(self) -> float:
        """The same with every group weighing alike, whatever its width: ratio of the mean norms of the groups."""
        sides: dict[bool, list[float]] = {True: [], False: []}
        for name, norm in self.groups.items():
            sides[is_historical(name)].append(norm)
        return float(np.mean(sides[False]) / np.mean(sides[True]))


def is_historical(group: str) -> bool:
    """Whether a group of :meth:`Ranker.groups` is built from the log."""
    return not group.endswith("_content")


def gradient_norms(ranker: Ranker, batch: Batch, step: int = 0) -> GradientNorms:
    """Norms of the gradient of the batch's loss (BCE summed over actions) at the ranker's present weights."""
    with torch.no_grad():
        dense = ranker.groups(batch.inputs)
    groups = {name: x.detach().float().requires_grad_() for name, x in dense.items()}
    # The loss is a mean over rows; times their number, the gradient is that of each row's own loss.
    loss = masked_bce(ranker.prediction(ranker.combine(groups).z_bar), batch.labels) * len(batch.labels)
    gradients = dict(zip(groups, torch.autograd.grad(loss, list(groups.values())), strict=True))
    sides = {side: [g for name, g in gradients.items() if is_historical(name) is side] for side in (True, False)}
    return GradientNorms(
        step=step,
        groups={name: _mean_norm([gradient]) for name, gradient in gradients.items()},
        historical=_mean_norm(sides[True]),
        non_historical=_mean_norm(sides[False]),
    )


def _mean_norm(parts: list[Tensor]) -> float:
    return float(torch.cat(parts, dim=-1).norm(dim=-1).mean()) if parts else 0.0


@dataclass
class GradientWatch:
    """Give it to ``train_ranker(watch=...)``: gradient norms of every ``every``-th step, the first included."""

    every: int = 5
    seen: list[GradientNorms] = field(default_factory=list)

    def __call__(self, step: int, ranker: Ranker, batch: Batch) -> None:
        if (step - 1) % self.every:
            return
        # Dropout, where configured, must not draw from the training run's random state.
        with torch.random.fork_rng():
            self.seen.append(gradient_norms(ranker, batch, step))


# ---------------------------------------------------------------- scores (figures 2c, 6c)


class ScoreGroup(BaseModel):
    """Predictions of an action among the rows with (``label`` 1) or without it, on warm or on cold items."""

    model_config = ConfigDict(frozen=True)

    action: str
    label: Literal[0, 1]
    cold: bool
    rows: int
    mean: float
    quantiles: tuple[float, ...]
    """At :data:`QUANTILES`."""


def score_groups(probabilities: Floats, labels: Floats, cold: Bools, actions: list[str]) -> list[ScoreGroup]:
    """Per action, label and side; arrays [N, A], [N, A] with NaN = not observed, [N]. Empty groups are left out."""
    groups = []
    for action, name in enumerate(actions):
        for label in (1, 0):
            for side in (False, True):
                scores = probabilities[(labels[:, action] == label) & (cold == side), action].astype(np.float64)
                if len(scores):
                    quantiles = tuple(float(q) for q in np.quantile(scores, QUANTILES))
                    groups.append(
                        ScoreGroup(
                            action=name,
                            label=label,
                            cold=side,
                            rows=len(scores),
                            mean=float(scores.mean()),
                            quantiles=quantiles,
                        )
                    )
    return groups


def score_gaps(groups: Iterable[ScoreGroup]) -> dict[tuple[str, int], float]:
    """(action, label) -> (mean warm - mean cold) / mean warm, where both sides have rows; above 0 cold is lower."""
    means = {(g.action, g.label, g.cold): g.mean for g in groups}
    return {
        (action, label): (warm - means[action, label, True]) / warm
        for (action, label, cold), warm in means.items()
        if not cold and warm and (action, label, True) in means
    }


# ---------------------------------------------------------------- representation (figure 7)


def explained_variance(z: Floats) -> NDArray[np.float64]:
    """Share of the variance of z [N, d] per principal component, largest first: [d], summing to 1.

    z is centred, not scaled: directions the model does not use must count as unused.

    Raises:
        DataError: fewer than two rows, or a z that is the same on all of them.
    """
    centred = z.astype(np.float64) - z.mean(axis=0, dtype=np.float64)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1].clip(min=0)
    if len(z) < 2 or values.sum() <= 0:
        raise DataError(
            f"explained_variance: received {len(z)} rows without any variance; expected two different "
            "rows or more. Judge on more days (windows.evaluation_days)"
        )
    shares: NDArray[np.float64] = values / values.sum()
    return shares


def effective_rank(shares: Floats) -> float:
    """exp(entropy) of the shares: d for d equal components, 1 when one explains everything (Roy and Vetterli 2007)."""
    positive = shares[shares > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))
