"""The steps that `freshrank bench features` measures, each alone in its process."""

import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from freshrank.bench.measure import peak_mib
from freshrank.datasets.dataset import Dataset
from freshrank.settings import settings
from freshrank.storage.files import read_json
from freshrank.storage.workspace import Workspace

WINDOWS = (1, 7, 28)


def simulate_world(place: Path) -> None:
    from freshrank.datasets.simulator import WorldConfig, simulate

    simulate(place / "data", WorldConfig.of(**read_json(place / "world.json")))


def scratch(place: Path) -> None:
    """The last day's snapshots, from nothing but the log."""
    from freshrank.features.snapshots import build_history

    dataset, workspace = opened(place)
    build_history(dataset, workspace, [dataset.days[-1]])


def next_day(place: Path) -> None:
    """The snapshots of the day after the log: its last day is read, of the others their parts."""
    from freshrank.features.snapshots import build_history

    dataset, workspace = opened(place)
    build_history(dataset, workspace, [dataset.days[-1] + timedelta(days=1)])


def frame(place: Path) -> None:
    """The training frame of the log's last day."""
    from freshrank.features.frames import load_frame

    dataset, workspace = opened(place)
    load_frame(dataset, workspace, [dataset.days[-1]])


def plain_counts(place: Path) -> None:
    """A GROUP BY per entity over the log of the 28 days, as one would write it."""
    _duckdb(place, [(_counts("user_id"), "users"), (_counts("item_id"), "items")])


def plain_features(place: Path) -> None:
    """The same features by one statement per entity over the log of the 28 days."""
    _duckdb(place, [(_user_features(), "users"), (_item_features(), "items")])


def opened(place: Path) -> tuple[Dataset, Workspace]:
    return Dataset.open(place / "data"), Workspace.of("simulated", place / "home")


def _prepare(step: str, place: Path) -> None:
    """Each round starts from the state in which the step starts in production."""
    dataset, workspace = opened(place)
    if step == "scratch":
        shutil.rmtree(place / "home", ignore_errors=True)
    if step == "day":
        shutil.rmtree(workspace.features / "daily" / f"date={dataset.days[-1]}", ignore_errors=True)
    if step == "frame":
        shutil.rmtree(workspace.frames, ignore_errors=True)


def _duckdb(place: Path, statements: list[tuple[str, str]]) -> None:
    import duckdb

    dataset = Dataset.open(place / "data")
    paths = ", ".join(f"'{dataset.partition(day)}'" for day in dataset.days[:-1])
    connection = duckdb.connect(config={"memory_limit": f"{settings().features_memory_gib}GiB"})
    connection.execute(
        f"create view log as select *, date::date as day from read_parquet([{paths}], "
        "hive_partitioning = true) where usage in ('all', 'history', 'training')"
    )
    connection.execute(f"create view items as select * from '{dataset.path / 'items.parquet'}'")
    connection.execute(f"set variable today = date '{dataset.days[-1]}'")
    for statement, name in statements:
        connection.execute(f"copy ({statement}) to '{place / f'plain_{name}.parquet'}' (compression zstd)")


def _windowed(entity: str) -> str:
    columns = []
    for window in WINDOWS:
        seen = f"filter (day >= getvariable('today') - {window})"
        columns.append(f"count(*) {seen} as {entity}_impressions_{window}d")
        for action in ("click", "save"):
            name, positives = f"{entity}_{action}", f"sum({action}) {seen}"
            columns.append(f"{positives} as {name}_{window}d")
            columns.append(f"{positives} / nullif(count({action}) {seen}, 0) as {name}_rate_{window}d")
    return ", ".join(columns)


def _counts(key: str) -> str:
    return f"select {key}, {_windowed(key.removesuffix('_id'))} from log group by {key} order by {key}"


def _user_features() -> str:
    return f"""
        with engaged as (
            select user_id, event_timestamp, item_id, click + 2 * save as mask,
                row_number() over (partition by user_id order by event_timestamp desc, item_id desc) as place
            from log where click = 1 or save = 1),
        sequences as (
            select user_id, list(item_id order by event_timestamp, item_id) as sequence_item_ids,
                list(mask order by event_timestamp, item_id) as sequence_actions
            from engaged where place <= 20 group by user_id),
        totals as (
            select user_id, category, count(*)::int as impressions, sum(click)::int as clicks, sum(save)::int as saves
            from log join items using (item_id) where category is not null group by user_id, category),
        ranked as (
            select *, row_number() over (partition by user_id order by impressions desc, category) as place
            from totals),
        affinities as (
            select user_id, list(category order by place) as affinity_category_values,
                list(impressions order by place) as affinity_category_impressions,
                list(clicks order by place) as affinity_category_click,
                list(saves order by place) as affinity_category_save
            from ranked where place <= {_affinity_size()} group by user_id)
        select * from ({_counts("user_id")}) left join sequences using (user_id) left join affinities using (user_id)
        order by user_id"""


def _affinity_size() -> int:
    from freshrank.datasets.simulator import WorldConfig

    return WorldConfig().schema_of().history.affinity_size


def _item_features() -> str:
    """Counters, and the rates of siblings by author and by category."""
    rates = []
    for key in ("author", "category"):
        for action in ("click", "save"):
            alike = f"(sum({action}s) over (partition by {key}) - {action}s)"
            shown = f"(sum(shown) over (partition by {key}) - shown)"
            overall = f"(sum({action}s) over () - {action}s) / nullif(sum(shown) over () - shown, 0)"
            rates.append(f"({alike} + 30 * {overall}) / nullif({shown} + 30, 0) as {key}_siblings_{action}")
        rates.append(f"sum(shown) over (partition by {key}) - shown as {key}_siblings_impressions")
    return f"""
        with counts as ({_counts("item_id")}),
        born as (
            select item_id, author, category, counts.* exclude (item_id), coalesce(item_impressions_28d, 0) as shown,
                coalesce(item_click_28d, 0) as clicks, coalesce(item_save_28d, 0) as saves
            from items left join counts using (item_id) where created_at < getvariable('today') + 1)
        select *, {", ".join(rates)} from born order by item_id"""


RUN: dict[str, Callable[[Path], None]] = {
    "simulate": simulate_world,
    "scratch": scratch,
    "day": next_day,
    "frame": frame,
    "plain_counts": plain_counts,
    "plain_features": plain_features,
}


def measured(step: str, place: Path) -> tuple[float, float]:
    """Seconds of ``step``, and the peak GiB of this process, which must be its own."""
    if step != "simulate":
        _prepare(step, place)
    started = time.perf_counter()
    RUN[step](place)
    return time.perf_counter() - started, peak_mib() / 1024
