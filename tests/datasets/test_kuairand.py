"""KuaiRand: protocols on a log small enough to check by hand, then the published facts on the real slice."""

import os
import time
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.kuairand import PROTOCOLS, Protocol, clock_within_day, import_kuairand, interpolated_times
from freshrank.errors import ConfigError, DataError
from freshrank.schema import IN_EVALUATION, IN_TRAINING

SLICE = Path(os.environ.get("FRESHRANK_KUAIRAND", Path(__file__).parents[3] / "shared" / "data" / "kuairand"))
realdata = [
    pytest.mark.realdata,
    pytest.mark.skipif(not SLICE.exists(), reason=f"no KuaiRand slice at {SLICE}; set FRESHRANK_KUAIRAND"),
]
TRAIN = [date(2022, 4, 25) + timedelta(days=i) for i in range(10)]
EVALUATION = [date(2022, 5, 6) + timedelta(days=i) for i in range(3)]


def beijing(day: date, hour: float = 0) -> datetime:
    """UTC instant of a UTC+8 wall clock."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(hours=hour - 8)


def ms(day: date, hour: float) -> int:
    return int(beijing(day, hour).timestamp() * 1000)


def published(src: Path) -> Path:
    """The published CSV layout: video 0 is old, video 1 launches on 05-02; users 0 and 5.

    Of video 1's pairs, (5 * 7919 + 1 * 104729) % 100 = 24 is withheld and (0, 1) = 29 too; user 7 gives 62, user 4
    gives 5, user 9 gives 0: kept.
    """
    src.mkdir()
    rows = [
        (0, 0, 20220501, ms(date(2022, 5, 1), 9), 1, 0),
        (0, 0, 20220501, ms(date(2022, 5, 1), 9), 1, 0),
        (5, 1, 20220501, ms(date(2022, 5, 1), 10), 1, 1),
        (5, 1, 20220502, ms(date(2022, 5, 1), 23.5), 0, 0),
        (9, 1, 20220502, ms(date(2022, 5, 2), 8), 1, 1),
    ]
    names = ["user_id", "video_id", "date", "time_ms", "is_click", "long_view"]
    log = pl.DataFrame(rows, schema=names, orient="row").with_columns(hourmin=pl.lit(900), tab=pl.lit(1), is_like=0)
    early = [(0, 0, 20220408, ms(date(2022, 4, 8), 9), 1, 0), (0, 0, 20220410, ms(date(2022, 4, 10), 9), 1, 1)]
    first = pl.DataFrame(early, schema=names, orient="row").with_columns(hourmin=pl.lit(900), tab=pl.lit(1), is_like=0)
    first.write_csv(src / "log_standard_4_08_to_4_21_pure.csv")
    log.write_csv(src / "log_standard_4_22_to_5_08_pure.csv")
    categories = [
        "user_active_degree",
        "is_live_streamer",
        "is_video_author",
        "follow_user_num_range",
        "fans_user_num_range",
        "friend_user_num_range",
        "register_days_range",
    ]
    counts = ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"]
    users: dict[str, list[Any]] = {"user_id": [0, 5, 9]}
    users |= {c: ["x", "y", "x"] for c in categories} | {c: [1, 2, 3] for c in counts}
    users |= {f"onehot_feat{i}": [0.0, None, 1.0] for i in range(18)}
    pl.DataFrame(users).write_csv(src / "user_features_pure.csv")
    videos = {
        "video_id": [0, 1],
        "author_id": [7, 8],
        "video_type": ["NORMAL", "AD"],
        "upload_type": ["Web", "Web"],
        "upload_dt": ["2022-04-09", "2022-04-09"],
        "music_id": [1, 2],
        "music_type": [9.0, None],
        "tag": ["39,68", "3"],
        "video_duration": [1000.0, None],
        "server_width": [720, 720],
        "server_height": [1280, 1280],
    }
    pl.DataFrame(videos).write_csv(src / "video_features_basic_pure.csv")
    launches = pl.DataFrame({"video_id": [0, 1], "launch_date": [None, date(2022, 5, 2)]})
    launches.write_parquet(src / "staggered_launches.parquet")
    return src


def seen(dataset: Dataset) -> list[tuple[int, int, str, str]]:
    """(user, item, day, usage) of every row."""
    log = dataset.impressions().collect()
    return log.select("user_id", "item_id", pl.col("day").cast(pl.String), "usage").rows()


OLD = [(0, 0, "2022-04-10", "all"), (0, 0, "2022-05-01", "all")]


@pytest.mark.parametrize(
    "protocol, young",
    [
        ("staggered", [(5, 1, "2022-05-02", "all"), (9, 1, "2022-05-02", "all")]),
        ("sparse", [(5, 1, "2022-05-02", "evaluation"), (9, 1, "2022-05-02", "all")]),
        ("strict", [(5, 1, "2022-05-02", "evaluation"), (9, 1, "2022-05-02", "evaluation")]),
        ("oracle", [(5, 1, "2022-05-01", "training"), (5, 1, "2022-05-02", "all"), (9, 1, "2022-05-02", "all")]),
    ],
)
def test_a_protocol_says_what_is_known_of_a_launched_video(
    protocol: Protocol, young: list[tuple[int, int, str, str]], tmp_path: Path
) -> None:
    """The row of 04-08 precedes its upload and is no row anywhere; the repeated event of 05-01 is one."""
    dataset = import_kuairand(published(tmp_path / "src"), tmp_path / "out", protocol)
    assert seen(dataset) == OLD + young
    assert dataset.manifest["source"]["dropped"]["duplicates"] == 1


def test_age_counts_from_the_launch_but_for_the_oracle_only_when_judging(tmp_path: Path) -> None:
    """The oracle's model sees the true age; which rows are fresh is the same for all."""
    src, upload, launch = published(tmp_path / "src"), beijing(date(2022, 4, 9)), beijing(date(2022, 5, 2))
    sparse = import_kuairand(src, tmp_path / "sparse", "sparse").items()
    oracle = import_kuairand(src, tmp_path / "oracle", "oracle").items()
    assert sparse["created_at"].to_list() == oracle["judged_created_at"].to_list() == [upload, launch]
    assert oracle["created_at"].to_list() == [upload, upload]
    assert "judged_created_at" not in sparse.columns


def test_a_request_is_what_a_user_saw_on_a_day(tmp_path: Path) -> None:
    """user_id * 10^8 + yyyymmdd; the late-evening row belongs to the day its ``date`` says."""
    log = import_kuairand(published(tmp_path / "src"), tmp_path / "out").impressions().collect()
    assert log["request_id"].to_list() == [20220410, 20220501, 520220502, 920220502]
    assert log["event_timestamp"][2] == beijing(date(2022, 5, 2)) + timedelta(microseconds=86_400 - 1_800)


def test_tags_are_lists_and_missing_values_stay_missing(tmp_path: Path) -> None:
    """Codes in sorted order: "3" < "39" < "68"."""
    dataset = import_kuairand(published(tmp_path / "src"), tmp_path / "out")
    assert dataset.items()["tag"].to_list() == [[1, 2], [0]]
    assert dataset.items()["video_duration"].to_list() == [1000.0, None]
    assert dataset.items()["music_type"].to_list() == [9, None]
    assert dataset.users()["onehot_feat4"].to_list() == [0, None, 1]


def test_an_unknown_protocol_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    """At once, before a file is read."""
    with pytest.raises(ConfigError, match="received 'dense', expected one of"):
        import_kuairand(tmp_path, tmp_path / "out", "dense")  # type: ignore[arg-type]


def test_missing_launches_are_asked_for_by_name(tmp_path: Path) -> None:
    """Whoever downloads the published files lacks exactly this one."""
    src = published(tmp_path / "src")
    (src / "staggered_launches.parquet").unlink()
    with pytest.raises(DataError, match=r"lacks staggered_launches\.parquet"):
        import_kuairand(src, tmp_path / "out")


def test_a_directory_without_the_set_is_told_both_layouts(tmp_path: Path) -> None:
    """With what was found instead."""
    with pytest.raises(DataError, match=r"log_standard_0425_0508.parquet.*log_standard_4_08_to_4_21_pure.csv.*\[\]"):
        import_kuairand(tmp_path, tmp_path / "out")


HOURS_OFF = st.floats(min_value=-30, max_value=54, allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(HOURS_OFF, min_size=1, max_size=10))
def test_a_clock_outside_its_day_moves_inside_and_keeps_its_order(hours: list[float]) -> None:
    """Times inside stay as they are, to the millisecond."""
    day = date(2022, 4, 25)
    frame = pl.DataFrame({"ms": sorted(ms(day, hour) for hour in hours)}).with_columns(day=pl.lit(day))
    moved = frame.select(clock_within_day(pl.col("ms"), pl.col("day")).alias("t"))["t"]
    start, end = beijing(day), beijing(day, 24)
    assert all(start <= t < end for t in moved)
    original = [datetime.fromtimestamp(value / 1000, UTC) for value in frame["ms"]]
    assert all(m == o for m, o in zip(moved, original, strict=True) if start + timedelta(seconds=1) <= o < end)
    outside = [m for m, o in zip(moved, original, strict=True) if o < start]
    assert outside == sorted(outside)


@settings(max_examples=100, deadline=None)
@given(
    uploads=st.lists(st.integers(9, 11), min_size=1, max_size=50),
    truncated=st.integers(0, 100),
    last_hour=st.floats(min_value=1, max_value=300),
)
def test_interpolated_times_keep_the_order_and_respect_uploads(
    uploads: list[int], truncated: int, last_hour: float
) -> None:
    """Strictly ascending per user, none before its item's upload, the last exactly at the user's last time."""
    count = len(uploads)
    last = beijing(date(2022, 4, 11), last_hour).replace(microsecond=0)
    history = pl.DataFrame(
        {
            "user_id": [1] * count,
            "pos_from_end": list(range(-count, 0)),
            "history_len": [count + truncated] * count,
            "last_time_ms": [int(last.timestamp() * 1000)] * count,
            "uploaded": [beijing(date(2022, 4, day)) for day in uploads],
        }
    )
    timed = interpolated_times(history.sample(fraction=1, shuffle=True, seed=0))
    times = timed["event_timestamp"]
    assert timed["pos_from_end"].is_sorted()
    assert all(a < b for a, b in pairwise(times))
    assert all(t >= u for t, u in zip(times, timed["uploaded"], strict=True))
    assert times[-1] == last


def test_interpolated_times_are_evenly_spread() -> None:
    """The last two of four exposures between an upload at hour 0 and a last time at hour 8 fall on hours 6 and 8."""
    upload = beijing(date(2022, 4, 9))
    history = pl.DataFrame(
        {
            "user_id": [1, 1],
            "pos_from_end": [-2, -1],
            "history_len": [4, 4],
            "last_time_ms": [ms(date(2022, 4, 9), 8)] * 2,
            "uploaded": [upload] * 2,
        }
    )
    hours = [6, 8]
    assert interpolated_times(history)["event_timestamp"].to_list() == [upload + timedelta(hours=h) for h in hours]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """The real slice under every protocol."""
    home = tmp_path_factory.mktemp("kuairand")
    return {protocol: import_kuairand(SLICE, home / protocol, protocol) for protocol in PROTOCOLS}


def judged(dataset: Dataset) -> pl.DataFrame:
    """Rows of the evaluation days that may be judged, and whether each is fresh."""
    return _with_freshness(dataset, EVALUATION, [usage.value for usage in IN_EVALUATION])


def trained(dataset: Dataset) -> pl.DataFrame:
    return _with_freshness(dataset, TRAIN, [usage.value for usage in IN_TRAINING])


def _with_freshness(dataset: Dataset, days: list[date], usages: list[str]) -> pl.DataFrame:
    items = dataset.items()
    birth = "judged_created_at" if "judged_created_at" in items.columns else "created_at"
    rows = dataset.impressions(days).filter(pl.col("usage").is_in(usages)).collect()
    age = pl.col("event_timestamp") - pl.col("birth")
    return rows.join(items.select("item_id", birth=birth), on="item_id").with_columns(
        fresh=age < timedelta(days=dataset.schema.fresh_days)
    )


class TestRealSlice:
    pytestmark = realdata

    def test_fresh_rows_are_half_a_percent_of_training_and_a_fifth_of_evaluation(
        self, imported: dict[str, Dataset]
    ) -> None:
        """The sparse protocol as its README states it."""
        assert trained(imported["sparse"])["fresh"].mean() == pytest.approx(0.005, abs=0.0005)
        assert judged(imported["sparse"])["fresh"].mean() == pytest.approx(0.20, abs=0.005)

    @pytest.mark.parametrize("protocol", get_args(Protocol))
    def test_judged_rows_are_the_same_under_all_protocols(self, protocol: str, imported: dict[str, Dataset]) -> None:
        """Row for row, labels and freshness included."""
        same = ["request_id", "event_timestamp", "user_id", "item_id", "click", "long_view", "fresh", "day"]
        assert judged(imported[protocol]).select(same).equals(judged(imported["staggered"]).select(same))

    def test_no_row_precedes_its_item(self, imported: dict[str, Dataset]) -> None:
        """Under the created_at the model sees, history included."""
        for dataset in imported.values():
            log = dataset.impressions().collect().join(dataset.items().select("item_id", "created_at"), on="item_id")
            assert (log["event_timestamp"] >= log["created_at"]).all()

    def test_the_day_of_every_impression_is_the_sources_date(self, imported: dict[str, Dataset]) -> None:
        """Counted per day, against the source after its repeated events are dropped."""
        source = pl.read_parquet(SLICE / "log_standard_0425_0508.parquet")
        unique = source.sort("date", "hourmin").unique(["user_id", "video_id", "time_ms"], keep="first")
        expected = dict(unique.group_by("date").len().rows())
        manifest = imported["oracle"].manifest
        assert manifest["source"]["dropped"] == {"duplicates": 425, "before_creation": 0}
        for day in (d for d in imported["oracle"].days if d >= TRAIN[0]):
            assert manifest["days"][day.isoformat()]["rows"] == expected[int(day.strftime("%Y%m%d"))]

    def test_history_feeds_counters_only(self, imported: dict[str, Dataset]) -> None:
        """All of it before the first training day, without clicks, long views null where their place is uncertain."""
        log = imported["oracle"].impressions().collect()
        history = log.filter(pl.col("usage") == "history")
        assert len(history) == 817_187
        assert history["day"].max() < TRAIN[0]  # type: ignore[operator]
        assert log.filter(pl.col("usage") != "history")["day"].min() == TRAIN[0]
        assert history["click"].null_count() == len(history)
        assert history["long_view"].null_count() == 53_475

    def test_strict_withholds_the_launched_videos_entirely(self, imported: dict[str, Dataset]) -> None:
        """No row of the 1,520 may be learned from in any way."""
        launched = imported["oracle"].items().filter(pl.col("created_at") != pl.col("judged_created_at"))["item_id"]
        assert len(launched) == 1_520
        learned = imported["strict"].impressions().filter(pl.col("usage") != "evaluation").collect()["item_id"]
        assert not learned.is_in(launched.implode()).any()

    def test_time_grows_with_the_rows_not_with_their_square(self, tmp_path: Path) -> None:
        """Four times the users' impressions take at most about four times as long."""
        (tmp_path / "quarter").mkdir()
        for file in SLICE.glob("*.parquet"):
            rows = pl.read_parquet(file)
            fewer = rows.filter(pl.col("user_id") % 4 == 0) if "user_id" in rows.columns else rows
            fewer.write_parquet(tmp_path / "quarter" / file.name)

        def seconds(source: Path) -> float:
            start = time.process_time()
            import_kuairand(source, tmp_path / "out", "sparse")
            return time.process_time() - start

        seconds(tmp_path / "quarter")
        assert seconds(SLICE) < 12 * seconds(tmp_path / "quarter")
