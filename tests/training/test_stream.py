"""Training rows as a stream: the same rows, the same encoder, a bounded window, any batch by its number."""

import gc
import shutil
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from torch.utils._python_dispatch import TorchDispatchMode

from freshrank.config import TechniquesConfig, TrainingConfig, WindowConfig
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.errors import DataError
from freshrank.features.encoder import Encoder
from freshrank.features.frames import Frame, FramePart, load_frame, newest_items
from freshrank.pipeline import steps
from freshrank.pipeline.run import Run
from freshrank.schema import IN_TRAINING, Entity
from freshrank.settings import settings
from freshrank.training.batches import BatchSource, Encoded, TensorFrame
from freshrank.training.distributed import ProcessGroup
from freshrank.training.loop import train_encoded, train_ranker
from freshrank.training.shards import Shard, training_shards, user_part
from freshrank.training.stream import EpochPlan, Stream, encoded_days, joined
from tests.models.test_ranker import FRAME, SCHEMA, SMALL, TRAINING
from tests.streams import cut, hours, stream_of

pytestmark = pytest.mark.integration

WORLD = WorldConfig(users=150, days=6, items_at_start=80, new_items_per_day=10, impressions_per_day=900)
RUN_DATE = date(2024, 1, 7)
WINDOWS = WindowConfig(train_days=3, calibration_days=1, evaluation_days=1)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    """400 rows of 30 users in about a dozen shards, four or five windows of 100 rows."""
    return stream_of(FRAME, SCHEMA, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A simulated world with its history."""
    path = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRESHRANK_HOME", str(path / "home"))
        settings.cache_clear()
        data = simulate(path / "data", WORLD).path
        steps.build_features(data, RUN_DATE.isoformat(), WINDOWS)
        run = Run(data, RUN_DATE.isoformat())
    settings.cache_clear()
    return run


def days(run: Run) -> list[date]:
    return list(WINDOWS.split(run.date).train)


def read(
    source: BatchSource, encoded: Encoded, size: int = 64, group: ProcessGroup | None = None, **where: int
) -> list[torch.Tensor]:
    """The rows of each batch."""
    settings = {"epochs": 1, "seed": 0, "start": 0} | where
    return [hours(batch, encoded) for batch, _ in source.feed(size, group=group or ProcessGroup(), **settings)]


def part_of(users: list[int], parts: int) -> list[int]:
    return pl.DataFrame({"user_id": pl.Series(users, dtype=pl.Int64)}).select(user_part(parts)).to_series().to_list()


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), st.integers(1, 1000))
def test_a_user_is_in_one_part_whoever_else_there_is(users: list[int], parts: int) -> None:
    """(id * 0x9E3779B97F4A7C15 mod 2^64) / 2^32 mod parts, in exact integers."""
    expected = [(user * 0x9E3779B97F4A7C15 % 2**64 >> 32) % parts for user in users]
    assert part_of(users, parts) == expected


def test_parts_of_users_are_about_equal_whatever_the_ids() -> None:
    """10,000 users in 10 parts; ids in a row, and ids all divisible by 10."""
    for step in (1, 10):
        assert np.bincount(part_of([step * user for user in range(10_000)], 10), minlength=10).min() > 900


def _wide(frame: Frame) -> pl.DataFrame:
    """Every impression beside the features of its user and item, in an order of its own."""
    users, items = (
        table.with_row_index(row).with_columns(pl.col(row).cast(pl.UInt32))
        for table, row in ((frame.users, "user_row"), (frame.items, "item_row"))
    )
    wide = frame.rows.join(users, on="user_row", suffix="_of_user").join(items, on="item_row", suffix="_of_item")
    return wide.drop("user_row", "item_row").sort("event_timestamp", "user_id", "item_id", "request_id")


def test_the_shards_of_a_range_are_its_training_frame_with_every_users_day_in_one(run: Run) -> None:
    """Three days of 900 rows in shards of 150: the same impressions with the same features, none from the future."""
    whole = load_frame(run.dataset, run.workspace, days(run), IN_TRAINING)
    shards = training_shards(run.dataset, run.workspace, days(run), 150)
    assert len(shards) == 18
    assert max(shard.rows for shard in shards) < 300
    frames = [shard.read().frame for shard in shards]
    assert_frame_equal(
        pl.concat([_wide(frame) for frame in frames]).sort(_wide(whole).columns[:5]),
        _wide(whole).sort(_wide(whole).columns[:5]),
    )
    assert sum(len(frame.users) for frame in frames) == len(whole.users)
    assert sum(shard.user_days for shard in shards) == len(whole.users)
    fresh = (whole.rows["item_age_days"] < run.dataset.schema.fresh_days).sum()
    assert sum(shard.cold for shard in shards) == fresh


def test_a_day_cut_in_several_passes_is_cut_as_in_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 rows at a time instead of the whole day: the same shards, so an item is read as of the same instant."""
    one = training_shards(run.dataset, run.workspace, days(run)[:1], 150)
    frames = [shard.read() for shard in one]
    monkeypatch.setattr("freshrank.training.shards.ROWS_AT_ONCE", 300)
    shutil.rmtree(one[0].directory)
    several = training_shards(run.dataset, run.workspace, days(run)[:1], 150)
    assert several == one
    for before, shard in zip(frames, several, strict=True):
        after = shard.read()
        assert np.array_equal(before.first, after.first)
        for table in ("users", "items", "rows"):
            assert_frame_equal(getattr(before.frame, table), getattr(after.frame, table))


def test_of_an_items_rows_in_the_shards_of_a_day_one_is_marked(run: Run) -> None:
    """Marked rows are the items of the whole frame."""
    whole = load_frame(run.dataset, run.workspace, days(run), IN_TRAINING)
    parts = [shard.read() for shard in training_shards(run.dataset, run.workspace, days(run), 150)]
    marked = pl.concat([part.frame.items.filter(part.first) for part in parts])
    assert_frame_equal(marked.sort("day", "item_id"), whole.items.sort("day", "item_id"))
    assert_frame_equal(newest_items(iter(parts)), newest_items([FramePart.whole(whole)]))


def test_days_that_are_cut_are_not_cut_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feast is not asked."""
    shards = training_shards(run.dataset, run.workspace, days(run), 150)
    monkeypatch.setattr("freshrank.features.frames.FeatureStore", None)
    assert training_shards(run.dataset, run.workspace, days(run), 150) == shards


def test_an_encoder_fitted_on_parts_is_the_one_fitted_on_the_whole(tmp_path: Path) -> None:
    """Vocabularies to the value, with a minimum count that drops some; statistics to float32's last digit or so."""
    parts = [shard.read() for shard in cut(FRAME, SCHEMA, 12, tmp_path)]
    whole, fitted = Encoder.fit(FRAME, SCHEMA, 10), Encoder.fit_parts(parts, SCHEMA, 10)
    assert fitted.vocabularies.keys() == whole.vocabularies.keys()
    for name, vocabulary in whole.vocabularies.items():
        assert np.array_equal(vocabulary.values, fitted.vocabularies[name].values), name
    assert 0 < len(whole.vocabularies["item_id"].values) < 40
    for entity in (Entity.USER, Entity.ITEM, Entity.ROW):
        for name in ("mean", "std"):
            expected, actual = (getattr(each.statistics[entity], name) for each in (whole, fitted))
            assert np.allclose(expected, actual, rtol=1e-6, atol=0), (entity, name)


def test_a_stream_gives_every_row_once_an_epoch_in_full_batches(encoded: Encoded) -> None:
    """400 rows: six batches of 64 and one of 16, however windows fall; the second epoch in another order."""
    batches = read(encoded.data, encoded, epochs=2)
    assert [len(batch) for batch in batches] == [64] * 6 + [16] + [64] * 6 + [16]
    first, second = torch.cat(batches[:7]), torch.cat(batches[7:])
    rows = FRAME.rows["hour"].to_torch().sort().values
    assert torch.equal(first.sort().values, rows)
    assert torch.equal(second.sort().values, rows)
    assert not torch.equal(first, second)


def test_a_streams_batch_is_what_the_frame_in_memory_gives_for_the_same_rows(encoded: Encoded) -> None:
    """A batch over the seam of two windows among them: same inputs, labels and cold marks row by row."""
    memory = Encoded.of(FRAME, FRAME.items, SCHEMA, 1)
    whole = memory.data
    assert isinstance(whole, TensorFrame)
    place = {float(hour): row for row, hour in enumerate(FRAME.rows["hour"].to_list())}
    seams = 0
    for batch, _ in encoded.data.feed(64, 1, 0):
        same = whole.batch(torch.tensor([place[float(hour)] for hour in hours(batch, encoded)]))
        seams += len(batch.inputs["user_numeric"]) != len(same.inputs["user_numeric"])
        for name, block in _per_row(same.inputs).items():
            assert torch.allclose(_per_row(batch.inputs)[name].nan_to_num(-1), block.nan_to_num(-1)), name
        assert torch.equal(batch.labels.nan_to_num(-1), same.labels.nan_to_num(-1))
        assert torch.equal(batch.cold, same.cold)


def _per_row(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    index = inputs["user_index"]
    return {
        name: block[index] if name.startswith(("user_", "sequence_")) else block
        for name, block in inputs.items()
        if name != "user_index"
    }


@pytest.mark.parametrize("start", [1, 6, 7, 9, 13])
def test_a_stream_begun_at_any_batch_goes_on_as_if_it_had_begun_at_the_first(encoded: Encoded, start: int) -> None:
    """Two epochs of seven batches; the same holds in memory."""
    for source in (encoded.data, Encoded.of(FRAME, FRAME.items, SCHEMA, 1).data):
        whole, rest = read(source, encoded, epochs=2), read(source, encoded, epochs=2, start=start)
        assert len(rest) == 14 - start
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_a_window_mixes_shards_from_anywhere_in_the_range(encoded: Encoded) -> None:
    """The order of shards is drawn from the seed and the epoch; windows hold at most 100 rows."""
    rows = [10] * 40
    one, other = EpochPlan.of(rows, 100, 0, 0), EpochPlan.of(rows, 100, 0, 1)
    assert [len(window) for window in one.windows] == [10, 10, 10, 10]
    assert one.windows != other.windows
    assert min(max(window) - min(window) for window in one.windows) > 15


def test_no_more_than_two_windows_are_held(encoded: Encoded) -> None:
    """Counted at every batch among all objects that live and did not before."""
    assert isinstance(encoded.data, Stream)
    windows = EpochPlan.of([shard.rows for shard in encoded.data.shards], 100, 0, 0).windows
    assert len(windows) >= 4
    held = []
    gc.collect()
    gc.freeze()  # millions, where other tests ran before
    try:
        for _ in encoded.data.feed(50, 1, 0):
            gc.collect()
            held.append(_tensor_frames())
    finally:
        gc.unfreeze()
    assert 1 <= max(held) <= 2


def test_reading_ahead_computes_nothing_with_torch(encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further thread that did would have OpenMP threads of its own, and halved training's speed on two cores."""
    computed, window = Operations(), Stream._window

    def watched(self: Stream, shards: Sequence[int]) -> TensorFrame:
        with computed:
            return window(self, shards)

    monkeypatch.setattr(Stream, "_window", watched)
    assert sum(1 for _ in encoded.data.feed(64, 1, 0)) == 7
    assert set(computed.names) <= {"aten.lift_fresh.default", "aten.detach.default"}  # a tensor of a NumPy array
    with computed:
        torch.ones(2).sum()
    assert computed.names[-1] == "aten.sum.default"


class Operations(TorchDispatchMode):
    """Names of torch's operations of the thread that enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _tensor_frames() -> int:
    # Asking every object whether it is an instance would wake deprecated ones of torch's.
    return sum(type(each) is TensorFrame for each in gc.get_objects())


@pytest.mark.parametrize("source", ["memory", "stream"])
def test_ranks_have_as_many_batches_and_together_every_row_once(encoded: Encoded, source: str) -> None:
    """Three ranks; each batch's weights sum to the ranks that share it."""
    data = encoded.data if source == "stream" else Encoded.of(FRAME, FRAME.items, SCHEMA, 1).data
    ranks = [list(data.feed(64, 1, 0, 0, ProcessGroup(rank, 3))) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [7, 7, 7]
    together = torch.cat([hours(batch, encoded) for batches in ranks for batch, _ in batches])
    assert torch.equal(together.sort().values, FRAME.rows["hour"].to_torch().sort().values)
    for fed in zip(*ranks, strict=True):
        assert sum(weight for _, weight in fed) == pytest.approx(3, rel=0.05)
    assert sum(weight for batches in ranks for _, weight in batches) == pytest.approx(21)


def test_a_rank_without_rows_of_a_small_batch_steps_with_one_that_does_not_count() -> None:
    """Two rows for three ranks."""
    shares = [ProcessGroup(rank, 3).share(torch.tensor([4, 9])) for rank in range(3)]
    assert [(share.rows.tolist(), share.weight) for share in shares] == [([4], 0.0), ([4], 1.5), ([9], 1.5)]


def test_more_ranks_than_shards_can_feed_are_refused(encoded: Encoded) -> None:
    """The error says how many rows there were and what to do."""
    with pytest.raises(DataError, match=r"rank \d+ of 40: received 0 training rows.*start fewer processes"):
        for rank in range(40):
            list(encoded.data.feed(64, 1, 0, 0, ProcessGroup(rank, 40)))


def test_batches_put_together_keep_each_user_with_their_rows(encoded: Encoded) -> None:
    """The users of the second stand behind those of the first."""
    (first, _), (second, _), *_ = encoded.data.feed(64, 1, 0)
    both = joined([first, second])
    users = len(first.inputs["user_numeric"])
    assert both.inputs["user_index"].tolist() == [
        *first.inputs["user_index"].tolist(),
        *(users + second.inputs["user_index"]).tolist(),
    ]


def test_what_fits_a_window_trains_what_it_always_did_and_what_does_not_trains_as_well(run: Run) -> None:
    """Bit-identical weights in one window; streamed, every row is learned from and the losses are close."""
    training = TRAINING.model_copy(update={"epochs": 1, "batch_size": 128, "min_steps": 1})
    schema, plain = run.dataset.schema.without_siblings(), TechniquesConfig()
    frame = load_frame(run.dataset, run.workspace, days(run), IN_TRAINING)
    expected = train_ranker(frame, run.dataset.items(), schema, SMALL, plain, training)
    rankers = {}
    for name, window_rows in (("memory", len(frame.rows)), ("stream", 1000)):
        fit = training.model_copy(update={"window_rows": window_rows})
        source = encoded_days(run.dataset, run.workspace, days(run), schema, SMALL.min_count, fit)
        assert isinstance(source.data, {"memory": TensorFrame, "stream": Stream}[name])
        rankers[name] = train_encoded(source, SMALL, plain, fit)
    weights = {name: trained.ranker.state_dict() for name, trained in rankers.items()}
    assert all(torch.equal(value, weights["memory"][name]) for name, value in expected.ranker.state_dict().items())
    assert rankers["stream"].facts["rows"] == rankers["memory"].facts["rows"] == len(frame.rows)
    assert rankers["stream"].facts["cold_rows"] == rankers["memory"].facts["cold_rows"]
    losses = [np.mean(each.facts["curve"]["losses"]["bce"]) for each in rankers.values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_an_action_without_positives_in_any_shard_cannot_be_trained_on(tmp_path: Path) -> None:
    """The error of the frame in memory."""
    barren = Frame(FRAME.users, FRAME.items, FRAME.rows.with_columns(save=pl.lit(0, pl.Int8)))
    with pytest.raises(DataError, match=r"action 'save': 0 positives in 400 training rows"):
        stream_of(barren, SCHEMA, tmp_path)


def test_pretraining_reads_the_same_items_from_shards(encoded: Encoded) -> None:
    """One row per item."""
    whole = Encoded.of(FRAME, FRAME.items, SCHEMA, 1).newest_items()
    for name, block in encoded.newest_items().items():
        expected = whole[name]
        shown = torch.isin(expected.new_tensor(range(len(expected)), dtype=torch.int64), torch.tensor(_shown()))
        assert torch.equal(block.nan_to_num(-1), expected[shown].nan_to_num(-1)), name


def _shown() -> list[int]:
    """Items of the frame that an impression points at: shards hold no others."""
    return FRAME.rows["item_row"].unique().sort().to_list()


def test_a_shard_is_read_with_the_columns_it_was_cut_from(tmp_path: Path) -> None:
    """Every dtype survives Parquet."""
    shards: list[Shard] = cut(FRAME, SCHEMA, 3, tmp_path)
    frame = shards[0].read().frame
    for table in ("users", "items", "rows"):
        assert getattr(frame, table).schema == getattr(FRAME, table).schema or table == "rows"


def test_the_default_window_holds_a_log_of_this_size() -> None:
    """The whole of KuaiRand-Pure (1.4 million impressions) trains in memory, as it did before there were streams."""
    assert TrainingConfig().window_rows >= 1_400_000
