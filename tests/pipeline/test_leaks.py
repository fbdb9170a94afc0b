"""Leaks put into the code, one at a time, each where a careless change would make it: the test named beside it fails.

A leak that no test catches is a test that is missing. docs/features.md shows the table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from freshrank.config import PLAIN, EvaluationConfig, GateConfig, Split, TrainingConfig, WindowConfig
from freshrank.datasets import writer
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.simulator import simulate
from freshrank.dates import day_of, days
from freshrank.errors import ValidationFailed
from freshrank.evaluation.evaluate import compare, evaluate
from freshrank.evaluation.gate import judge
from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.features import daily_aggregates, frames, hourly, snapshots
from freshrank.features import store as feature_store
from freshrank.features.encoder import Encoder
from freshrank.features.frames import Frame
from freshrank.features.hourly import HOUR
from freshrank.features.store import FeatureStore
from freshrank.pipeline import champion as champion_module
from freshrank.pipeline import steps
from freshrank.pipeline.champion import Champion
from freshrank.pipeline.run import Run
from freshrank.schema import EVENT_TIMESTAMP, Entity, Usage
from freshrank.serving.repository import ModelRepository
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace
from freshrank.training import shards, stream
from freshrank.training.batches import labels_of
from freshrank.training.loop import train_ranker
from freshrank.training.trained import predict
from freshrank.validation import validate
from tests import test_windows
from tests.features import test_frames, test_hourly, test_siblings, test_snapshots, test_store
from tests.judging import sigmoid
from tests.models import test_ranker
from tests.paths import PROJECT_ROOT
from tests.pipeline import test_judgement, test_steps
from tests.tiny_log import day, impression, snapshots_of, write_log
from tests.validation import test_validate
from tests.worlds import random_frame, tiny_schema

pytestmark = pytest.mark.integration

ONE_DAY = timedelta(days=1)
Patch = pytest.MonkeyPatch
Given = dict[str, Any]


@dataclass(frozen=True)
class Leak:
    """What a change would let in, and what then fails."""

    name: str
    put_in: Callable[[Patch], None]
    caught_by: Callable[..., None]
    given: Callable[["Place"], Given]
    """Arguments of ``caught_by``, made with the leak in."""
    says: str
    """What the error matches."""
    error: type[Exception] = AssertionError
    slow: bool = False

    @property
    def test(self) -> str:
        return f"{self.caught_by.__module__.removeprefix('tests.')}.{self.caught_by.__name__}"


@dataclass(frozen=True)
class Place:
    """Where a test runs."""

    path: Path
    patch: Patch


# ---------------------------------------------------------------- what a test is given


def a_folder(place: Place) -> Given:
    return {"tmp_path": place.path}


def a_folder_and_an_environment(place: Place) -> Given:
    return a_folder(place) | {"monkeypatch": place.patch}


def nothing(place: Place) -> Given:
    return {}


def a_frame(place: Place) -> Given:
    world = test_frames.make_world(place.path, test_frames.LOG)
    return {"frame": frames.load_frame(*world, test_frames.DAYS)}


def a_store(name: str, *numbers: int) -> Callable[[Place], Given]:
    """Registered, with the snapshots of days ``numbers``."""

    def make(place: Place) -> Given:
        dataset = write_log(place.path / "data", test_store.LOG)
        store = FeatureStore(dataset, Workspace.of("tiny_log", place.path / "home"))
        snapshots.build_history(dataset, store.workspace, [day(number) for number in numbers])
        store.apply()
        return {name: store}

    return make


def a_morning(place: Place) -> Given:
    return {"morning": test_hourly.built(morning_log(place), place.path / "home")}


def an_unbuilt_morning(place: Place) -> Given:
    return {"morning": FeatureStore(morning_log(place), Workspace.of("tiny_log", place.path / "home"))}


def morning_log(place: Place) -> Dataset:
    return write_log(place.path / "data", test_hourly.MORNING, test_hourly.SCHEMA)


def an_evening(place: Place) -> Given:
    log = test_hourly.evening_log(0)
    return a_folder(place) | {"evening": (log, write_log(place.path / "whole", log, test_hourly.SCHEMA))}


def a_world_to_validate(place: Place) -> Given:
    return {"dataset": simulate(place.path / "world", test_validate.WORLD)}


def a_run(place: Place) -> Given:
    return a_folder(place) | {"run": test_steps.made(place.path, place.patch)}


# ---------------------------------------------------------------- leaks


def read_until_the_days_end(patch: Patch) -> None:
    """Both the parts that are read and their ages are those of the day after."""
    reach, aged = daily_aggregates.reach_days, snapshots._aged
    patch.setattr(snapshots, "reach_days", lambda dataset, on: reach(dataset, on + ONE_DAY))
    patch.setattr(snapshots, "_aged", lambda table, on, days: aged(table, on + ONE_DAY, days))


def date_snapshots_a_day_early(patch: Patch) -> None:
    today = snapshots._today
    patch.setattr(snapshots, "_today", lambda instant: today(instant - ONE_DAY))


def cut_days_in_utc(patch: Patch) -> None:
    patch.setattr(writer, "day_of", lambda timestamp, utc_offset_hours: day_of(timestamp, 0))


def count_withheld_rows(module: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(module, "IN_HISTORY", tuple(Usage))


def count_the_item_among_its_siblings(patch: Patch) -> None:
    patch.setattr(snapshots, "_of_the_others", lambda counts, alike: counts.sum().over(alike))


def know_items_before_their_day(patch: Patch) -> None:
    patch.setattr(snapshots, "_born", lambda items, schema, on: items)


def read_what_is_written_later(patch: Patch) -> None:
    import feast

    read = feast.FeatureStore.get_historical_features
    patch.setattr(
        feast.FeatureStore,
        "get_historical_features",
        lambda store, entity_df, features, **_: read(store, entity_df, features),
    )


def join_the_next_row(patch: Patch) -> None:
    joined = FeatureStore._offline

    def later(store: FeatureStore, entity: Entity, frame: pl.DataFrame) -> pl.DataFrame:
        return joined(store, entity, frame.with_columns(pl.col(EVENT_TIMESTAMP) + ONE_DAY))

    patch.setattr(FeatureStore, "_offline", later)


def know_content_from_the_start(patch: Patch) -> None:
    dated = feature_store._timestamps
    always = pl.lit(feature_store.ALWAYS, dtype=pl.Datetime("us", "UTC")).alias(EVENT_TIMESTAMP)
    patch.setattr(feature_store, "_timestamps", lambda entity: [always, *dated(entity)[1:]])


def serve_tomorrows_snapshot(patch: Patch) -> None:
    materialize = FeatureStore.materialize
    patch.setattr(FeatureStore, "materialize", lambda store, run_date: materialize(store, run_date + ONE_DAY))


def read_as_of_the_last_impression(patch: Patch) -> None:
    patch.setattr(frames, "_first_shown", lambda log, *keys: log.group_by(keys).agg(pl.col(EVENT_TIMESTAMP).max()))


def count_the_days_own_exposures(patch: Patch) -> None:
    count = frames.Exposures.count
    patch.setattr(frames.Exposures, "count", lambda counted, rows, on: count(counted, rows, on + ONE_DAY))


def count_an_hour_ahead(patch: Patch) -> None:
    """The counters of an hour hold the hour that begins with it."""
    counted = hourly.hour_counters

    def ahead(dataset: Dataset, hours: list[datetime]) -> pl.DataFrame:
        later = counted(dataset, [hour + HOUR for hour in hours])
        return later.with_columns(pl.col("snapshot_timestamp", snapshots.CREATED) - HOUR)

    patch.setattr(hourly, "hour_counters", ahead)


def forget_the_delay(patch: Patch) -> None:
    patch.setattr(hourly, "delay", lambda schema: timedelta())


def compare_with_later_days(patch: Patch) -> None:
    trailing = validate._trailing
    patch.setattr(validate, "_trailing", lambda dataset, on, config: [*trailing(dataset, on, config), on + ONE_DAY])


def train_up_to_the_run(patch: Patch) -> None:
    """The training days do not make room for those that calibrate and judge."""

    def split(windows: WindowConfig, run_date: date) -> Split:
        honest = honestly(windows, run_date)
        train = days(run_date - windows.train_days * ONE_DAY, run_date - ONE_DAY)
        return honest.model_copy(update={"train": tuple(train)})

    honestly = WindowConfig.split
    patch.setattr(WindowConfig, "split", split)


def judge_on_the_day_of_the_run(patch: Patch) -> None:
    split = WindowConfig.split
    patch.setattr(WindowConfig, "split", lambda windows, run_date: split(windows, run_date + ONE_DAY))


def calibrate_on_the_judged_days(patch: Patch) -> None:
    split = steps._split

    def swapped(run: Run, windows: str) -> Split:
        honest = split(run, windows)
        return honest.model_copy(update={"calibration": honest.evaluation})

    patch.setattr(steps, "_split", swapped)


def learn_from_withheld_rows(module: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(module, "IN_TRAINING", tuple(Usage))


def compare_with_what_serves_now(patch: Patch) -> None:
    def champion(run: Run) -> Champion | None:
        repository = ModelRepository(run.workspace.triton)
        pointer = repository.served()
        return champion_module._champion(run, repository, pointer.version) if pointer else None

    patch.setattr(champion_module, "champion", champion)


def read_the_label_as_context(patch: Patch) -> None:
    rows = Encoder._rows

    def knowing(encoder: Encoder, frame: Frame) -> Any:
        label = (10 * pl.col("click")).cast(pl.Float32).alias("hour")
        return rows(encoder, replace(frame, rows=frame.rows.with_columns(label)))

    patch.setattr(Encoder, "_rows", knowing)


# ---------------------------------------------------------------- the product's own checks

DAY = test_validate.DAY
RUN_DATE = test_validate.RUN_DATE


def validation_of_newborn_items(dataset: Dataset) -> None:
    """Great Expectations looks at the snapshot of the last day, on which items were born, and blocks what it must."""
    births = dataset.items().select("item_id", "created_at")
    snapshot = snapshots_of(dataset, [DAY])[DAY][Entity.ITEM].join(births, on="item_id")
    validate.validate_day(dataset, RUN_DATE, snapshot).raise_if_blocked()


def validation_of_a_day_before_another(tmp_path: Path) -> None:
    """Half an hour after midnight belongs to the day that begins."""
    log = [impression(1, 1, 5, 1, 1), impression(1, 2, 5), impression(2, 1, 5, hour=0.5)]
    validate.validate_day(write_log(tmp_path / "data", log), day(2)).raise_if_blocked()


def plausibility_of_a_trained_ranker() -> None:
    """The gate looks at a ranker's answers to rows that it was not trained on."""
    schema = tiny_schema()
    seen, judged_on = (random_frame(schema, seed, rows=2000) for seed in (0, 1))
    fit = TrainingConfig(batch_size=64, epochs=2, learning_rate=1e-2, device="cpu")
    ranker = train_ranker(seen, seen.items, schema, test_ranker.SMALL, PLAIN, fit)
    answers = sigmoid(predict(ranker, judged_on, judged_on.items))
    rows, config = judged_on.rows, EvaluationConfig(bootstrap=20)
    columns = (rows[name].to_numpy() for name in ("user_id", "judged_age_days", "exposures", "item_id"))
    ours = JudgedRows(answers, answers @ schema.utilities, labels_of(judged_on, schema), *columns)
    verdict = judge(compare(ours, ours, schema, config), evaluate(ours, schema, config), GateConfig(), 0.0)
    plausible = [reason for reason in verdict.reasons if reason.check.startswith("plausibility")]
    assert [reason.passed for reason in plausible] == [True, True], plausible


LEAKS = [
    Leak(
        "a window includes the day itself",
        read_until_the_days_end,
        test_snapshots.test_a_log_that_grows_every_day_agrees_with_a_count_by_hand,
        a_folder,
        says='value mismatch for column "user_impressions_1d"',
    ),
    Leak(
        "the same, seen by validation of newborn items",
        read_until_the_days_end,
        validation_of_newborn_items,
        a_world_to_validate,
        error=ValidationFailed,
        says="no history at or before its creation",
    ),
    Leak(
        "a snapshot stands for the day before its own",
        date_snapshots_a_day_early,
        test_snapshots.test_a_snapshot_stands_for_local_midnight,
        a_folder,
        says=r"2024, 2, 29, 22, 0.* == .*2024, 3, 1, 22, 0",
    ),
    Leak(
        "days are cut in UTC and not on the schema's calendar",
        cut_days_in_utc,
        test_snapshots.test_moving_an_impression_to_the_day_itself_takes_it_out_of_the_snapshot,
        a_folder,
        says=r"\[2.0, 2.0\] == \[2, 1\]",
    ),
    Leak(
        "the same, seen by validation of the day",
        cut_days_in_utc,
        validation_of_a_day_before_another,
        a_folder,
        error=ValidationFailed,
        says="every impression happened on",
    ),
    Leak(
        "daily counters count withheld rows",
        count_withheld_rows(daily_aggregates),
        test_snapshots.test_withheld_impressions_are_in_no_counter,
        a_folder,
        says="3.0 == 2",
    ),
    Leak(
        "an item is its own sibling",
        count_the_item_among_its_siblings,
        test_siblings.test_an_item_is_given_the_shrunk_rate_of_the_others_of_its_category,
        a_folder,
        says=r"\[3.0, 3.0, 1.0\] == \[2, 1, 0\]",
    ),
    Leak(
        "an item has siblings before the day it is born on",
        know_items_before_their_day,
        test_siblings.test_an_item_born_today_has_siblings_and_no_history,
        a_folder,
        says="one more item: 6",
    ),
    Leak(
        "a value is read before it was written",
        read_what_is_written_later,
        test_store.test_a_value_written_later_is_unknown_before_it_was_written,
        a_store("fresh", 4),
        says="90.0 != 3.0",
    ),
    Leak(
        "the point-in-time join takes the next row",
        join_the_next_row,
        test_store.test_an_impression_sees_the_snapshot_of_its_own_day_from_midnight_on,
        a_store("applied", 1, 2, 3),
        says=r"\[3.0, 3.0, 2.0\] == \[2.0, 2.0, 1.0\]",
    ),
    Leak(
        "content is known before the item is created",
        know_content_from_the_start,
        test_store.test_content_is_unknown_before_an_item_is_created,
        a_store("applied", 3),
        says="30 != None",
    ),
    Leak(
        "the online store holds tomorrow's snapshot",
        serve_tomorrows_snapshot,
        test_hourly.test_a_served_frame_equals_the_trainers_while_the_hour_stands,
        a_morning,
        says='value mismatch for column "item_impressions_1d"',
    ),
    Leak(
        "users and items are read as of their last impression of the day",
        read_as_of_the_last_impression,
        test_frames.test_what_is_written_during_a_day_reaches_none_of_its_impressions,
        a_folder,
        says="90.0 != 1.0",
    ),
    Leak(
        "exposures count the day itself",
        count_the_days_own_exposures,
        test_frames.test_exposures_count_earlier_days_that_feed_history,
        a_frame,
        says="3 != 1",
    ),
    Leak(
        "hourly counters run an hour ahead in training",
        count_an_hour_ahead,
        test_hourly.test_training_replays_what_was_pushed_for_every_impression,
        an_evening,
        says='value mismatch for column "item_impressions_24h"',
    ),
    Leak(
        "training reads an hour's counters before they were pushed",
        forget_the_delay,
        test_hourly.test_an_impression_reads_the_hour_that_was_online_by_then,
        a_morning,
        says="0.0 != None",
    ),
    Leak(
        "hourly counters count withheld rows",
        count_withheld_rows(hourly),
        test_hourly.test_an_hour_counts_the_24_full_hours_before_it,
        an_unbuilt_morning,
        says=r"\(4.0, 2.0, .* != \(3, 1, ",
    ),
    Leak(
        "validation compares with later days",
        compare_with_later_days,
        test_validate.test_a_later_day_changes_nothing,
        a_world_to_validate,
        says="ValidationRep.* == ValidationRep",
    ),
    Leak(
        "the training days reach up to the run's date",
        train_up_to_the_run,
        test_windows.test_the_parts_of_a_window_follow_each_other_without_a_day_in_common_and_end_before_the_run,
        nothing,
        says=r"date\(2024, 3, 1\) != datetime.date\(2024, 2, 28\)",
    ),
    Leak(
        "the day of the run is judged",
        judge_on_the_day_of_the_run,
        test_windows.test_the_parts_of_a_window_follow_each_other_without_a_day_in_common_and_end_before_the_run,
        nothing,
        says=r"date\(2024, 2, 29\) != datetime.date\(2024, 2, 28\)",
    ),
    Leak(
        "the training step reads the days that judge it",
        train_up_to_the_run,
        test_steps.test_a_ranker_is_trained_without_the_log_of_the_days_that_calibrate_and_judge_it,
        a_run,
        error=FileNotFoundError,
        says=f"date={test_steps.WORLD.last_day}",
    ),
    Leak(
        "calibration is fitted on the days that are judged",
        calibrate_on_the_judged_days,
        test_steps.test_a_ranker_is_calibrated_without_the_log_of_the_days_that_judge_it,
        a_run,
        error=FileNotFoundError,
        says=f"date={test_steps.WORLD.last_day}",
        slow=True,
    ),
    Leak(
        "weights, vocabularies and statistics are fitted on withheld rows",
        learn_from_withheld_rows(stream),
        test_steps.test_withheld_impressions_are_neither_trained_on_nor_in_a_vocabulary,
        a_folder,
        says="5 == 3",
    ),
    Leak(
        "the same where training is streamed",
        learn_from_withheld_rows(shards),
        test_steps.test_withheld_impressions_are_neither_trained_on_nor_in_a_vocabulary,
        a_folder,
        says=r"\[3, 2\] == \[2, 1\]",
    ),
    Leak(
        "a label is among the inputs, seen by the gate",
        read_the_label_as_context,
        plausibility_of_a_trained_ranker,
        nothing,
        says="PR-AUC of 'click' is",
        slow=True,
    ),
    Leak(
        "the champion was trained on rows it is judged on",
        compare_with_what_serves_now,
        test_judgement.test_the_champion_of_a_day_is_the_newest_version_of_an_earlier_date_whatever_serves,
        a_folder_and_an_environment,
        says=r"== \[2, 3, 1, None\]",
    ),
]


every_leak = pytest.mark.parametrize(
    "leak", [pytest.param(leak, id=leak.name, marks=[pytest.mark.slow] * leak.slow) for leak in LEAKS]
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: Patch) -> Iterator[Place]:
    yield Place(tmp_path, monkeypatch)
    settings.cache_clear()


@every_leak
def test_with_the_leak_the_test_fails(leak: Leak, place: Place) -> None:
    """By what it asserts, and not because the leak broke something else."""
    leak.put_in(place.patch)
    given = leak.given(place)
    with pytest.raises(leak.error, match=leak.says):
        leak.caught_by(**given)


@pytest.mark.slow
@every_leak
def test_without_the_leak_it_passes(leak: Leak, place: Place) -> None:
    """Given the very same; the suite runs most of them anyway, with their own fixtures."""
    leak.caught_by(**leak.given(place))


def test_the_page_names_every_leak_and_its_test() -> None:
    """The table of docs/features.md, row by row."""
    page = (PROJECT_ROOT / "docs" / "features.md").read_text()
    assert [row for row in map(row_of, LEAKS) if row not in page] == []


def row_of(leak: Leak) -> str:
    return f"| {leak.name} | `{leak.test}` |"
