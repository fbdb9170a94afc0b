"""Data validation: a good day passes, and every kind of bad day is stopped or warned of in words that help."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from freshrank.config import Severity, ValidationConfig
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.errors import ConfigError, DataError, ValidationFailed
from freshrank.recipes import recipe
from freshrank.reports.validation_page import write_data_docs, write_pages, write_validation_page
from freshrank.schema import Entity, FeatureGroup, Kind
from freshrank.validation.expectations import Coverage, coverage_checks, names
from freshrank.validation.validate import ExpectationResult, Validation, ValidationReport, inspect_day, validate_day
from tests.tiny_log import snapshots_of

WORLD = WorldConfig(days=9, users=300, items_at_start=300, new_items_per_day=30, impressions_per_day=1_200)
DAY = WORLD.last_day
RUN_DATE = DAY + timedelta(days=1)
Change = Callable[[pl.DataFrame], pl.DataFrame]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulate(tmp_path_factory.mktemp("clean") / "world", WORLD)


@pytest.fixture
def dataset(clean: Dataset, tmp_path: Path) -> Iterator[Dataset]:
    """A copy to spoil."""
    shutil.copytree(clean.path, tmp_path / "world")
    yield Dataset.open(tmp_path / "world")
    shutil.rmtree(tmp_path / "world")


def spoil(dataset: Dataset, change: Change, day: date = DAY) -> None:
    """Rewrite a day's partition behind the importer's back."""
    frame = pl.read_parquet(dataset.partition(day))
    change(frame).write_parquet(dataset.partition(day))


def spoil_items(dataset: Dataset, *change: pl.Expr) -> None:
    dataset.items().with_columns(*change).write_parquet(dataset.path / "items.parquet")


def failed(report: ValidationReport, severity: Severity = Severity.BLOCKING) -> dict[str, ExpectationResult]:
    return {result.name: result for result in report.failures(severity)}


def first(rows: int, value: object, otherwise: str) -> pl.Expr:
    """``value`` in the first rows of a column, what it held in the others."""
    return pl.when(pl.int_range(pl.len()) < rows).then(pl.lit(value)).otherwise(pl.col(otherwise)).alias(otherwise)


def fresh_ids(dataset: Dataset) -> list[int]:
    """Items that were fresh at some time of the validated day."""
    born = datetime.combine(DAY, datetime.min.time(), UTC) - timedelta(days=WORLD.fresh_days)
    return dataset.items().filter(pl.col("created_at") >= born)["item_id"].to_list()


def test_a_clean_day_passes_without_a_warning(clean: Dataset) -> None:
    """Every expectation holds, each was really judged, and nothing is raised."""
    report = validate_day(clean, RUN_DATE)
    assert [str(result) for result in report.results if not result.success] == []
    assert (report.day, report.rows, len(report.trailing)) == (DAY, 1_200, 7)
    assert 0 < report.fresh_rows < report.rows
    report.raise_if_blocked()


def test_the_report_survives_json(clean: Dataset) -> None:
    """What is written to disk reads back equal, and is the same when the day is validated again."""
    report = validate_day(clean, RUN_DATE)
    assert ValidationReport.model_validate_json(report.model_dump_json()) == report
    assert validate_day(clean, RUN_DATE) == report


def test_every_name_comes_from_the_schema(clean: Dataset) -> None:
    """Each action has its label, positives and rate expectations; each content column its coverage, per cohort."""
    report = validate_day(clean, RUN_DATE)
    names = [result.name for result in report.results]
    for action in clean.schema.actions:
        expected = {f"{action}_is_label", f"{action}_has_positives", f"{action}_like_trailing_week"}
        assert expected <= set(names)
    covered = {(result.table, result.column) for result in report.results if result.name.endswith("_covered")}
    content = {"category", "author", "tags", "duration", "embedding"}
    cohorts = ("fresh items", "warm items", *(f"items {age} days old" for age in ("0-1", "1-7", "7-28", "28+")))
    assert covered == {
        *((cohort, column) for cohort in cohorts for column in content),
        *(("impressions", column) for column in ("surface", "click", "save")),
    }


BROKEN_ROWS: list[tuple[str, Change, str, str]] = [
    (
        "label of 7",
        lambda log: log.with_columns(first(3, 7, "click").cast(pl.Int8)),
        "click_is_label",
        "label click is 0, 1 or null (not observed); observed 3 of 1,200 rows against it, expected 0 or 1; e.g. 7",
    ),
    (
        "null user",
        lambda log: log.with_columns(first(2, None, "user_id")),
        "user_id_present",
        "no impression lacks its user_id; observed 2 of 1,200 rows",
    ),
    ("null item", lambda log: log.with_columns(first(2, None, "item_id")), "item_id_present", "its item_id"),
    ("null request", lambda log: log.with_columns(first(1, None, "request_id")), "request_id_present", "1 of 1,200"),
    ("null time", lambda log: log.with_columns(first(1, None, "event_timestamp")), "event_timestamp_present", "1 of"),
    (
        "logged twice",
        lambda log: pl.concat([log, log.head(5)]),
        "no_duplicates",
        "no impression is logged twice; observed 10 of 1,205 rows",
    ),
    (
        "yesterday's rows",
        lambda log: log.with_columns(pl.col("event_timestamp") - timedelta(days=1)),
        "inside_the_day",
        f"every impression happened on {DAY}; observed 1,200 of 1,200 rows",
    ),
    (
        "midnight of tomorrow",
        lambda log: log.with_columns(first(1, datetime.combine(RUN_DATE, datetime.min.time(), UTC), "event_timestamp")),
        "inside_the_day",
        "observed 1 of 1,200 rows",
    ),
    (
        "nobody saved",
        lambda log: log.with_columns(pl.lit(0, pl.Int8).alias("save")),
        "save_has_positives",
        "somebody did save; observed 0, expected at least 1",
    ),
    (
        "save not observed",
        lambda log: log.with_columns(pl.lit(None, pl.Int8).alias("save")),
        "save_has_positives",
        "somebody did save",
    ),
    (
        "everybody clicked",
        lambda log: log.with_columns(pl.lit(1, pl.Int8).alias("click")),
        "click_like_trailing_week",
        "the positive rate of click is like the trailing week's 0.",
    ),
    (
        "a tenth of the log",
        lambda log: log.head(120),
        "volume_like_trailing_week",
        "the number of impressions is like the trailing week's 1,200; observed 120, expected 240 .. 6,000",
    ),
    ("the log ten times", lambda log: pl.concat([log] * 10), "volume_like_trailing_week", "observed 12,000"),
    (
        "labels not joined",
        lambda log: log.with_columns(first(700, None, "click").cast(pl.Int8)),
        "click_covered",
        "click of impressions is filled as in the trailing week (100.0%); observed 0.4167, expected at least 50.0%",
    ),
    (
        "an hour too late",
        lambda log: log.with_columns(pl.col("event_timestamp") + timedelta(hours=1)),
        "inside_the_day",
        f"every impression happened on {DAY}",
    ),
    (
        "context gone",
        lambda log: log.with_columns(first(700, None, "surface")),
        "surface_covered",
        "surface of impressions is filled as in the trailing week (100.0%); observed 0.4167, expected at least 50.0%",
    ),
    ("no rows", lambda log: log.clear(), "day_has_impressions", "observed 0 rows, expected at least 1 row"),
    ("a column less", lambda log: log.drop("save"), "columns_present", "impressions.save: every column of schema.yaml"),
]


@pytest.mark.parametrize(
    ("change", "name", "words"), [case[1:] for case in BROKEN_ROWS], ids=[c[0] for c in BROKEN_ROWS]
)
def test_a_broken_log_blocks(dataset: Dataset, change: Change, name: str, words: str) -> None:
    """The expectation that was made for it fails, and the error says where, what was seen and what was expected."""
    spoil(dataset, change)
    report = validate_day(dataset, RUN_DATE)
    assert name in failed(report)
    assert words in str(failed(report)[name])
    with pytest.raises(ValidationFailed, match=f"{DAY} must not be trained on"):
        report.raise_if_blocked()


def test_a_missing_day_blocks_and_says_which_days_there_are(clean: Dataset) -> None:
    """The run for the day after tomorrow finds no partition."""
    report = validate_day(clean, RUN_DATE + timedelta(days=1))
    assert str(failed(report)["day_has_impressions"]) == (
        f"impressions: {RUN_DATE} holds impressions to judge and train on; observed no partition; the log holds "
        f"{WORLD.first_day} .. {DAY}, expected at least 1 row"
    )


def test_a_file_that_is_not_parquet_blocks(dataset: Dataset) -> None:
    """A torn file is a finding, not a traceback."""
    dataset.partition(DAY).write_bytes(b"torn")
    report = validate_day(dataset, RUN_DATE)
    assert "a file that is not Parquet" in str(failed(report)["day_has_impressions"])


def test_an_item_shown_before_its_creation_blocks(dataset: Dataset) -> None:
    """All items born after the day: each impression sees the future."""
    spoil_items(dataset, pl.lit(datetime.combine(RUN_DATE, datetime.min.time(), UTC)).alias("created_at"))
    assert "no item is shown before it was created; observed 1,200 of 1,200" in str(
        failed(validate_day(dataset, RUN_DATE))["born_before_shown"]
    )


def test_a_day_without_fresh_items_blocks(dataset: Dataset) -> None:
    """The export lost the new items: the table is in order, its fresh cohort is gone."""
    ids = fresh_ids(dataset)
    spoil(dataset, lambda log: log.filter(~pl.col("item_id").is_in(ids)))
    problem = failed(validate_day(dataset, RUN_DATE))["fresh_like_trailing_week"]
    assert "the share of fresh impressions is like the trailing week's" in problem.sentence
    assert problem.observed == "0"


def test_a_launch_warns_but_does_not_block(dataset: Dataset) -> None:
    """Far more fresh impressions than usual are allowed: that is what a launch looks like."""
    ids = fresh_ids(dataset)
    spoil(
        dataset,
        lambda log: (
            log.filter(pl.col("item_id").is_in(ids))
            .sample(1_200, with_replacement=True, seed=0)
            .with_columns(pl.int_range(pl.len()).alias("request_id"))
        ),
    )
    report = validate_day(dataset, RUN_DATE)
    assert report.passed
    assert "fresh_like_trailing_week" in failed(report, Severity.WARNING)


def test_fresh_items_without_content_block_even_when_the_table_looks_filled(dataset: Dataset) -> None:
    """The items of three days came without an embedding: only the fresh cohorts show it."""
    lost = pl.col("created_at") >= datetime.combine(DAY - timedelta(days=2), datetime.min.time(), UTC)
    spoil_items(dataset, pl.when(~lost).then(pl.col("embedding")).alias("embedding"))
    report = validate_day(dataset, RUN_DATE, config=ValidationConfig(block_coverage=0.9))
    blocking = [(one.table, one.column) for one in report.failures(Severity.BLOCKING)]
    tables = ("fresh items", "items 0-1 days old", "items 1-7 days old")
    assert blocking == [(table, "embedding") for table in tables]


def test_items_of_the_day_without_content_block_in_their_bucket_of_age_alone(dataset: Dataset) -> None:
    """Two days' items came without embeddings: 60 of some 200 fresh items, for which all of these would only warn."""
    lost = pl.col("created_at") >= datetime.combine(DAY - timedelta(days=1), datetime.min.time(), UTC)
    spoil_items(dataset, pl.when(~lost).then(pl.col("embedding")).alias("embedding"))
    report = validate_day(dataset, RUN_DATE)
    assert [(one.table, one.column) for one in report.failures(Severity.BLOCKING)] == [
        ("items 0-1 days old", "embedding")
    ]
    (coverage,) = [one for one in report.coverage if (one.table, one.column) == ("items 0-1 days old", "embedding")]
    assert coverage.share is not None
    assert coverage.reference is not None
    assert coverage.share < 0.5 < coverage.reference


def test_a_column_that_the_items_lost_altogether_warns(dataset: Dataset) -> None:
    """Of the week before it is lost as well, so there is nothing to compare with."""
    spoil_items(dataset, pl.lit(None, pl.Float32).alias("duration"))
    warned = failed(validate_day(dataset, RUN_DATE), Severity.WARNING)["duration_covered"]
    assert (
        str(warned)
        == "warm items.duration: duration of warm items holds values at all; observed 0, expected more than 0"
    )


@pytest.mark.parametrize(
    ("usual", "rows", "lowest"),
    [(1.0, 20, 0.5), (0.2, 100, 0.08), (0.05, 20, None), (0.0, 100, None)],
    ids=["always filled", "three standard errors of 4% below 20%", "one of twenty may be none", "never filled"],
)
def test_a_share_of_few_rows_may_fall_by_chance(usual: float, rows: int, lowest: float | None) -> None:
    """The bound is half the usual share, or three standard errors below it where that is lower."""
    one = Coverage(table="fresh items", column="tags", rows=rows, share=0, reference_rows=1000, reference=usual)
    checks = list(coverage_checks([one], ValidationConfig()))
    bounds = [check.arguments["min_value"] for check in checks if check.severity is Severity.BLOCKING]
    assert bounds == ([] if lowest is None else [pytest.approx(lowest)])


@pytest.mark.parametrize(
    ("usual", "rows", "filled", "blocks"),
    [
        (0.685, 17, 0, True),
        (0.685, 17, 4, True),
        (0.685, 17, 6, False),
        (0.685, 5, 0, False),
        (1.0, 5, 0, True),
        (1.0, 4, 0, False),
        (0.05, 17, 0, False),
    ],
    ids=[
        "none of 17 against 68.5%",
        "4 of 17",
        "6 of 17 are one day in forty",
        "none of 5 is one day in 300",
        "none of 5 where a thousand never lacked it",
        "four are not judged",
        "none of 17 against 5%",
    ],
)
def test_a_small_group_is_judged_by_what_chance_leaves(usual: float, rows: int, filled: int, blocks: bool) -> None:
    """Fewer filled values than a binomial of the usual share has once in a thousand days block."""
    one = Coverage(
        table="fresh items", column="title", rows=rows, share=filled / rows, reference_rows=1500, reference=usual
    )
    bounds = [
        check.arguments["min_value"]
        for check in coverage_checks([one], ValidationConfig())
        if check.severity is Severity.BLOCKING
    ]
    assert any(filled / rows < bound for bound in bounds) == blocks


def test_a_reference_of_few_rows_judges_nobody() -> None:
    """19 rows in a week say too little of what is usual."""
    one = Coverage(table="fresh items", column="title", rows=17, share=0, reference_rows=19, reference=1.0)
    assert not list(coverage_checks([one], ValidationConfig()))


def test_a_severity_that_is_none_is_refused_by_name() -> None:
    """Field, value and what can be said."""
    expected = r"^validation\.severity\.title_covered: received 'fatal', expected 'blocking', 'warning' or 'off'$"
    with pytest.raises(ConfigError, match=expected):
        recipe(overrides=['validation.severity={"title_covered": "fatal"}'])


def test_a_misspelt_expectation_is_answered_with_the_nearest(clean: Dataset) -> None:
    """One letter too few."""
    with pytest.raises(ConfigError, match=r"did you mean click_like_trailing_week\?"):
        validate_day(clean, RUN_DATE, config=ValidationConfig(severity={"clik_like_trailing_week": "off"}))


def test_the_page_says_what_was_not_asked_without_features(clean: Dataset, tmp_path: Path) -> None:
    """The leak detector needs snapshots; with them nothing is left to say."""
    without, asked = validate_day(clean, RUN_DATE), validate_day(clean, RUN_DATE, history_of(clean, 0.0, 1.0))
    write_validation_page(without, tmp_path / "page.html")
    assert f"{len(without.unasked)} expectations about features were not asked" in (tmp_path / "page.html").read_text()
    assert set(without.unasked) == {one.name for one in asked.results if one.table == "item_history"}
    assert asked.notes == []


def test_an_empty_list_of_tags_is_a_missing_value(dataset: Dataset) -> None:
    """Coverage counts values, not non-null cells: the newest items have lists without a tag."""
    born = datetime.combine(DAY - timedelta(days=1), datetime.min.time(), UTC)
    tags = pl.when(pl.col("created_at") < born).then(pl.col("tags")).otherwise(pl.lit([], pl.List(pl.Int64)))
    spoil_items(dataset, tags.alias("tags"))
    report = validate_day(dataset, RUN_DATE)
    warned = [(one.table, one.column) for one in report.failures(Severity.WARNING)]
    assert ("fresh items", "tags") in warned
    assert ("warm items", "tags") not in warned


def test_freshness_is_counted_from_the_judged_creation(dataset: Dataset) -> None:
    """An item's fresh days start at ``judged_created_at`` where there is one: not before it, and not at its upload."""
    noon = datetime.combine(DAY, datetime.min.time(), UTC) + timedelta(hours=12)
    spoil_items(dataset, pl.lit(noon).alias("judged_created_at"))
    after_noon = dataset.impressions([DAY]).filter(pl.col("event_timestamp") >= noon).collect()
    assert validate_day(dataset, RUN_DATE).fresh_rows == len(after_noon)


def test_unknown_items_warn(dataset: Dataset) -> None:
    """Two per cent of the rows show an item the items table does not know: written down, not stopped."""
    row = pl.int_range(pl.len())
    unknown = pl.when(row < 24).then(row + 1_000_000).otherwise(pl.col("item_id")).alias("item_id")
    spoil(dataset, lambda log: log.with_columns(unknown))
    report = validate_day(dataset, RUN_DATE)
    assert report.passed
    result = failed(report, Severity.WARNING)["items_known"]
    assert result.observed == "24 of 1,200 rows against it"
    assert set(result.examples) < {str(1_000_000 + n) for n in range(24)}
    assert len(result.examples) == 5


def test_a_warning_does_not_block(dataset: Dataset) -> None:
    """A third of the volume is worth a look, and may be trained on."""
    spoil(dataset, lambda log: log.head(400))
    report = validate_day(dataset, RUN_DATE)
    assert "volume_like_trailing_week" in failed(report, Severity.WARNING)
    report.raise_if_blocked()


LATE = datetime.combine(DAY, datetime.min.time(), UTC) + timedelta(hours=18)


def test_labels_that_were_joined_too_early_block(dataset: Dataset) -> None:
    """No click of the last six hours has arrived: the day's rate falls by a quarter only, that of these hours to 0."""
    arrived = pl.when(pl.col("event_timestamp") < LATE).then(pl.col("click")).otherwise(0).cast(pl.Int8).alias("click")
    spoil(dataset, lambda log: log.with_columns(arrived))
    problem = failed(validate_day(dataset, RUN_DATE))
    assert list(problem) == ["late_click_like_trailing_week"]
    assert problem["late_click_like_trailing_week"].observed == "0"
    assert "the positive rate of click in the last 6 hours" in str(problem["late_click_like_trailing_week"])


def test_a_slow_day_is_no_late_one(dataset: Dataset) -> None:
    """Every third click is gone at all hours: nothing points at the join."""
    fewer_clicks = (
        pl.when(pl.int_range(pl.len()) % 3 > 0).then(pl.col("click")).otherwise(0).cast(pl.Int8).alias("click")
    )
    spoil(dataset, lambda log: log.with_columns(fewer_clicks))
    report = validate_day(dataset, RUN_DATE)
    assert not [one for one in report.results if one.name.startswith("late_") and not one.success]


def test_a_log_without_times_of_day_has_no_late_hours(dataset: Dataset) -> None:
    """All rows at midnight, as in logs that only know the date: nothing is compared."""
    for day in dataset.days:
        spoil(dataset, lambda log: log.with_columns(pl.col("event_timestamp").dt.truncate("1d")), day)
    assert not [one for one in validate_day(dataset, RUN_DATE).results if one.name.startswith("late_")]


def test_a_named_expectation_blocks_warns_or_is_left_out(dataset: Dataset) -> None:
    """A third of the volume warns; the same day blocks, or says nothing, as the configuration wants it."""
    spoil(dataset, lambda log: log.head(400))
    name = "volume_like_trailing_week"
    reports = {
        severity: validate_day(dataset, RUN_DATE, config=ValidationConfig(severity={name: severity}))
        for severity in (Severity.BLOCKING, Severity.WARNING, "off")
    }
    assert name in failed(reports[Severity.BLOCKING])
    assert reports[Severity.WARNING].passed
    assert name in failed(reports[Severity.WARNING], Severity.WARNING)
    assert not [one for one in reports["off"].results if one.name == name]
    assert reports["off"].switched_off == (name,)


def test_an_unknown_expectation_is_refused_with_the_known_ones(clean: Dataset) -> None:
    """A misspelt name would silently change nothing."""
    with pytest.raises(ConfigError, match=r"validation\.severity: received \['volumes'\].*'volume_like_trailing_week'"):
        validate_day(clean, RUN_DATE, config=ValidationConfig(severity={"volumes": "off"}))


def test_every_expectation_can_be_named(clean: Dataset) -> None:
    """The names of a report with all its tables are the names that are known."""
    report = validate_day(clean, RUN_DATE, history_of(clean, 0.0, 1.0))
    assert {result.name for result in report.results} == set(names(clean.schema))


def test_rows_of_the_day_and_of_the_import_are_counted(dataset: Dataset) -> None:
    """Five rows twice, three of the evening before, two of tomorrow; two durations that the import read as null."""
    one_day = pl.when(pl.int_range(pl.len()) < 3).then(-1).when(pl.int_range(pl.len()) < 5).then(1).otherwise(0)
    moved = (pl.col("event_timestamp") + pl.duration(days=one_day)).alias("event_timestamp")
    spoil(dataset, lambda log: pl.concat([log.with_columns(moved), log.tail(5)]))
    counted = replace(dataset, manifest=dataset.manifest | {"counts": {"items.duration: NaN read as null": 2}})
    report = validate_day(counted, RUN_DATE)
    assert report.day_counts == {
        "rows that the import wrote": 1_200,
        "rows in the partition": 1_205,
        "rows that only feed history (not judged)": 0,
        "rows that repeat an earlier one": 5,
        "late rows (of an earlier day)": 3,
        "early rows (of a later day)": 2,
    }
    assert report.import_counts == {"items.duration: NaN read as null": 2}


def test_rows_that_only_feed_history_are_not_judged(dataset: Dataset) -> None:
    """Backfilled rows have no labels to look at: 600 of them leave 600 rows to validate."""
    spoil(dataset, lambda log: log.with_columns(first(600, "history", "usage"), first(600, None, "click")))
    report = validate_day(dataset, RUN_DATE)
    assert report.rows == 600
    assert report.passed


def test_days_that_only_feed_history_are_no_reference(dataset: Dataset) -> None:
    """A log that begins with backfilled days compares its first real days with each other alone."""
    for day in dataset.days[:-2]:
        spoil(dataset, lambda log: log.with_columns(pl.lit("history").alias("usage")), day)
    assert validate_day(dataset, RUN_DATE).trailing == (DAY - timedelta(days=1),)
    assert validate_day(dataset, DAY).trailing == ()


def test_the_first_day_of_a_log_has_nothing_to_be_compared_with(clean: Dataset) -> None:
    """It is judged on its contract alone."""
    report = validate_day(clean, WORLD.first_day + timedelta(days=1))
    assert report.passed
    assert report.trailing == ()
    assert not [one for one in report.results if one.name.endswith(("_like_trailing_week", "_covered"))]


def test_a_later_day_changes_nothing(dataset: Dataset) -> None:
    """A spoiled day after the validated one is not looked at."""
    before = validate_day(dataset, DAY)
    spoil(dataset, lambda log: log.head(1))
    assert validate_day(dataset, DAY) == before


def history_of(dataset: Dataset, impressions: float, hours_before_birth: float) -> pl.DataFrame:
    """One snapshot row of item 1, taken some hours before its creation, with a counter of ``impressions``."""
    features = dataset.schema.select(Entity.ITEM, Kind.NUMERIC, stored=True)
    counters = {one.name: [0.0] for one in features if one.group is FeatureGroup.HISTORICAL}
    born = datetime(2024, 1, 5, 12, tzinfo=UTC)
    taken = born - timedelta(hours=hours_before_birth)
    rows = {"item_id": [1], "created_at": [born], "snapshot_timestamp": [taken], **counters}
    return pl.DataFrame(rows | {"item_impressions_1d": [impressions]})


def test_history_before_birth_is_a_leak_and_blocks(clean: Dataset) -> None:
    """Three impressions counted in a snapshot taken 12 hours before the item was created."""
    leaking = failed(validate_day(clean, RUN_DATE, history_of(clean, 3.0, 12.0)))
    assert list(leaking) == ["item_impressions_1d_empty_before_birth"]
    assert "an item has no history at or before its creation" in str(leaking["item_impressions_1d_empty_before_birth"])
    assert leaking["item_impressions_1d_empty_before_birth"].examples == ("3",)


@pytest.mark.parametrize(("impressions", "hours"), [(0.0, 12.0), (3.0, -12.0)])
def test_history_after_birth_or_empty_history_is_none(clean: Dataset, impressions: float, hours: float) -> None:
    """No counts before birth, or counts 12 hours after it, are as they should be."""
    assert validate_day(clean, RUN_DATE, history_of(clean, impressions, hours)).passed


def test_a_snapshot_that_counts_its_own_day_is_caught(clean: Dataset) -> None:
    """The real snapshots pass; dated one day early they hold the day they stand for, and newborn items show it."""
    births = clean.items().select("item_id", "created_at")
    snapshots = [frames[Entity.ITEM] for frames in snapshots_of(clean, [DAY, RUN_DATE]).values()]
    history = pl.concat(snapshots).join(births, on="item_id")
    assert validate_day(clean, RUN_DATE, history).passed
    early = history.with_columns(pl.col("snapshot_timestamp") - timedelta(days=1))
    assert "item_impressions_1d_empty_before_birth" in failed(validate_day(clean, RUN_DATE, early))


def test_item_history_without_its_snapshot_time_is_refused(clean: Dataset) -> None:
    """A caller's mistake names the missing columns."""
    with pytest.raises(DataError, match="snapshot_timestamp"):
        validate_day(clean, RUN_DATE, history_of(clean, 0.0, 1.0).drop("snapshot_timestamp"))


def test_the_error_fits_on_one_screen(dataset: Dataset) -> None:
    """However much is broken, at most 24 lines, with the worst of it and how to go on."""
    spoil(
        dataset,
        lambda log: log.with_columns(
            pl.lit(7, pl.Int8).alias("click"),
            pl.lit(9, pl.Int8).alias("save"),
            pl.lit(None, pl.Int64).alias("user_id"),
            pl.lit(None, pl.Int64).alias("item_id"),
            pl.lit(None, pl.Int64).alias("request_id"),
            pl.lit(None, pl.Int64).alias("surface"),
            pl.col("event_timestamp") - timedelta(days=2),
        ),
    )
    with pytest.raises(ValidationFailed) as caught:
        validate_day(dataset, RUN_DATE).raise_if_blocked()
    lines = str(caught.value).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) < 400
    assert "keeps serving" in lines[-1]
    assert "more; the validation page lists them all" in lines[-2]


def test_the_page_shows_failures_first_and_needs_no_network(dataset: Dataset, tmp_path: Path) -> None:
    """One file, verdict on top, blocking before warning before passed, text escaped."""
    spoil(dataset, lambda log: log.head(100))
    report = validate_day(dataset, RUN_DATE)
    path = tmp_path / "page" / "validation.html"
    write_validation_page(report, path)
    page = path.read_text()
    assert "<strong>Blocked.</strong>" in page
    assert page.index("✗ blocks") < page.index("! warns") < page.index("✓ passed")
    assert page.count("<tr class=") == len(report.results)
    assert not [outside for outside in ("http:", "https:", "<script", "<link", "src=") if outside in page]
    hostile = report.results[0].model_copy(update={"success": False, "examples": ("<b>x</b>",)})
    write_validation_page(report.model_copy(update={"results": (hostile,)}), path)
    assert "&lt;b&gt;x&lt;/b&gt;" in path.read_text()


def test_data_docs_hold_every_table_and_need_no_network(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Great Expectations' own words on a page per table, failures with what was found, linked with our page."""
    spoil(dataset, lambda log: log.with_columns(first(3, 7, "click").cast(pl.Int8)))
    inspected = inspect_day(dataset, RUN_DATE)
    write_pages(inspected, tmp_path / "out")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    docs = tmp_path / "out" / "data_docs"
    pages = {path.stem: path.read_text() for path in docs.glob("*.html")}
    tables = (
        "impressions",
        "fresh_items",
        "warm_items",
        *(f"items_{age}_days_old" for age in ("0_1", "1_7", "7_28", "28")),
    )
    assert set(pages) == {"index", *tables}
    for page in pages.values():
        assert not [wrong for wrong in ("np.", "Traceback", "../expectations") if wrong in page]
        assert not [outside for outside in ("http:", "https:", "<script", "<link", "src=") if outside in page]
    assert "values must belong to this set" in pages["impressions"]
    assert "3 unexpected values found" in pages["impressions"]
    assert 'href="impressions.html"' in pages["index"]
    assert 'href="data_docs/index.html"' in (tmp_path / "out" / "validation.html").read_text()
    assert 'href="../validation.html"' in pages["index"]


def test_data_docs_of_a_day_that_cannot_be_looked_at_say_so(clean: Dataset, tmp_path: Path) -> None:
    """No table was read, so there is an index alone."""
    write_pages(inspect_day(clean, RUN_DATE + timedelta(days=1)), tmp_path)
    assert [path.name for path in (tmp_path / "data_docs").iterdir()] == ["index.html"]
    assert "The day could not be looked at." in (tmp_path / "data_docs" / "index.html").read_text()


def test_data_docs_are_replaced_as_a_whole(clean: Dataset, tmp_path: Path) -> None:
    """The page of a table that the second validation does not have is gone; a failed write leaves the first."""
    inspected = inspect_day(clean, RUN_DATE)
    write_data_docs(inspected, tmp_path / "docs")
    one = Validation(inspected.report, {"impressions": inspected.suites["impressions"]})
    write_data_docs(one, tmp_path / "docs")
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"index.html", "impressions.html"}
    with pytest.raises(AttributeError):
        write_data_docs(Validation(inspected.report, {"impressions": None}), tmp_path / "docs")
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"index.html", "impressions.html"}
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_the_page_shows_what_is_filled_by_age(clean: Dataset, tmp_path: Path) -> None:
    """A row per column, a cell per bucket: today's share, the week's, the rows."""
    report = validate_day(clean, RUN_DATE)
    write_validation_page(report, tmp_path / "page.html")
    page = tmp_path.joinpath("page.html").read_text()
    assert "<th>items 0-1 days old</th>" in page
    (duration,) = [one for one in report.coverage if (one.table, one.column) == ("items 28+ days old", "duration")]
    assert f"{duration.share:.1%} ({duration.reference:.1%}) of {duration.rows}" in page


def test_validation_is_quiet(clean: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    """Great Expectations draws no progress bars and prints nothing."""
    validate_day(clean, RUN_DATE)
    assert capfd.readouterr() == ("", "")


def test_the_module_is_imported_without_great_expectations() -> None:
    """The command line stays quick: the seven seconds are paid by who validates."""
    import subprocess
    import sys

    code = "import sys, freshrank.validation.validate; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
