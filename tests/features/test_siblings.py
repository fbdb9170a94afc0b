"""Siblings: what items of equal content did, as features of an item that has done nothing yet."""

import logging
import math
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import ValidationError

from freshrank.bundle.onnx_ranker import OnnxRanker
from freshrank.config import PLAIN, FeatureDropoutConfig, SiblingPriorConfig, TechniquesConfig
from freshrank.datasets.dataset import Dataset
from freshrank.errors import ConfigError
from freshrank.export.calibration import Platt
from freshrank.export.onnx_export import export_bundle
from freshrank.features.encoder import Catalog, Encoder
from freshrank.features.frames import load_frame, serving_frame
from freshrank.features.snapshots import build_history, snapshot_path
from freshrank.features.store import FeatureStore
from freshrank.models.ranker import Ranker, count_parameters
from freshrank.pipeline.champion import lacking_inputs
from freshrank.schema import Entity, FeatureGroup, HistoryConfig, Kind, Schema, sibling_names
from freshrank.serving.ranking.query import Query
from freshrank.serving.ranking.service import RequestBatch, online_features
from freshrank.storage.workspace import Workspace
from freshrank.training.augmentations import absent_of, drop_history
from freshrank.training.batches import TensorFrame
from freshrank.training.loop import model_schema, train_ranker
from freshrank.training.trained import Trained, predict
from tests.models.test_ranker import SMALL, TRAINING
from tests.tiny_log import ITEMS, at, day, impression, log_schema, snapshots_of, write_log
from tests.worlds import random_frame, tiny_schema

pytestmark = pytest.mark.integration

Log = list[dict[str, Any]]
ENTRIES = ("category", "tags", "duration", "category+duration")
SCHEMA = log_schema().with_siblings(ENTRIES)
PRIOR = TechniquesConfig(sibling_prior=SiblingPriorConfig())


def names_of(*entries: str) -> list[str]:
    return [name for entry in entries for name in sibling_names(entry, SCHEMA.actions)]


NAMES = names_of(*ENTRIES)


def smoothed(smoothing: float) -> Schema:
    history = SCHEMA.history.model_copy(update={"sibling_smoothing": smoothing})
    return SCHEMA.model_copy(update={"history": history})


def snapshot(tmp_path: Path, log: Log, number: int, schema: Schema = SCHEMA) -> dict[int, dict[str, Any]]:
    """Item rows of the snapshot of day ``number``, by id."""
    frames = snapshots_of(write_log(tmp_path / "data", log, schema), [day(number)])[day(number)]
    return {row["item_id"]: row for row in frames[Entity.ITEM].to_dicts()}


def siblings_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in NAMES}


def test_an_item_is_given_the_shrunk_rate_of_the_others_of_its_category(tmp_path: Path) -> None:
    """Items 1 and 2 are of category 10, item 3 of 20. To item 2 belongs item 1's click in one impression, shrunk by
    2 observations to the rate 1/2 of all others (items 1 and 3): (1 + 2/2) / (1 + 2); to item 1 the one click in two
    of item 2, shrunk to 1/3: (1 + 2/3) / (2 + 2)."""
    log = [impression(0, 1, 1, 1), impression(0, 1, 2, 0), impression(1, 1, 2, 1), impression(1, 1, 3, 0)]
    rows = snapshot(tmp_path, log, 2, smoothed(2))
    assert [rows[item]["sibling_category_impressions"] for item in (1, 2, 3)] == [2, 1, 0]
    assert rows[1]["sibling_category_click_rate"] == pytest.approx((1 + 2 / 3) / 4)
    assert rows[2]["sibling_category_click_rate"] == pytest.approx((1 + 2 / 2) / 3)
    assert rows[3]["sibling_category_click_rate"] == pytest.approx(2 / 3)


def test_an_item_born_today_has_siblings_and_no_history(tmp_path: Path) -> None:
    """Item 6, born at 6:00 of day 3, shares its first tag with item 1; item 5 was never shown either."""
    log = [impression(0, 1, 1, 1), impression(1, 1, 2, 0)]
    assert sorted(snapshot(tmp_path, log, 2)) == [1, 2, 3, 4, 5]
    born = snapshot(tmp_path, log, 3)[6]
    assert born["sibling_tags_impressions"] == 1
    assert born["sibling_tags_click_rate"] == pytest.approx((1 + 30 / 2) / 31)
    assert (born["item_impressions_3d"], born["item_click_3d"], born["item_click_rate_3d"]) == (0, 0, None)


def test_without_a_value_there_are_no_siblings(tmp_path: Path) -> None:
    """Item 4 has neither category nor tags, item 3 an empty list of tags and no duration: missing, not equal."""
    rows = snapshot(tmp_path, [impression(0, 1, item, 1) for item in (1, 2, 3, 4)], 1)
    missing = {item: [name for name in NAMES if rows[item][name] is None] for item in (3, 4)}
    assert missing[3] == names_of("tags", "duration", "category+duration")
    assert missing[4] == names_of("category", "tags", "category+duration")


def test_numeric_siblings_share_a_half_octave(tmp_path: Path) -> None:
    """Durations 4 and 5 lie in [4, 5.66), 6 in [5.66, 8), 0 counts as 1 and 2.5 lies in [2, 2.83)."""
    rows = snapshot(tmp_path, [impression(3, 1, item, 1, hour=7) for item in (1, 2, 4, 5, 6)], 4)
    assert [rows[item]["sibling_duration_impressions"] for item in (1, 2, 4, 5, 6)] == [0, 0, 1, 1, 0]


def test_what_happens_on_the_day_itself_is_in_no_rate_of_that_day(tmp_path: Path) -> None:
    """Item 2's click at midnight of day 2 changes nothing for its sibling; one minute earlier it does."""
    past = [impression(0, 1, 1), impression(0, 1, 3)]
    without, same_day, day_before = (
        siblings_of(snapshot(tmp_path, past + more, 2)[1])
        for more in ([], [impression(2, 1, 2, 1, hour=0)], [impression(1, 1, 2, 1, hour=24 - 1 / 60)])
    )
    assert same_day == without
    assert day_before["sibling_category_impressions"] == 1
    assert day_before["sibling_category_click_rate"] > without["sibling_category_click_rate"] == 0


def test_withheld_impressions_are_in_no_rate(tmp_path: Path) -> None:
    """Usage 'evaluation' is judged only."""
    log = [impression(0, 1, 2, 1, usage="evaluation"), impression(0, 1, 2, 0, hour=13)]
    assert snapshot(tmp_path, log, 1, smoothed(0))[1]["sibling_category_click_rate"] == 0


def test_smoothing_goes_from_the_siblings_alone_to_everybody_else_alike(tmp_path: Path) -> None:
    """Of item 1's sibling 1 click in 1; of all others 1 in 4. Item 6 has no sibling that was shown: null at 0."""
    log = [impression(0, 1, 2, 1), *(impression(0, 1, 3, 0, hour=hour) for hour in range(3))]
    none, much = (snapshot(tmp_path, log, 3, smoothed(weight)) for weight in (0, 1e9))
    assert none[1]["sibling_category_click_rate"] == 1
    assert none[6]["sibling_category_click_rate"] is None
    assert much[1]["sibling_category_click_rate"] == much[6]["sibling_category_click_rate"] == pytest.approx(1 / 4)


label = st.sampled_from([0, 1, None])
impressions = st.builds(
    impression,
    number=st.integers(0, 6),
    user=st.integers(1, 3),
    item=st.integers(1, 5),
    click=label,
    save=label,
    hour=st.integers(0, 23),
    usage=st.sampled_from(["all", "history", "evaluation"]),
)
logs = st.lists(impressions, min_size=1, max_size=25)


def naive(log: Log, number: int, item: int, entry: str) -> list[float | None]:
    """Features of one entry from the definitions, one impression at a time."""
    key = keys_of(entry)
    if key[item] is None:
        return [None] * 3
    inside = [row for row in log if 1 <= _age(row, number) <= SCHEMA.lookback_days and row["usage"] != "evaluation"]
    others = [row for row in inside if row["item_id"] != item]
    alike = [row for row in others if key[row["item_id"]] == key[item]]
    return [len(alike), *(_shrunk(alike, others, action) for action in SCHEMA.actions)]


def _age(row: dict[str, Any], number: int) -> int:
    return number - (row["event_timestamp"] - at(0, 0)) // timedelta(days=1)


def keys_of(entry: str) -> dict[int, tuple[int, ...] | None]:
    table = {row["item_id"]: [_key(row[column]) for column in entry.split("+")] for row in ITEMS.to_dicts()}
    return {item: None if None in key else tuple(key) for item, key in table.items()}


def _key(value: Any) -> Any:
    if isinstance(value, list):
        return value[0] if value else None
    return math.floor(2 * math.log2(max(value, 1))) if isinstance(value, float) else value


def _shrunk(alike: Log, others: Log, action: str) -> float | None:
    weight = SCHEMA.history.sibling_smoothing
    labels, everybody = ([row[action] for row in rows if row[action] is not None] for rows in (alike, others))
    return (sum(labels) + weight * sum(everybody) / len(everybody)) / (len(labels) + weight) if everybody else None


@settings(max_examples=10, deadline=None)
@given(log=logs, days=st.sets(st.integers(0, 10), min_size=1, max_size=3))
def test_siblings_agree_with_a_count_by_hand(log: Log, days: set[int]) -> None:
    """Any log, any days computed together: every item that is born, every entry."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_log(Path(folder) / "data", log, SCHEMA)
        for on, frames in snapshots_of(dataset, [day(number) for number in sorted(days)]).items():
            number = (on - day(0)).days
            for row in frames[Entity.ITEM].to_dicts():
                expected = [value for entry in ENTRIES for value in naive(log, number, row["item_id"], entry)]
                assert [row[name] for name in NAMES] == pytest.approx(expected)


@settings(max_examples=8, deadline=None)
@given(log=logs, item=st.integers(1, 6), data=st.data())
def test_an_items_own_history_never_enters_its_own_siblings(log: Log, item: int, data: st.DataObject) -> None:
    """Other labels of its own, or none of its impressions at all: the very same numbers."""
    own = [row for row in log if row["item_id"] == item]
    other = [row | {"click": data.draw(label), "save": data.draw(label)} for row in own]
    rest = [row for row in log if row["item_id"] != item] or [impression(20, 1, 1 if item != 1 else 2)]
    with tempfile.TemporaryDirectory() as folder:
        rates = [siblings_of(snapshot(Path(folder), log_, 5)[item]) for log_ in (own + rest, other + rest, rest)]
    assert rates[0] == rates[1] == rates[2]


def test_siblings_leave_every_other_number_of_the_snapshots_alone(tmp_path: Path) -> None:
    """Of what was seen, the counters; of users, everything."""
    log = [impression(0, 1, 1, 1), impression(1, 2, 3, 0), impression(2, 1, 2, None, 1)]
    plain, more = (
        snapshots_of(write_log(tmp_path / "data", log, schema), [day(3)])[day(3)] for schema in (log_schema(), SCHEMA)
    )
    assert_frame_equal(plain[Entity.USER], more[Entity.USER])
    seen = more[Entity.ITEM].join(plain[Entity.ITEM], on="item_id", how="semi").sort("item_id")
    assert_frame_equal(seen.select(plain[Entity.ITEM].columns), plain[Entity.ITEM])


def test_siblings_are_features_of_the_snapshot_that_are_not_historical() -> None:
    """What drops or masks an item's history leaves them; without any, a schema is written as before there were any."""
    features = [f for f in SCHEMA.select(Entity.ITEM, stored=True) if f.name in NAMES]
    assert [f.name for f in features] == NAMES
    assert {(f.group, f.snapshot) for f in features} == {(FeatureGroup.NON_HISTORICAL, True)}
    assert SCHEMA.without_siblings() == log_schema()
    assert not any("sibling" in key for key in log_schema().model_dump()["history"])
    assert Schema.model_validate(SCHEMA.model_dump(mode="json")) == SCHEMA


@pytest.mark.parametrize(
    "entries", [("vector",), ("absent",), ("category+category",), ("category+tags+duration",), ("category", "category")]
)
def test_siblings_by_what_cannot_be_equal_are_refused_by_name(entries: tuple[str, ...]) -> None:
    """An embedding, no column, one column twice, three columns, one entry twice."""
    tree = log_schema().model_dump() | {"history": HistoryConfig(siblings=entries)}
    with pytest.raises(ValidationError, match=r"history\.siblings"):
        Schema.model_validate(tree)


DAYS = [day(number) for number in range(6)]
LOG = [
    impression(0, 1, 1, 1),
    impression(1, 2, 2, 0, 1),
    impression(1, 1, 3, 1),
    impression(2, 3, 1, 0),
    impression(3, 1, 6, 1, hour=7),
    impression(4, 2, 6, 0, hour=6),
    impression(4, 1, 5, 1),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Workspace]:
    """Snapshots of six days; online holds day 4."""
    root = tmp_path_factory.mktemp("siblings")
    dataset, workspace = write_log(root / "data", LOG, SCHEMA), Workspace.of("tiny_log", root / "home")
    build_history(dataset, workspace, DAYS)
    store = FeatureStore(dataset, workspace)
    store.apply()
    store.materialize(day(4))
    return dataset, workspace


def test_online_and_offline_frames_hold_the_same_siblings(world: tuple[Dataset, Workspace]) -> None:
    """Every impression of day 4, exactly; the item nobody had seen before has siblings in both."""
    frame, store = load_frame(*world, [day(4)]), FeatureStore(*world)
    for row in frame.rows.to_dicts():
        served = serving_frame(store, row["user_id"], [row["item_id"]], row["event_timestamp"])
        assert_frame_equal(served.items, frame.items[[row["item_row"]]], check_exact=True)
    new = frame.items.filter(pl.col("item_id") == 5)
    assert new["item_impressions_3d"].to_list() == [0]
    assert new["sibling_category_impressions"].to_list() == [1]


def test_an_unknown_item_has_no_siblings_and_one_out_of_all_windows_has(world: tuple[Dataset, Workspace]) -> None:
    """Item 99 is not in the table; item 4 was never shown."""
    read = FeatureStore(*world).online_items([99, 4])
    assert read.select(NAMES).row(0) == (None,) * len(NAMES)
    assert read["sibling_duration_impressions"].to_list() == [None, 0]
    assert read["item_impressions_3d"].to_list() == [None, 0]


def test_snapshots_of_before_the_schema_had_siblings_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """Days 0..5 were built without, days 3..5 are built again with: they are read, offline and online."""
    workspace = Workspace.of("tiny_log", tmp_path / "home")
    build_history(write_log(tmp_path / "plain", LOG), workspace, DAYS)
    dataset = write_log(tmp_path / "data", LOG, SCHEMA)
    build_history(dataset, workspace, DAYS[3:])
    items = load_frame(dataset, workspace, [day(4)]).items
    assert items.filter(pl.col("item_id") == 5)["sibling_category_impressions"].to_list() == [1]
    assert not snapshot_path(workspace, Entity.ITEM, day(0)).exists()
    assert snapshot_path(workspace, Entity.USER, day(0)).exists()


WORLD = tiny_schema(query=True)
WITH = WORLD.with_siblings(("category", "tags+duration"))
FRAME = random_frame(WITH)


def _trained(techniques: TechniquesConfig, schema: Schema = WITH) -> Trained:
    return train_ranker(FRAME, FRAME.items, schema, SMALL, techniques, TRAINING)


@pytest.fixture(scope="module")
def prior() -> Trained:
    return _trained(PRIOR)


def test_off_is_a_world_without_siblings_bit_for_bit(tmp_path: Path) -> None:
    """Same weights, same encoder to the byte."""
    off, never = _trained(PLAIN), _trained(PLAIN, WORLD)
    weights = off.ranker.state_dict(), never.ranker.state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    for name, trained in (("off", off), ("never", never)):
        trained.save(tmp_path / name)
    for file in ("encoder.json", "encoder.safetensors", "ranker.safetensors"):
        assert (tmp_path / "off" / file).read_bytes() == (tmp_path / "never" / file).read_bytes()


def test_on_without_siblings_declared_is_off_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A recipe must not fail on a dataset that has nothing for it."""
    with caplog.at_level(logging.WARNING):
        assert model_schema(WORLD, PRIOR) == WORLD
    assert "no history.siblings" in caplog.text


def test_some_of_the_siblings_can_be_chosen_and_only_declared_ones() -> None:
    """In the schema's order; another one is named together with what there is."""
    some = TechniquesConfig(sibling_prior=SiblingPriorConfig(columns=("tags+duration",)))
    assert model_schema(WITH, some).history.siblings == ("tags+duration",)
    unknown = TechniquesConfig(sibling_prior=SiblingPriorConfig(columns=("author",)))
    with pytest.raises(ConfigError, match=r"received \['author'\].*'category', 'tags\+duration'"):
        model_schema(WITH, unknown)


def test_the_inputs_of_siblings_count_as_parameters_the_prior_adds(prior: Trained) -> None:
    """The increase is measured against the ranker that reads no siblings."""
    plain = Ranker(prior.encoder.without_siblings(), SMALL)
    assert prior.facts["parameters"] > count_parameters(plain)
    assert prior.facts["parameter_increase"] == prior.facts["parameters"] / count_parameters(plain) - 1


def test_siblings_reach_the_predictions_and_dropped_history_leaves_them(prior: Trained) -> None:
    """Other rates, other logits; feature dropout of everything touches none of their columns."""
    items = FRAME.items.with_columns(sibling_category_click_rate=pl.lit(9.0, pl.Float32))
    moved = predict(prior, type(FRAME)(FRAME.users, items, FRAME.rows), FRAME.items)
    assert np.abs(moved - predict(prior, FRAME, FRAME.items)).max() > 1e-4
    data = TensorFrame(FRAME, prior.encoder, Catalog.build(FRAME.items, prior.encoder))
    batch = data.batch(torch.arange(64))
    config = FeatureDropoutConfig(probability=1, history="all")
    dropped = drop_history(batch, absent_of(prior.encoder), config, torch.Generator())
    names = [f.name for f in prior.encoder.numeric(Entity.ITEM)]
    columns = [place for place, name in enumerate(names) if name.startswith("sibling_")]
    assert len(columns) == 6
    before, after = (each.inputs["item_numeric"][:, columns].nan_to_num(-1) for each in (batch, dropped))
    assert torch.equal(before, after)


def test_a_bundle_says_which_siblings_it_needs(prior: Trained) -> None:
    """Judged where they are still declared; a bundle without them is judged anywhere."""
    needed, plain = prior.encoder.schema, model_schema(WITH, PLAIN)
    assert lacking_inputs(needed, WITH) == lacking_inputs(plain, WITH) == lacking_inputs(plain, WORLD) == []
    assert lacking_inputs(needed, WORLD) == names_of("category", "tags+duration")


def bundle_of(trained: Trained, out: Path) -> OnnxRanker:
    facts = {"fingerprint": "f", "run_date": "2024-03-11"}
    export_bundle(trained, Platt(slope=(1.0, 1.0), intercept=(0.0, 0.0)), FRAME, FRAME.items, out, facts)
    return OnnxRanker(out)


def test_the_exported_graph_reads_siblings_as_the_torch_model_does(prior: Trained, tmp_path: Path) -> None:
    """Present, missing, and for a whole frame."""
    answers = bundle_of(prior, tmp_path).score(FRAME, FRAME.items)["logits"]
    assert np.abs(answers - predict(prior, FRAME, FRAME.items)).max() < 1e-5


@pytest.mark.parametrize("techniques", [PLAIN, PRIOR])
def test_a_bundle_with_or_without_siblings_is_served_from_a_store_that_has_them(
    world: tuple[Dataset, Workspace], techniques: TechniquesConfig
) -> None:
    """Through the reader of the server: its inputs are those of the offline frame, to the bit."""
    dataset, workspace = world
    frame, items = load_frame(dataset, workspace, [day(4)]), dataset.items()
    encoder = Encoder.fit(frame, model_schema(dataset.schema, techniques), 1)
    for row in frame.rows.to_dicts():
        single = type(frame)(frame.users, frame.items, frame.rows.filter(pl.col("request_id") == row["request_id"]))
        batch = RequestBatch(
            [Query(row["user_id"], np.array([row["item_id"]]), at_us(row), {"surface": row["surface"]})]
        )
        known = online_features(encoder.schema, workspace).read(batch.user_ids, batch.item_ids, batch.lookups)
        served, _ = batch.blocks(known, encoder)
        expected = encoder.inputs(single, Catalog.build(items, encoder))
        assert known.problem is None
        assert known.items.known.all()
        for name in ("item_numeric", "item_categorical", "row_numeric"):
            assert np.array_equal(served[name], expected[name], equal_nan=True), name


def test_without_the_siblings_it_needs_a_bundle_answers_with_what_is_missing(tmp_path: Path) -> None:
    """They were taken out of schema.yaml: they read as missing, and everything else is there."""
    dataset, workspace = write_log(tmp_path / "data", LOG), Workspace.of("tiny_log", tmp_path / "home")
    build_history(dataset, workspace, [day(4)])
    store = FeatureStore(dataset, workspace)
    store.apply()
    store.materialize(day(4))
    nobody = np.zeros(0, np.int64)
    known = online_features(SCHEMA, workspace).read(np.array([1]), np.array([1]), nobody)
    plain = online_features(dataset.schema, workspace).read(np.array([1]), np.array([1]), nobody)
    assert known.problem is None
    for feature in SCHEMA.select(Entity.ITEM, Kind.NUMERIC):
        value = known.items.columns.values(feature.name)
        expected = feature.missing if feature.name in NAMES else plain.items.columns.values(feature.name)
        np.testing.assert_equal(value, np.float32(expected))


def at_us(row: dict[str, Any]) -> int:
    """When an impression happened, in microseconds since 1970."""
    return int(row["event_timestamp"].timestamp() * 1e6)
