"""The ranker, its encoder and its training on a tiny world with every kind of feature."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from freshrank.bundle.format import check_bundle
from freshrank.bundle.onnx_ranker import OnnxRanker
from freshrank.config import (
    AldiConfig,
    CalibrationConfig,
    FeatureDropoutConfig,
    MetaEmbeddingConfig,
    MixupConfig,
    ModelConfig,
    PretrainingConfig,
    ResidualConfig,
    ScoreRegConfig,
    TechniquesConfig,
    TrainingConfig,
)
from freshrank.errors import ConfigError, DataError
from freshrank.export.calibration import Platt, fit_platt
from freshrank.export.onnx_export import export_bundle
from freshrank.features.columns import Int, integers
from freshrank.features.encoder import Catalog, Encoder
from freshrank.features.frames import Frame
from freshrank.features.vocabulary import FIRST_KNOWN, MISSING, NEW, Vocabulary
from freshrank.models.ranker import Ranker, count_parameters
from freshrank.models.sequence import SequenceEncoder
from freshrank.schema import ITEM_AGE, ITEM_ID, Entity, Schema
from freshrank.storage.files import read_json, write_json
from freshrank.training.augmentations import absent_of, drop_history
from freshrank.training.batches import Encoded, TensorFrame, labels_of
from freshrank.training.loop import batch_size, train_ranker
from freshrank.training.objective import masked_bce, objective
from freshrank.training.pretrain_items import ContentFields
from freshrank.training.trained import Trained, predict
from tests.worlds import DAY, random_frame, tiny_schema

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
TRAINING = TrainingConfig(batch_size=64, epochs=2)
ALDI = TechniquesConfig(aldi=AldiConfig(hidden=(8,)))
ALL_THREE = TechniquesConfig(residual=ResidualConfig(dim=2), score_reg=ScoreRegConfig(), mixup=MixupConfig())
SCHEMA = tiny_schema(query=True)
FRAME = random_frame(SCHEMA)


def _trained(techniques: TechniquesConfig = ALL_THREE, training: TrainingConfig = TRAINING) -> Trained:
    return train_ranker(FRAME, FRAME.items, SCHEMA, SMALL, techniques, training)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return _trained()


@pytest.fixture(scope="module")
def bundle(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    platt = Platt(slope=(1.1, 0.9), intercept=(0.1, -0.2))
    export_bundle(trained, platt, FRAME, FRAME.items, out, {"fingerprint": "f", "run_date": "2024-03-11"})
    return out


def rows_of(vocabulary: Vocabulary, series: pl.Series) -> Int:
    """Of the embedding table, one per value."""
    return vocabulary.encode(integers(series), series.is_not_null().to_numpy())


def test_vocabulary_maps_rare_and_unknown_values_to_the_new_row_and_null_to_the_missing_row() -> None:
    """7 is seen twice, 9 once; 8 never."""
    vocabulary = Vocabulary.fit(pl.Series([7, 7, 9]), None, min_count=2)
    assert len(vocabulary) == 3
    assert rows_of(vocabulary, pl.Series([7, 9, 8, None])).tolist() == [2, NEW, NEW, MISSING]


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.sets(st.one_of(st.integers(0, 30), INT64)), st.lists(st.none() | st.integers(-5, 40) | INT64, max_size=60))
def test_a_value_has_its_own_row_exactly_when_it_was_seen(seen: set[int], asked: list[int | None]) -> None:
    """Close together or 64 bits apart, more values than are asked for or fewer."""
    vocabulary = Vocabulary(np.array(sorted(seen), np.int64))
    rows = {value: row for row, value in enumerate(sorted(seen), start=FIRST_KNOWN)} | {None: MISSING}
    encoded = rows_of(vocabulary, pl.Series(asked, dtype=pl.Int64))
    assert encoded.tolist() == [rows.get(value, NEW) for value in asked]


def test_crosses_say_what_the_user_did_with_the_candidates_category() -> None:
    """The user saw category 5 four times and clicked once; category 6 is unknown to them."""
    user = {
        "affinity_category_values": [[5, 3]],
        "affinity_category_impressions": [[4, 9]],
        "affinity_category_click": [[1, 9]],
        "affinity_category_save": [[0, 0]],
    }
    frame = Frame(
        FRAME.users[:1].with_columns(**{k: pl.Series(v, dtype=pl.List(pl.Int64)) for k, v in user.items()}),
        FRAME.items[:2].with_columns(category=pl.Series([5, 6])),
        FRAME.rows[:2].with_columns(user_row=pl.lit(0), item_row=pl.Series([0, 1])),
    )
    encoder = Encoder.fit(frame, SCHEMA, min_count=1)
    numeric = encoder.rows(frame, Catalog.build(frame.items, encoder))["row_numeric"]
    names = [f.name for f in encoder.numeric(Entity.ROW)]
    crosses = dict(zip(names, numeric.T, strict=True))
    assert crosses["cross_affinity_category_impressions"].tolist() == [4, 0]
    assert crosses["cross_affinity_category_click_rate"][0] == 0.25
    assert np.isnan(crosses["cross_affinity_category_click_rate"][1])


def test_numeric_statistics_come_from_the_training_frame_alone(trained: Trained) -> None:
    """Encoding another frame does not move them."""
    other = random_frame(SCHEMA, seed=9)
    before = trained.encoder.statistics[Entity.ITEM].mean.copy()
    trained.encoder.items(other)
    assert np.array_equal(trained.encoder.statistics[Entity.ITEM].mean, before)


def test_masked_bce_ignores_unobserved_labels() -> None:
    """Action 0: one label 1 at p = 0.5, one not observed: log 2; action 1: nothing observed: 0."""
    labels = torch.tensor([[1.0, float("nan")], [float("nan"), float("nan")]])
    assert masked_bce(torch.zeros(2, 2), labels).item() == pytest.approx(np.log(2))


def test_computing_the_user_block_once_gives_what_computing_it_per_candidate_gives(trained: Trained) -> None:
    """Broadcast and repetition are the same model."""
    frame = Frame(FRAME.users, FRAME.items, FRAME.rows[:20])
    blocks = trained.encoder.inputs(frame, Catalog.build(FRAME.items, trained.encoder))
    inputs = {name: torch.from_numpy(np.ascontiguousarray(block)) for name, block in blocks.items()}
    repeated = {
        n: x[inputs["user_index"]] if n.startswith(("user_", "sequence_")) and n != "user_index" else x
        for n, x in inputs.items()
    } | {"user_index": torch.arange(20)}
    with torch.inference_mode():
        assert torch.allclose(trained.ranker(inputs), trained.ranker(repeated), atol=1e-6)


def test_sequences_packed_without_padding_give_what_padded_ones_give() -> None:
    """Empty, short, full and holed ones, one or two layers: the same encoding and the same gradients."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(1, 5, (60, 40), generator=generator)
    actions[torch.arange(40) >= torch.arange(60)[:, None] % 41] = 0
    actions[torch.rand(60, 40, generator=generator) < 0.1] = 0
    tokens = torch.randn(60, 40, 6, generator=generator)
    for layers in (1, 2):
        encoder = SequenceEncoder(6, 2, 40, SMALL.model_copy(update={"sequence_layers": layers}))
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        packed, padded = encoder.packed(tokens[actions != 0], actions), encoder(tokens, actions)
        assert torch.allclose(packed, padded, atol=1e-5)
        gradients = [torch.autograd.grad((x**2).sum(), list(encoder.parameters())) for x in (packed, padded)]
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)


def test_a_batch_without_a_single_sequence_is_encoded_by_the_head_alone() -> None:
    """Every user then has one and the same encoding, and only the head stands in the mean."""
    encoder = SequenceEncoder(6, 2, 40, SMALL)
    encoded = encoder.packed(torch.zeros(0, 6), torch.zeros(3, 40, dtype=torch.int32))
    assert torch.equal(encoded, encoded[:1].expand(3, -1))
    head, mean = encoded.chunk(2, dim=1)
    assert torch.equal(head, mean)


def test_a_small_log_gets_smaller_batches_so_that_an_epoch_has_enough_steps() -> None:
    """100 steps at least: 1,024 rows a step from 102,400 rows on, halved below, never under 32."""
    training = TrainingConfig(batch_size=1024, min_steps=100)
    sizes = [batch_size(training, rows) for rows in (1_000_000, 102_400, 102_399, 15_000, 100)]
    assert sizes == [1024, 1024, 512, 128, 32]


def test_training_lowers_the_loss() -> None:
    """Even ids are clicked more often: thirty epochs must find it."""
    curve = _trained(training=TRAINING.model_copy(update={"epochs": 30})).facts["curve"]["losses"]["bce"]
    assert np.mean(curve[-5:]) < 0.9 * np.mean(curve[:5])


def test_the_same_seed_trains_the_same_ranker_and_another_seed_another() -> None:
    """Bit-identical weights, so a run that is done again is the same run."""
    first, again = _trained().ranker.state_dict(), _trained().ranker.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = _trained(training=TRAINING.model_copy(update={"seed": 1})).ranker.state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_with_all_techniques_off_the_objective_is_the_plain_cross_entropy_bit_for_bit() -> None:
    """Off means never having existed: same loss, same gradients as a loop that has never heard of them."""
    encoder = Encoder.fit(FRAME, SCHEMA, 1)
    data = TensorFrame(FRAME, encoder, Catalog.build(FRAME.items, encoder))
    batch = data.batch(torch.arange(64))
    gradients = []
    for loss_of in (
        lambda ranker: objective(ranker, batch, TechniquesConfig(), torch.Generator())[0],
        lambda ranker: masked_bce(ranker(batch.inputs), batch.labels),
    ):
        torch.manual_seed(0)
        ranker = Ranker(encoder, SMALL)
        loss_of(ranker).backward()
        gradients.append([p.grad for p in ranker.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_technique_that_draws_random_numbers_leaves_batches_and_hidden_ids_alone() -> None:
    """With weight 0 in effect, mixup on gives the very weights mixup off gives."""
    tiny = TechniquesConfig(mixup=MixupConfig(weight=1e-30))
    plain, mixed = _trained(TechniquesConfig()).ranker.state_dict(), _trained(tiny).ranker.state_dict()
    assert all(torch.allclose(plain[name], mixed[name], atol=1e-7) for name in plain)


@pytest.mark.parametrize("history", ["item", "user", "all"])
def test_a_dropped_row_reads_as_the_encoder_reads_a_row_without_history(history: str) -> None:
    """With probability 1: id NEW, counters 0, rates missing, sequence empty; content, age and context untouched."""
    encoder, catalog = Encoder.fit(FRAME, SCHEMA, 1), Catalog.build(FRAME.items, Encoder.fit(FRAME, SCHEMA, 1))
    config = FeatureDropoutConfig(probability=1, history=history)
    batch = TensorFrame(FRAME, encoder, catalog).batch(torch.arange(64))
    dropped = drop_history(batch, absent_of(encoder), config, torch.Generator())
    bare = TensorFrame(_without_history(FRAME, history), encoder, catalog).batch(torch.arange(64))
    for name, block in bare.inputs.items():
        assert torch.equal(dropped.inputs[name].nan_to_num(-1), block.nan_to_num(-1)), name


def _without_history(frame: Frame, history: str) -> Frame:
    """What the feature store gives for entities it has no history row of."""

    def emptied(table: pl.DataFrame, entity: Entity) -> pl.DataFrame:
        if history not in (entity, "all"):
            return table
        gone = [f.name for f in SCHEMA.select(entity) if f.group == "historical" and f.stored]
        return table.with_columns(pl.lit(None, table.schema[name]).alias(name) for name in gone)

    items = emptied(frame.items, Entity.ITEM)
    unknown = items.with_columns(item_id=pl.lit(-1, pl.Int64))
    return Frame(emptied(frame.users, Entity.USER), items if history == "user" else unknown, frame.rows)


def test_feature_dropout_leaves_the_draws_of_everything_else_alone() -> None:
    """So improbable that it never drops, it trains the very ranker that knows nothing of it."""
    never = TechniquesConfig(mixup=MixupConfig(), feature_dropout=FeatureDropoutConfig(probability=1e-12))
    plain, dropping = (_trained(t).ranker.state_dict() for t in (TechniquesConfig(mixup=MixupConfig()), never))
    assert all(torch.equal(plain[name], dropping[name]) for name in plain)


META = TechniquesConfig(meta_embedding=MetaEmbeddingConfig(hidden=4))
VIME, CONTRASTIVE = (
    TechniquesConfig(pretraining=PretrainingConfig(objective=objective, steps=20, batch_size=16, hidden=8))
    for objective in ("vime", "contrastive")
)


@pytest.fixture(scope="module")
def generating() -> Trained:
    return _trained(META)


def test_new_items_are_told_apart_by_their_content_in_place_of_the_id_they_lack(generating: Trained) -> None:
    """The group item_id: one row for all without a generator, of their own with it; known items keep theirs."""
    batch = TensorFrame(FRAME, generating.encoder, Catalog.build(FRAME.items, generating.encoder)).batch(
        torch.arange(40)
    )
    new = batch.inputs | {"item_id": torch.full_like(batch.inputs["item_id"], NEW)}
    with torch.inference_mode():
        known, unknown = (generating.ranker.groups(inputs)["item_id"] for inputs in (batch.inputs, new))
        assert torch.equal(known, generating.ranker.item_ids(batch.inputs["item_id"]))
        row = generating.ranker.item_ids(torch.tensor([NEW]))
        content = generating.ranker.groups(new)["item_content"]
        assert torch.allclose(unknown, row + generating.ranker.id_generator.generate(content))
        assert len(unknown.unique(dim=0)) > 10


def test_meta_embedding_leaves_all_other_weights_where_they_start_without_it() -> None:
    """The generator is made last, and starts as nothing."""
    encoder = Encoder.fit(FRAME, SCHEMA, 1)
    rankers = []
    for techniques in (TechniquesConfig(), META):
        torch.manual_seed(0)
        rankers.append(Ranker(encoder, SMALL, techniques).state_dict())
    plain, generating = rankers
    assert all(torch.equal(plain[name], generating[name]) for name in plain)


def test_hiding_more_ids_for_the_generator_leaves_the_draws_of_everything_else_alone() -> None:
    """So few that none is hidden, and no alignment: known items and their weights are those of the plain ranker."""
    plain = TRAINING.model_copy(update={"new_item_probability": 0.0})
    never = TechniquesConfig(
        mixup=MixupConfig(), meta_embedding=MetaEmbeddingConfig(hidden=4, share=0.0, alignment_weight=0.0)
    )
    ours, theirs = (_trained(t, plain).ranker.state_dict() for t in (never, TechniquesConfig(mixup=MixupConfig())))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_alignment_brings_what_is_generated_for_known_items_nearer_to_their_ids() -> None:
    """Against a generator that learns from hidden ids alone."""
    longer = TRAINING.model_copy(update={"epochs": 10})
    ends = []
    for weight in (1e-9, 3.0):
        config = MetaEmbeddingConfig(hidden=16, alignment_weight=weight)
        ends.append(
            np.mean(
                _trained(TechniquesConfig(meta_embedding=config), longer).facts["curve"]["losses"]["alignment"][-5:]
            )
        )
    assert ends[1] < 0.9 * ends[0]


@pytest.mark.integration
def test_the_exported_graph_generates_ids_as_the_torch_model_does(generating: Trained, tmp_path: Path) -> None:
    """Known and unknown items; no input is added to serving."""
    export_bundle(
        generating,
        Platt(slope=(1.0, 1.0), intercept=(0.0, 0.0)),
        FRAME,
        FRAME.items,
        tmp_path,
        {"fingerprint": "f", "run_date": "2024-03-11"},
    )
    exported = OnnxRanker(tmp_path)
    assert set(exported.names) == set(exported.encoder.inputs(FRAME, Catalog.build(FRAME.items, exported.encoder)))
    for items in (FRAME.items, FRAME.items.with_columns(item_id=pl.lit(-7, pl.Int64))):
        frame = Frame(FRAME.users, items, FRAME.rows)
        assert (
            np.abs(exported.score(frame, FRAME.items)["logits"] - predict(generating, frame, FRAME.items)).max() < 1e-5
        )


@pytest.mark.parametrize("techniques", [META, VIME, CONTRASTIVE])
def test_a_ranker_saved_with_a_switch_beyond_the_paper_is_loaded_with_it(
    techniques: TechniquesConfig, tmp_path: Path
) -> None:
    """Bit-identical logits after the round trip, and the same ones when trained again."""
    first = _trained(techniques)
    first.save(tmp_path)
    loaded = Trained.load(tmp_path)
    assert loaded.techniques == techniques
    assert np.array_equal(predict(loaded, FRAME, FRAME.items), predict(first, FRAME, FRAME.items))
    assert np.array_equal(predict(_trained(techniques), FRAME, FRAME.items), predict(first, FRAME, FRAME.items))


@pytest.mark.parametrize("techniques", [VIME, CONTRASTIVE])
def test_pretraining_adds_nothing_to_the_ranker_and_starts_its_item_content_alone_elsewhere(
    techniques: TechniquesConfig,
) -> None:
    """Same parameters; where nothing is learned afterwards, only the item's content tables differ."""
    still = TRAINING.model_copy(update={"learning_rate": 1e-12})
    plain, pretrained = (_trained(t, still) for t in (TechniquesConfig(), techniques))
    assert count_parameters(pretrained.ranker) == count_parameters(plain.ranker)
    weights, others = pretrained.ranker.state_dict(), plain.ranker.state_dict()
    moved = {name for name in weights if not torch.allclose(weights[name], others[name], rtol=0, atol=1e-9)}
    assert moved == {"item.blocks.categorical.table.weight", "item.blocks.multi.tables.0.weight"}


def test_the_fields_of_an_items_content_are_its_features_and_embed_to_what_the_ranker_sees() -> None:
    """Category, tags, duration with its mask, vector: together the content of the item, whatever the order."""
    encoder = Encoder.fit(FRAME, SCHEMA, 1)
    ranker = Ranker(encoder, SMALL)
    blocks = {name: torch.from_numpy(block) for name, block in encoder.items(FRAME).items()}
    content = ContentFields(ranker.item)
    fields = content.split(blocks)
    assert [field.shape[1] for field in fields] == [1, 3, 4, 1]
    vectors = content.embed(fields)
    assert [vector.shape[1] for vector in vectors] == [4, 4, 5, 2]
    assert torch.equal(torch.cat(vectors, dim=-1), ranker.item(blocks)["content"])


def test_pretraining_reads_one_row_per_item_its_newest() -> None:
    """Items 0 to 39 on two days, the later one with another category."""
    later = FRAME.items.with_columns(day=pl.lit(DAY + timedelta(days=1)), category=pl.lit(3, pl.Int64))
    frame = Frame(FRAME.users, pl.concat([later, FRAME.items]), FRAME.rows)
    encoded = Encoded.of(frame, FRAME.items, SCHEMA, 1)
    blocks, encoder = encoded.newest_items(), encoded.encoder
    assert blocks["item_id"].tolist() == list(range(2, 42))
    expected = rows_of(encoder.vocabularies["category"], pl.Series([3]))
    assert blocks["item_categorical"].unique().tolist() == expected.tolist()


def test_a_schema_without_content_of_items_has_nothing_to_generate_ids_of_or_to_pretrain() -> None:
    """Both errors name the switch and the mend."""
    content = [f.name for f in SCHEMA.select(Entity.ITEM) if f.group == "non_historical" and f.stored]
    history = SCHEMA.history.model_copy(update={"affinity": ()})
    items = {k: v for k, v in SCHEMA.items.items() if k not in content}
    schema = Schema.model_validate(SCHEMA.model_copy(update={"items": items, "history": history}).model_dump())
    assert content == ["category", "tags", "duration", "vector"]
    for techniques, switch in ((META, "meta_embedding"), (VIME, "pretraining")):
        with pytest.raises(ConfigError, match=rf"techniques.{switch}: .*set techniques.{switch}=null"):
            train_ranker(FRAME, FRAME.items, schema, SMALL, techniques, TRAINING)


@pytest.fixture(scope="module")
def aligned() -> Trained:
    return _trained(ALDI)


def test_aldi_answers_for_warm_items_with_the_very_ranker_that_is_trained_without_it(aligned: Trained) -> None:
    """The student answers for items younger than 7 days and for ids without a row of their own, and for no others."""
    rows = FRAME.rows.with_columns(pl.Series(ITEM_AGE, [0.0, 6.9, 7.0, 19.0] * 100, dtype=pl.Float32))
    items = FRAME.items.with_columns(pl.when(pl.col(ITEM_ID) < 5).then(-9).otherwise(ITEM_ID).alias(ITEM_ID))
    frame = Frame(FRAME.users, items, rows)
    served, teacher = predict(aligned, frame, FRAME.items), predict(_trained(TechniquesConfig()), frame, FRAME.items)
    unknown = frame.items[ITEM_ID].to_numpy()[rows["item_row"].to_numpy()] == -9
    cold = unknown | (rows[ITEM_AGE].to_numpy() < 7)
    assert np.array_equal(served[~cold], teacher[~cold])
    assert (served[cold] != teacher[cold]).all()


def test_the_student_sees_no_history(aligned: Trained) -> None:
    """Its answers for cold items do not move when every counter, rate and sequence is gone."""
    cold = Frame(FRAME.users, FRAME.items, FRAME.rows.with_columns(pl.lit(1.0, pl.Float32).alias(ITEM_AGE)))
    known, bare = (predict(aligned, frame, FRAME.items) for frame in (cold, _without_history(cold, "all")))
    assert np.allclose(known, bare, atol=1e-6)


def test_a_student_of_the_users_history_moves_with_it_and_not_with_the_items() -> None:
    """ALDI with history = "user": for cold items the user's counters and sequence count, the item's do not."""
    aligned = _trained(TechniquesConfig(aldi=AldiConfig(hidden=(8,), history="user")))
    cold = Frame(FRAME.users, FRAME.items, FRAME.rows.with_columns(pl.lit(1.0, pl.Float32).alias(ITEM_AGE)))
    known, no_item, no_user = (
        predict(aligned, frame, FRAME.items)
        for frame in (cold, _without_history(cold, "item"), _without_history(cold, "user"))
    )
    assert np.allclose(known, no_item, atol=1e-6)
    assert np.abs(known - no_user).max() > 1e-3


def test_the_student_ends_nearer_to_the_teacher_where_it_is_aligned_with_it() -> None:
    """Its predictions and their order, against a student that learns from labels alone."""
    longer = TRAINING.model_copy(update={"epochs": 10})
    ends = {}
    for weight in (0.0, 10.0):
        config = AldiConfig(hidden=(16,), rating_weight=weight, ranking_weight=weight)
        losses = _trained(TechniquesConfig(aldi=config), longer).facts["curve"]["losses"]
        ends[weight] = {name: np.mean(losses[name][-5:]) for name in ("rating", "ranking")}
    assert all(ends[10.0][name] < 0.9 * ends[0.0][name] for name in ("rating", "ranking")), ends


@pytest.mark.integration
def test_the_exported_graph_chooses_between_teacher_and_student_as_the_torch_model_does(
    aligned: Trained, tmp_path: Path
) -> None:
    """Young, old and unknown items."""
    export_bundle(
        aligned,
        Platt(slope=(1.0, 1.0), intercept=(0.0, 0.0)),
        FRAME,
        FRAME.items,
        tmp_path,
        {"fingerprint": "f", "run_date": "2024-03-11"},
    )
    for age in (1.0, 10.0):
        for items in (FRAME.items, FRAME.items.with_columns(item_id=pl.lit(-7, pl.Int64))):
            rows = FRAME.rows.with_columns(pl.lit(age, pl.Float32).alias(ITEM_AGE))
            frame = Frame(FRAME.users, items, rows)
            answers = OnnxRanker(tmp_path).score(frame, FRAME.items)["logits"]
            assert np.abs(answers - predict(aligned, frame, FRAME.items)).max() < 1e-5


def test_a_ranker_saved_with_aldi_is_loaded_with_its_student(aligned: Trained, tmp_path: Path) -> None:
    """Bit-identical logits after the round trip, for cold items too."""
    aligned.save(tmp_path)
    loaded = Trained.load(tmp_path)
    assert loaded.techniques == ALDI
    assert np.array_equal(predict(loaded, FRAME, FRAME.items), predict(aligned, FRAME, FRAME.items))


def test_a_ranker_saved_before_files_named_all_techniques_is_loaded(trained: Trained, tmp_path: Path) -> None:
    """Such a file names the residual alone, then the only technique with weights."""
    trained.save(tmp_path)
    description = read_json(tmp_path / "ranker.json")
    del description["techniques"]
    write_json(tmp_path / "ranker.json", description | {"residual": {"dim": 2}})
    assert np.array_equal(predict(Trained.load(tmp_path), FRAME, FRAME.items), predict(trained, FRAME, FRAME.items))


def test_the_residual_adds_at_most_five_percent_parameters_at_the_default_size() -> None:
    """The paper's bound, on a world with few embedding rows (the worst case for the ratio)."""
    encoder = Encoder.fit(FRAME, SCHEMA, 1)
    techniques = TechniquesConfig(residual=ResidualConfig())
    plain, residual = Ranker(encoder, ModelConfig()), Ranker(encoder, ModelConfig(), techniques)
    assert count_parameters(plain) < count_parameters(residual) <= 1.05 * count_parameters(plain)


def test_saving_and_loading_a_ranker_keeps_its_answers(trained: Trained, tmp_path: Path) -> None:
    """Bit-identical logits after the round trip."""
    trained.save(tmp_path)
    assert np.array_equal(predict(Trained.load(tmp_path), FRAME, FRAME.items), predict(trained, FRAME, FRAME.items))


def test_an_action_without_positives_cannot_be_trained_on() -> None:
    """The error names the action and the mend."""
    barren = Frame(FRAME.users, FRAME.items, FRAME.rows.with_columns(save=pl.lit(0, pl.Int8)))
    with pytest.raises(DataError, match=r"action 'save': 0 positives in 400 training rows.*train_days"):
        train_ranker(barren, FRAME.items, SCHEMA, SMALL, ALL_THREE, TRAINING)


def test_platt_scaling_recovers_the_slope_and_intercept_that_made_the_labels() -> None:
    """Labels drawn from sigmoid(0.5 x - 1)."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, (40_000, 1)).astype(np.float32)
    label = (rng.random((40_000, 1)) < 1 / (1 + np.exp(-(0.5 * logit - 1)))).astype(np.float32)
    platt = fit_platt(logit, label, ["click"], CalibrationConfig())
    assert platt.slope[0] == pytest.approx(0.5, abs=0.03)
    assert platt.intercept[0] == pytest.approx(-1, abs=0.05)


def test_a_ranker_that_orders_backwards_keeps_its_order_and_still_gets_the_observed_mean_rate() -> None:
    """The slope is held at a small positive value and the intercept fitted to it; the gate sees the rest."""
    logit = np.linspace(-3, 3, 1000, dtype=np.float32)[:, None]
    label = (logit < -1.8).astype(np.float32)
    platt = fit_platt(logit, label, ["click"], CalibrationConfig())
    assert platt.slope[0] == 0.01
    assert platt.probabilities(logit).mean() == pytest.approx(label.mean(), abs=1e-6)


def test_calibration_without_enough_positives_names_the_action_and_the_mend() -> None:
    """Three positives where ten are needed."""
    label = np.zeros((50, 1), np.float32)
    label[:3] = 1
    with pytest.raises(DataError, match=r"action 'click': 3 positives among 50 .* at least 10"):
        fit_platt(np.zeros((50, 1), np.float32), label, ["click"], CalibrationConfig())


@pytest.mark.integration
def test_the_exported_graph_answers_as_the_torch_model_with_the_calibration_inside(
    trained: Trained, bundle: Path
) -> None:
    """Logits agree; probabilities are their Platt-scaled sigmoid; the score weighs them by utility (eq. 12)."""
    answers = OnnxRanker(bundle).score(FRAME, FRAME.items, batch_users=7)
    logits = predict(trained, FRAME, FRAME.items)
    assert np.abs(answers["logits"] - logits).max() < 1e-5
    expected = Platt(slope=(1.1, 0.9), intercept=(0.1, -0.2)).probabilities(logits)
    assert np.abs(answers["probabilities"] - expected).max() < 1e-5
    assert np.abs(answers["score"] - expected @ [1.0, 2.0]).max() < 1e-5


@pytest.mark.integration
def test_a_bundle_holds_what_serving_needs_with_an_all_missing_request_among_its_golden_answers(bundle: Path) -> None:
    """The serving side's own check accepts it."""
    assert check_bundle(bundle).fingerprint == "f"


@pytest.mark.integration
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_is_missing_the_score_is_finite(bundle: Path, data: st.DataObject) -> None:
    """Cold-complete: any subset of features null, ids unknown, sequences empty."""
    users, items, rows = FRAME.users[:1], FRAME.items[:8], FRAME.rows[:8]
    rows = rows.with_columns(user_row=pl.lit(0), item_row=pl.Series(range(8)))
    for table, key in ((users, "user_id"), (items, "item_id")):
        stored = [c for c in table.columns if c not in (key, "day")]
        gone = data.draw(st.lists(st.sampled_from(stored), unique=True))
        emptied = table.with_columns(pl.lit(None, table.schema[c]).alias(c) for c in gone)
        users, items = (emptied, items) if key == "user_id" else (users, emptied)
    if data.draw(st.booleans()):
        items = items.with_columns(item_id=pl.lit(-7, pl.Int64))
    context = rows.with_columns(pl.lit(None, pl.Int64).alias("surface")) if data.draw(st.booleans()) else rows
    answers = OnnxRanker(bundle).score(Frame(users, items, context), FRAME.items)
    assert all(np.isfinite(answer).all() for answer in answers.values())


def test_labels_are_nan_where_an_action_was_not_observed() -> None:
    """Null in the log, NaN in the tensor."""
    labels = labels_of(FRAME, SCHEMA)
    assert np.isnan(labels[:, 1]).sum() == FRAME.rows["save"].null_count()
    assert not np.isnan(labels[:, 0]).any()
