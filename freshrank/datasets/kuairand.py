"""KuaiRand-Pure (Gao et al., CIKM 2022, doi:10.1145/3511808.3557624) as a dataset of the contract.

Reads the Parquet slice or the published CSV files. All videos were uploaded within three days, so real freshness
separates nothing; ``staggered_launches.parquet`` gives 1,520 videos a pseudo launch day instead, and a protocol says
what a ranker may know of them (launched = has a launch day):

staggered   a launched video does not exist before its launch day: earlier rows and all its history are dropped
sparse      staggered, and of a launched video's rows only 5% of (user, video) pairs train; the others are judged only
strict      a launched video's rows, from its launch on, are judged only
oracle      nothing is dropped; rows before the launch train, and age is counted from the launch for judging only

The judged rows are the same under all four. The calendar is UTC+8 and an impression's day is the source's ``date``.
Of the slice's ``history_0409_0424.parquet``, which has no times of its own, each row gets one by
:func:`interpolated_times`; with the CSV files the same weeks are ordinary impressions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from freshrank.datasets.checks import UTC_TIMESTAMP
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.writer import write_dataset
from freshrank.errors import ConfigError, DataError
from freshrank.schema import (
    CREATED_AT,
    EVENT_TIMESTAMP,
    ITEM_ID,
    JUDGED_CREATED_AT,
    REQUEST_ID,
    USAGE,
    USER_ID,
    Column,
    HistoryConfig,
    Kind,
    Role,
    Schema,
    Usage,
)

Protocol = Literal["staggered", "sparse", "strict", "oracle"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
UTC_OFFSET_HOURS = 8
LAUNCHES = "staggered_launches.parquet"
_KEPT_PERCENT = 5
_USER_CATEGORIES = [
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
]
_USER_COUNTS = ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"]
_ITEM_CATEGORIES = ["author_id", "video_type", "upload_type", "music_id", "music_type"]
_SIBLINGS = ("author_id", "tag", "music_id", "upload_type", "video_duration", "tag+video_duration")
_LOG_COLUMNS = ["user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "long_view", "tab"]


@dataclass(frozen=True)
class _Layout:
    """File names of one form in which the set is found."""

    name: str
    logs: tuple[str, ...]
    users: str
    items: str
    history: str | None = None

    @property
    def files(self) -> list[str]:
        history = [self.history] if self.history else []
        return [*self.logs, *history, self.users, self.items, LAUNCHES]


_SLICE = _Layout(
    "slice",
    ("log_standard_0425_0508.parquet",),
    "user_features.parquet",
    "video_features_basic.parquet",
    "history_0409_0424.parquet",
)
_PUBLISHED = _Layout(
    "published",
    ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv"),
    "user_features_pure.csv",
    "video_features_basic_pure.csv",
)


def kuairand_schema(protocol: Protocol) -> Schema:
    """The columns read; left out are constant ones (visible_status, is_lowactive_period) and the rarer actions.

    No affinity to authors: 6,510 of them made the 7,583 videos, so a user hardly meets one twice.
    """
    key, category = Column(role=Role.KEY), Kind.CATEGORICAL
    content = {name: Column(role=Role.CONTENT, kind=category) for name in _ITEM_CATEGORIES}
    profile = {name: Column(role=Role.PROFILE, kind=category) for name in _USER_CATEGORIES}
    counts = {name: Column(role=Role.PROFILE, kind=Kind.NUMERIC, transform="log1p") for name in _USER_COUNTS}
    return Schema(
        name=f"kuairand_{protocol}",
        fresh_days=14,
        utc_offset_hours=UTC_OFFSET_HOURS,
        impressions={
            REQUEST_ID: key,
            EVENT_TIMESTAMP: Column(role=Role.TIME),
            USER_ID: key,
            ITEM_ID: key,
            "click": Column(role=Role.ACTION),
            "long_view": Column(role=Role.ACTION),
            "tab": Column(role=Role.CONTEXT, kind=category, description="page of the app the video was shown on"),
            USAGE: Column(role=Role.META),
        },
        items={
            ITEM_ID: key,
            CREATED_AT: Column(role=Role.TIME),
            **content,
            "tag": Column(role=Role.CONTENT, kind=Kind.MULTI_VALUED, max_values=3),
            "video_duration": Column(role=Role.CONTENT, kind=Kind.NUMERIC, transform="log1p", description="ms"),
            "server_width": Column(role=Role.CONTENT, kind=Kind.NUMERIC, description="pixels"),
            "server_height": Column(role=Role.CONTENT, kind=Kind.NUMERIC, description="pixels"),
        },
        users={USER_ID: key, **profile, **counts},
        history=HistoryConfig(sequence_length=50, affinity=("tag",), siblings=_SIBLINGS),
    )


def import_kuairand(src: Path, out: Path, protocol: Protocol = "staggered") -> Dataset:
    """Import the slice or the published CSV files in ``src`` under ``protocol``.

    ``staggered_launches.parquet`` of the slice must lie in ``src`` in both cases: every protocol judges by it.
    ``manifest.source`` counts what was dropped.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol: received {protocol!r}, expected one of {list(PROTOCOLS)}")
    layout = _find(src)
    items = _items(_read(src / layout.items), _read(src / LAUNCHES))
    log = pl.concat([_read(src / name).select(_LOG_COLUMNS) for name in layout.logs], how="vertical_relaxed")
    events = unique_events(log)
    rows = _impressions(events)
    if layout.history:
        rows = pl.concat([_history(_read(src / layout.history), items), rows])
    impressions = apply_protocol(rows, items, protocol)
    dropped = {"duplicates": len(log) - len(events), "before_creation": len(rows) - len(impressions)}
    source = {"adapter": "kuairand", "protocol": protocol, "files": layout.name, "dropped": dropped}
    users = _read(src / layout.users)
    return write_dataset(out, kuairand_schema(protocol), impressions, _items_under(items, protocol), users, source)


def _find(src: Path) -> _Layout:
    for layout in (_SLICE, _PUBLISHED):
        missing = [name for name in layout.files if not (src / name).exists()]
        if not missing:
            return layout
        if missing == [LAUNCHES]:
            raise DataError(
                f"{src}: lacks {LAUNCHES}, the launch days that every protocol judges by; "
                "copy it there from the KuaiRand slice"
            )
    names = sorted(path.name for path in src.glob("*"))
    raise DataError(
        f"{src}: expected the slice ({', '.join(_SLICE.files)}) or the published files "
        f"({', '.join(_PUBLISHED.files)}); it holds {names}"
    )


def _read(path: Path) -> pl.DataFrame:
    try:
        if path.suffix == ".csv":
            return pl.read_csv(path, infer_schema_length=None)
        return pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch the file again") from error


def _local_midnight(day: pl.Expr) -> pl.Expr:
    """UTC instant at which the Date expression ``day`` starts in the source's time zone."""
    return day.cast(pl.Datetime("us")).dt.replace_time_zone("UTC") - pl.duration(hours=UTC_OFFSET_HOURS)


def _utc(unix_ms: pl.Expr) -> pl.Expr:
    return pl.from_epoch(unix_ms, "ms").cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


def _items(features: pl.DataFrame, launches: pl.DataFrame) -> pl.DataFrame:
    """The videos under contract names, with ``uploaded`` and ``launched`` (null for most)."""
    uploaded = _local_midnight(pl.col("upload_dt").cast(pl.String).str.to_date())
    launched = _local_midnight(pl.col("launch_date"))
    return (
        features.with_columns(pl.col("tag").cast(pl.String), uploaded=uploaded)
        .join(launches.select("video_id", launched=launched), on="video_id", how="left")
        .with_columns(pl.col("video_id").cast(pl.Int64).alias(ITEM_ID))
    )


def _items_under(items: pl.DataFrame, protocol: Protocol) -> pl.DataFrame:
    launched = pl.coalesce("launched", "uploaded")
    if protocol == "oracle":
        return items.with_columns(pl.col("uploaded").alias(CREATED_AT), launched.alias(JUDGED_CREATED_AT))
    return items.with_columns(launched.alias(CREATED_AT))


def unique_events(log: pl.DataFrame) -> pl.DataFrame:
    """One row per (user, video, time_ms): the source holds some twice, an hour or a day apart in date and hourmin.

    The earlier ``date`` is kept, it is the one ``time_ms`` falls into.
    """
    order = ["user_id", "video_id", "time_ms", "date", "hourmin", "is_click", "long_view"]
    return log.sort(order).unique(order[:3], keep="first", maintain_order=True)


def _impressions(log: pl.DataFrame) -> pl.DataFrame:
    day = pl.col("date").cast(pl.String).str.to_date("%Y%m%d")
    return _contract_rows(
        log.with_columns(
            clock_within_day(pl.col("time_ms"), day).alias(EVENT_TIMESTAMP),
            click=pl.col("is_click"),
            usage=pl.lit(Usage.ALL.value),
        )
    )


def clock_within_day(time_ms: pl.Expr, day: pl.Expr) -> pl.Expr:
    """UTC timestamp of ``time_ms`` (Unix), moved into ``day`` where it lies outside.

    About 1% of rows carry a time up to some hours before their ``date``, which the source rounded up. They keep
    their order at the very start (or end) of the day: each second outside becomes a microsecond inside.
    """
    start, length = _local_midnight(day), 86_400_000_000
    offset = (_utc(time_ms) - start).dt.total_microseconds()
    early = (86_400 + offset // 1_000_000).clip(0, 86_400)
    late = length - 1 - (86_400 - (offset - length) // 1_000_000).clip(0, 86_400)
    inside = pl.when(offset < 0).then(early).when(offset >= length).then(late).otherwise(offset)
    return (start + pl.duration(microseconds=inside)).cast(UTC_TIMESTAMP)


def _history(history: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Rows of the slice's history: no click observed, long_view only where its position is certain."""
    uploads = items.select(pl.col(ITEM_ID).alias("video_id"), "uploaded")
    timed = interpolated_times(history.with_columns(pl.col("video_id").cast(pl.Int64)).join(uploads, on="video_id"))
    certain = pl.when(~pl.col("repeat_in_window")).then("long_view")
    return _contract_rows(
        timed.with_columns(
            certain.alias("long_view"),
            click=pl.lit(None, pl.Int8),
            tab=pl.lit(None, pl.Int8),
            usage=pl.lit(Usage.HISTORY.value),
        )
    )


def interpolated_times(history: pl.DataFrame) -> pl.DataFrame:
    """Add ``event_timestamp`` to rows known by their order and their user's newest time only.

    ``history``: user_id, pos_from_end (-1 = newest), history_len (exposures before truncation), last_time_ms and
    the item's ``uploaded``. Exposure p of history_len is placed the fraction p / history_len of the way from the
    newest upload among the user's rows so far to the user's last time: strictly in order, never before an item
    existed, the last row exact. Launch days play no part, so a row has the same time under every protocol. The
    times are guesses, which is harmless only because no row of these weeks is trained on or judged.
    """
    last, first = _utc(pl.col("last_time_ms")), pl.col("uploaded").cum_max().over("user_id")
    fraction = (pl.col("history_len").cast(pl.Float64) + pl.col("pos_from_end") + 1) / pl.col("history_len")
    elapsed = ((last - first).dt.total_microseconds() * fraction).cast(pl.Int64)
    time = (first + pl.duration(microseconds=elapsed)).cast(UTC_TIMESTAMP)
    return history.sort("user_id", "pos_from_end").with_columns(time.alias(EVENT_TIMESTAMP))


def _contract_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """Request = user and local day, numbered user_id * 10^8 + yyyymmdd."""
    local_day = (pl.col(EVENT_TIMESTAMP) + pl.duration(hours=UTC_OFFSET_HOURS)).dt.strftime("%Y%m%d").cast(pl.Int64)
    user = pl.col("user_id").cast(pl.Int64)
    return rows.select(
        (user * 100_000_000 + local_day).alias(REQUEST_ID),
        EVENT_TIMESTAMP,
        user.alias(USER_ID),
        pl.col("video_id").cast(pl.Int64).alias(ITEM_ID),
        pl.col("click", "long_view").cast(pl.Int8),
        pl.col("tab").cast(pl.Int64),
        USAGE,
    )


def apply_protocol(rows: pl.DataFrame, items: pl.DataFrame, protocol: Protocol) -> pl.DataFrame:
    """Drop the rows that the protocol says never were and set ``usage`` of the others."""
    rows = rows.join(items.select(ITEM_ID, "uploaded", "launched"), on=ITEM_ID)
    launched = pl.col("launched").is_not_null()
    before = launched & (pl.col(EVENT_TIMESTAMP) < pl.col("launched"))
    exists = pl.col(EVENT_TIMESTAMP) >= pl.col("uploaded")
    observed = pl.col(USAGE) == Usage.ALL.value
    if protocol == "oracle":
        usage, exposed = _usage(before & observed, Usage.TRAINING), exists
    else:
        withheld = {"staggered": pl.lit(value=False), "sparse": launched & ~_in_sample(), "strict": launched}[protocol]
        usage, exposed = _usage(withheld, Usage.EVALUATION), exists & ~before
    return rows.filter(exposed).with_columns(usage).drop("uploaded", "launched")


def _usage(where: pl.Expr, usage: Usage) -> pl.Expr:
    return pl.when(where).then(pl.lit(usage.value)).otherwise(USAGE).alias(USAGE)


def _in_sample() -> pl.Expr:
    return (pl.col(USER_ID) * 7919 + pl.col(ITEM_ID) * 104_729) % 100 < _KEPT_PERCENT
