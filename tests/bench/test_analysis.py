"""What a ranker relies on: removals, gradients, score gaps and explained variance by numbers one can check by hand."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freshrank.bench.paper.analysis import (
    GradientNorms,
    GradientWatch,
    Probe,
    Removal,
    by_group,
    drops,
    effective_rank,
    explained_variance,
    gradient_norms,
    one_by_one,
    pr_auc,
    removals,
    score_gaps,
    score_groups,
    without,
)
from freshrank.config import EvaluationConfig, ModelConfig, ResidualConfig, TechniquesConfig, TrainingConfig
from freshrank.errors import DataError
from freshrank.evaluation.evaluate import evaluate
from freshrank.evaluation.results import FRESH, MetricName
from freshrank.features.encoder import Catalog
from freshrank.features.vocabulary import MISSING, NEW
from freshrank.schema import Entity, FeatureGroup, Kind
from freshrank.training.batches import TensorFrame, labels_of
from freshrank.training.loop import train_ranker
from freshrank.training.objective import masked_bce
from freshrank.training.trained import Trained, predict
from tests.judging import schema_of, world
from tests.worlds import random_frame, tiny_schema

SMALL = ModelConfig(
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
TRAINING = TrainingConfig(batch_size=64, min_steps=1, epochs=10, learning_rate=1e-2)
RESIDUAL = TechniquesConfig(residual=ResidualConfig(dim=2))
SCHEMA = tiny_schema(query=True)
FRAME = random_frame(SCHEMA)


@cache
def _train() -> Trained:
    return train_ranker(FRAME, FRAME.items, SCHEMA, SMALL, RESIDUAL, TRAINING)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return _train()


@pytest.fixture(scope="module")
def probe(trained: Trained) -> Probe:
    return Probe.of(trained, FRAME, FRAME.items)


def _named(trained: Trained) -> dict[str, Removal]:
    return {removal.name: removal for removal in removals(trained.encoder)}


# ---------------------------------------------------------------- ablation


def test_every_feature_the_ranker_sees_can_be_removed_once(trained: Trained) -> None:
    """All of the schema's but the affinity lists (they act through their crosses); sequence, id and query besides."""
    lists = {f.name for f in SCHEMA.features() if f.kind is Kind.SEQUENCE}
    expected = [f.name for f in SCHEMA.features() if f.name not in lists] + ["item_id", "sequence", "query_item"]
    assert sorted(r.name for r in removals(trained.encoder)) == sorted(expected)


def test_removals_cover_every_cell_of_every_block_exactly_once(trained: Trained) -> None:
    """Otherwise a part of some feature would survive its removal, or go with another."""
    data = TensorFrame(FRAME, trained.encoder, Catalog.build(FRAME.items, trained.encoder))
    seen = {
        n: torch.zeros(b.shape, dtype=torch.int)
        for part in (data.users, data.items, data.rows)
        for n, b in part.items()
    }
    for removal in removals(trained.encoder):
        for name, cells in removal.blocks.items():
            seen[name][..., cells.columns] += 1
    assert all((counts == 1).all() for counts in seen.values())


def test_a_removed_feature_is_encoded_as_a_missing_value_is(trained: Trained) -> None:
    """Nulls in the table itself give the same logits: a category, a number with and without default, an embedding."""
    for name, table in (
        ("country", "users"),
        ("age", "users"),
        ("duration", "items"),
        ("vector", "items"),
        ("tags", "items"),
        ("item_click_rate_7d", "items"),
        ("surface", "rows"),
    ):
        column = getattr(FRAME, table)[name]
        nulls = column.clear(len(column))
        frame = type(FRAME)(
            **{t: getattr(FRAME, t) for t in ("users", "items", "rows")}
            | {table: getattr(FRAME, table).with_columns(nulls.alias(name))}
        )
        logits = Probe.of(trained, FRAME, FRAME.items).logits([_named(trained)[name]])
        assert np.allclose(logits, predict(trained, frame, FRAME.items), atol=1e-5), name


def test_nothing_removed_gives_the_predictions_themselves(trained: Trained, probe: Probe) -> None:
    """The probe and the predictor are one model."""
    assert np.allclose(probe.logits(), predict(trained, FRAME, FRAME.items), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_computing_anew_only_what_a_feature_feeds_gives_what_computing_everything_gives(data: st.DataObject) -> None:
    """For any set of features and both ways of taking them away."""
    trained = _train()
    features = removals(trained.encoder)
    removed = data.draw(st.lists(st.sampled_from(features), min_size=1, max_size=4, unique_by=lambda r: r.name))
    how = data.draw(st.sampled_from(["missing", "permuted"]))
    probe = Probe.of(trained, FRAME, FRAME.items)
    whole = Probe(trained, without(probe.data, removed, how, seed=3))
    assert np.allclose(probe.logits(removed, how, seed=3), whole.logits(), atol=1e-5)


def test_the_id_of_an_item_is_replaced_by_the_new_item_row(trained: Trained, probe: Probe) -> None:
    """An id is never missing, it is unknown; and the data itself stays as it was."""
    changed = without(probe.data, [_named(trained)["item_id"]])
    assert (changed.items["item_id"] == NEW).all()
    assert (probe.data.items["item_id"] != NEW).any()


def test_a_user_without_a_sequence_has_neither_items_nor_actions(trained: Trained, probe: Probe) -> None:
    """Sequence items and their actions are one feature."""
    changed = without(probe.data, [_named(trained)["sequence"]])
    assert (changed.users["places"] == MISSING).all()
    assert (changed.users["sequence_actions"] == 0).all()


def test_a_permuted_feature_keeps_its_values_and_moves_alone(trained: Trained, probe: Probe) -> None:
    """The same multiset in its columns, in another order; its neighbours stay."""
    removal = _named(trained)["country"]
    before, after = (
        data.users["user_categorical"] for data in (probe.data, without(probe.data, [removal], "permuted"))
    )
    column = removal.blocks["user_categorical"].columns
    assert torch.equal(after[:, column].sort(0).values, before[:, column].sort(0).values)
    assert not torch.equal(after[:, column], before[:, column])
    others = torch.ones(before.shape[1], dtype=torch.bool)
    others[column] = False
    assert torch.equal(after[:, others], before[:, others])


def test_a_permuted_sequence_keeps_items_and_actions_together(trained: Trained, probe: Probe) -> None:
    """Users swap whole sequences."""
    after = without(probe.data, [_named(trained)["sequence"]], "permuted").users
    before = probe.data.users
    pairs = [
        {(tuple(p.tolist()), tuple(a.tolist())) for p, a in zip(u["places"], u["sequence_actions"], strict=True)}
        for u in (before, after)
    ]
    assert pairs[0] == pairs[1]


def test_pr_auc_leaves_unobserved_labels_out() -> None:
    """Positives at ranks 1 and 3 of the observed: (1/1 + 2/3) / 2."""
    labels, scores = np.array([1, 0, 1, np.nan]), np.array([0.9, 0.8, 0.7, 1.0])
    assert pr_auc(labels, scores) == pytest.approx(5 / 6)


@pytest.mark.parametrize("labels", [[1.0, 1.0], [0.0, 0.0], [np.nan, np.nan], []])
def test_pr_auc_needs_both_classes(labels: list[float]) -> None:
    """No value rather than a meaningless one."""
    assert pr_auc(np.array(labels), np.zeros(len(labels))) is None


def test_the_drop_is_the_change_of_pr_auc_when_the_feature_is_gone(trained: Trained, probe: Probe) -> None:
    """Recomputed by hand for one try; the group of the removed feature is named."""
    tries = {"item_id": [_named(trained)["item_id"]]}
    labels = labels_of(FRAME, SCHEMA)
    every = {"all": np.ones(len(FRAME.rows), bool), "none": np.zeros(len(FRAME.rows), bool)}
    measured = drops(probe, tries, labels, every)
    before, after = probe.logits()[:, 0], probe.logits(tries["item_id"])[:, 0]
    assert [(d.slice, d.action) for d in measured] == [("all", "click"), ("all", "save")]
    assert measured[0].delta == pytest.approx(pr_auc(labels[:, 0], after) - pr_auc(labels[:, 0], before))
    assert measured[0].full == pytest.approx(pr_auc(labels[:, 0], before))
    assert measured[0].group is FeatureGroup.HISTORICAL


def test_removing_the_feature_that_decides_lowers_pr_auc(trained: Trained, probe: Probe) -> None:
    """In this world clicks follow the item's id alone: all historical features outweigh all others."""
    features = removals(trained.encoder)
    measured = drops(probe, by_group(features), labels_of(FRAME, SCHEMA), {"all": np.ones(len(FRAME.rows), bool)})
    clicks = {d.removed: d.delta for d in measured if d.action == "click"}
    assert clicks["historical"] < -0.05
    assert clicks["historical"] < clicks["non_historical"]


def test_the_two_tries_by_group_share_out_all_features(trained: Trained) -> None:
    """Every feature is in one of them."""
    features = removals(trained.encoder)
    groups = by_group(features)
    assert sum(map(len, groups.values())) == len(features) == len(one_by_one(features))
    assert {f.group for f in groups["historical"]} == {FeatureGroup.HISTORICAL}
    assert "item_age_days" in {f.name for f in groups["non_historical"]}
    assert any(f.entity is Entity.USER for f in groups["non_historical"])


# ---------------------------------------------------------------- gradients


def test_ratios_weigh_whole_vectors_or_groups() -> None:
    """x_h has norm 10 and x_nh 4; groups of 6 and 8 against one of 4."""
    norms = GradientNorms(
        step=1, groups={"item_history": 6, "item_id": 8, "item_content": 4}, historical=10, non_historical=4
    )
    assert norms.ratio == pytest.approx(0.4)
    assert norms.group_ratio == pytest.approx(4 / 7)


def test_gradient_norms_are_those_of_finite_differences(trained: Trained, probe: Probe) -> None:
    """One row: nudging one dense number by h changes the loss by h times its derivative."""
    row = torch.tensor([int((~torch.isnan(probe.data.labels)).all(1).nonzero()[0, 0])])
    batch = probe.data.batch(row)
    norms = gradient_norms(trained.ranker, batch)
    labels = batch.labels.double()
    with torch.no_grad():
        groups = {name: x.double() for name, x in trained.ranker.groups(batch.inputs).items()}
        ranker = trained.ranker.double()

        def loss(name: str, column: int, step: float) -> float:
            moved = groups[name].clone()
            moved[0, column] += step
            return masked_bce(ranker.prediction(ranker.combine(groups | {name: moved}).z_bar), labels).item()

        derivatives = {
            name: [(loss(name, c, 1e-6) - loss(name, c, -1e-6)) / 2e-6 for c in range(x.shape[1])]
            for name, x in groups.items()
        }
        ranker.float()
    for name, values in derivatives.items():
        assert norms.groups[name] == pytest.approx(np.linalg.norm(values), rel=1e-3, abs=1e-6)
    history = np.concatenate([v for name, v in derivatives.items() if not name.endswith("_content")])
    assert norms.historical == pytest.approx(np.linalg.norm(history), rel=1e-3)


def test_watching_a_training_changes_nothing_in_it(trained: Trained) -> None:
    """The observer looks every thirtieth step, the first included, and the weights come out bit for bit."""
    watch = GradientWatch(every=30)
    watched = train_ranker(FRAME, FRAME.items, SCHEMA, SMALL, RESIDUAL, TRAINING, watch)
    weights = watched.ranker.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in trained.ranker.state_dict().items())
    assert [norms.step for norms in watch.seen] == [1, 31, 61]
    assert all(norms.historical > 0 and norms.non_historical > 0 for norms in watch.seen)


# ---------------------------------------------------------------- scores


def test_score_groups_split_predictions_by_label_and_side() -> None:
    """Positives: warm 0.8 and 0.6, cold 0.35; negatives: warm 0.4, none cold; the unobserved row counts nowhere."""
    probabilities = np.array([[0.8], [0.6], [0.35], [0.4], [0.9]])
    labels = np.array([[1], [1], [1], [0], [np.nan]])
    groups = score_groups(probabilities, labels, np.array([False, False, True, False, True]), ["click"])
    assert [(g.label, g.cold, g.rows) for g in groups] == [(1, False, 2), (1, True, 1), (0, False, 1)]
    assert [g.mean for g in groups] == pytest.approx([0.7, 0.35, 0.4])
    assert groups[0].quantiles[2] == pytest.approx(0.7)
    assert score_gaps(groups) == {("click", 1): pytest.approx(0.5)}


def test_score_gaps_are_those_of_the_evaluation() -> None:
    """One definition: figure 6c shows the metric the gate bounds."""
    judged, schema = world(lists=60), schema_of()
    evaluation = evaluate(judged, schema, EvaluationConfig())
    cold = judged.age_days < schema.fresh_days
    gaps = score_gaps(score_groups(judged.probabilities, judged.labels, cold, schema.actions))
    for action in schema.actions:
        for label, metric in ((1, MetricName.SCORE_GAP_POSITIVE), (0, MetricName.SCORE_GAP_NEGATIVE)):
            assert gaps[action, label] == pytest.approx(evaluation.get(metric, FRESH, action).value)


# ---------------------------------------------------------------- representation


def test_variance_along_two_axes_is_shared_by_their_squares() -> None:
    """Spread 3 and 1 about the mean (5, 5), nothing along the third axis: 9/10, 1/10, 0."""
    z = np.array([[8, 5, 2], [2, 5, 2], [5, 6, 2], [5, 4, 2]], np.float32)
    assert explained_variance(z) == pytest.approx([0.9, 0.1, 0.0])


@given(st.integers(0, 1000), st.integers(2, 40), st.integers(1, 6))
def test_shares_fall_and_sum_to_one_and_turning_z_does_not_change_them(seed: int, rows: int, width: int) -> None:
    """For any z; a rotation is the same point cloud."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, width)) * rng.uniform(0.1, 5, width)
    shares = explained_variance(z)
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares) <= 1e-12).all()
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    assert explained_variance(z @ rotation) == pytest.approx(shares, abs=1e-9)


@pytest.mark.parametrize("z", [np.ones((5, 3)), np.ones((1, 3))])
def test_a_representation_that_never_changes_has_no_components(z: np.ndarray) -> None:
    """The error says what was received and how to mend it."""
    with pytest.raises(DataError, match=rf"received {len(z)} rows without any variance.*evaluation_days"):
        explained_variance(z)


def test_effective_rank_counts_equal_components_and_ignores_unused_ones() -> None:
    """Four equal shares count as 4; one that explains everything as 1; unequal shares as something between."""
    assert effective_rank(np.array([0.25] * 4 + [0.0] * 3)) == pytest.approx(4)
    assert effective_rank(np.array([1.0, 0.0])) == pytest.approx(1)
    assert 1 < effective_rank(np.array([0.9, 0.1])) < 2
