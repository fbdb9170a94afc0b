"""The simulated world: same seed same bytes, the contract holds, and the truth is worth knowing."""

import hashlib
import time
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.simulator import TRUE_PROBABILITIES, TRUTH, WorldConfig, simulate
from freshrank.errors import ConfigError
from freshrank.schema import Kind

SMALL = WorldConfig(days=3, users=200, items_at_start=150, new_items_per_day=20, impressions_per_day=600)
LARGEST_FRESH_SHARE = 0.35


def digests(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file under ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def with_age(dataset: Dataset) -> pl.DataFrame:
    """The log with ``age``, a duration, and ``fresh``."""
    births = dataset.items().select("item_id", "created_at")
    log = dataset.impressions().collect().join(births, on="item_id", how="left")
    age = pl.col("event_timestamp") - pl.col("created_at")
    return log.with_columns(age.alias("age"), (age < timedelta(days=dataset.schema.fresh_days)).alias("fresh"))


def hits_at_3(judged: pl.DataFrame, score: str) -> float:
    """Share of requests with a click whose best three by ``score`` hold one."""
    clicked = judged.filter((pl.col("click") == 1).any().over("request_id"))
    best = clicked.sort(score, descending=True, maintain_order=True).group_by("request_id").head(3)
    return best.group_by("request_id").agg(pl.col("click").max())["click"].mean()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The default world."""
    return simulate(tmp_path_factory.mktemp("demo") / "world", WorldConfig())


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    """Every file, the truth among them, is equal; another seed is another log."""
    simulate(tmp_path / "a", SMALL)
    simulate(tmp_path / "b", SMALL)
    other = simulate(tmp_path / "c", SMALL.model_copy(update={"seed": 1}))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not other.impressions().collect().equals(Dataset.open(tmp_path / "a").impressions().collect())


def test_writing_a_world_twice_into_one_place_changes_nothing(tmp_path: Path) -> None:
    """A second run leaves the same files and nothing beside them."""
    simulate(tmp_path / "world", SMALL)
    before = digests(tmp_path)
    simulate(tmp_path / "world", SMALL)
    assert digests(tmp_path) == before


def test_a_longer_world_starts_with_the_days_of_a_shorter_one(tmp_path: Path) -> None:
    """No day depends on a later one: the log of days 1-3 is the same whether or not day 4 exists."""
    short = simulate(tmp_path / "short", SMALL)
    long = simulate(tmp_path / "long", SMALL.model_copy(update={"days": 4}))
    assert long.impressions(short.days).collect().equals(short.impressions().collect())
    assert long.items().head(len(short.items())).equals(short.items())


def test_the_contract_holds(demo: Dataset) -> None:
    """Keys are known and unique, labels 0 or 1, positions count from 1, a save needs a click."""
    log = demo.impressions().collect()
    assert demo.days == [WorldConfig().first_day + timedelta(days=day) for day in range(WorldConfig().days)]
    assert set(demo.schema.impressions) <= set(log.columns)
    assert log.select("request_id", "item_id").is_unique().all()
    assert set(log["item_id"]) <= set(demo.items()["item_id"])
    assert set(log["user_id"]) <= set(demo.users()["user_id"])
    assert set(log["click"]) == set(log["save"]) == {0, 1}
    assert (log["save"] <= log["click"]).all()
    positions = log.sort("position").group_by("request_id").agg(pl.col("position"), pl.len())
    assert all(list(row["position"]) == list(range(1, row["len"] + 1)) for row in positions.to_dicts())


def test_every_kind_of_content_is_there_and_some_of_it_is_missing(demo: Dataset) -> None:
    """Categorical, multi-valued, numeric and embedding; a few per cent of embeddings and durations are null."""
    kinds = {column.kind for column in demo.schema.items.values() if column.kind}
    assert kinds == {Kind.CATEGORICAL, Kind.MULTI_VALUED, Kind.NUMERIC, Kind.EMBEDDING}
    nulls = demo.items().select(pl.col("embedding", "duration").is_null().mean()).row(0)
    assert nulls == pytest.approx((0.03, 0.05), abs=0.015)
    assert demo.items()["embedding"].drop_nulls().list.len().unique().to_list() == [8]


def test_no_item_is_shown_before_its_creation(demo: Dataset) -> None:
    """Items appear through the day, not only at midnight, and an impression follows its item's creation."""
    assert (with_age(demo)["age"] > timedelta(0)).all()
    assert demo.items()["created_at"].dt.hour().n_unique() == 24


def test_a_label_shuffles_nothing(demo: Dataset) -> None:
    """The order of the rows is that of time, user and item, so that it tells nothing of what was clicked."""
    for day in demo.days:
        log = demo.impressions([day]).collect()
        assert log.equals(log.sort("event_timestamp", "user_id", "item_id"))


def test_a_failed_write_leaves_the_world_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of a bigger world changes no file and leaves none beside it."""
    simulate(tmp_path / "world", SMALL)
    before = digests(tmp_path)

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("freshrank.datasets.simulator._act", out_of_memory)
    with pytest.raises(MemoryError):
        simulate(tmp_path / "world", SMALL.model_copy(update={"days": 5}))
    assert digests(tmp_path) == before


def test_fresh_rows_are_a_minority_on_every_day(demo: Dataset) -> None:
    """Under-shown, as a real log has it: between 10% and 35% of the rows of a day."""
    shares = with_age(demo).group_by("day").agg(pl.col("fresh").mean())["fresh"]
    assert 0.10 < shares.min() <= shares.max() < LARGEST_FRESH_SHARE  # type: ignore[operator]


def test_the_last_day_has_enough_lists_with_a_fresh_positive_for_the_gate(demo: Dataset) -> None:
    """At least 300 requests of the judged day hold a fresh item that was clicked."""
    last = with_age(demo).filter((pl.col("day") == demo.days[-1]) & pl.col("fresh") & (pl.col("click") == 1))
    assert last["request_id"].n_unique() >= 300


def truth_of(dataset: Dataset, day: date) -> pl.DataFrame:
    """True probabilities of the rows of ``day``."""
    return pl.read_parquet(dataset.path / TRUTH / f"date={day.isoformat()}" / "part-0.parquet")


def test_the_truth_is_the_rate_of_what_happened(demo: Dataset) -> None:
    """In each tenth of the true probability, the share of positives is that probability within 2 points."""
    truth = pl.concat([truth_of(demo, day) for day in demo.days])
    log = demo.impressions().collect().join(truth, on=["request_id", "item_id"], how="inner")
    assert len(log) == len(truth) == sum(day["rows"] for day in demo.manifest["days"].values())
    for action in demo.schema.actions:
        probability = pl.col(f"{action}_probability")
        tenth = (probability.rank("ordinal") * 10 // (pl.len() + 1)).alias("tenth")
        table = log.group_by(tenth).agg(probability.mean().alias("true"), pl.col(action).mean().alias("seen"))
        assert (table["true"] - table["seen"]).abs().max() < 0.02  # type: ignore[operator]


def test_the_truth_is_no_column_of_the_contract(demo: Dataset) -> None:
    """What a model may read does not hold the answer."""
    tables = [demo.impressions().collect(), demo.items(), demo.users()]
    assert not {name for table in tables for name in table.columns} & {*TRUE_PROBABILITIES, "quality", "latent"}


def test_the_oracle_beats_popularity(demo: Dataset) -> None:
    """Ranking by the truth must pay, over all items and clearly so over fresh ones, or nothing could be learned."""
    last, log = demo.days[-1], with_age(demo)
    past = log.filter(pl.col("day") < last).group_by("item_id").agg((pl.col("click").sum() + 2) / (pl.len() + 10))
    judged = (
        log.filter(pl.col("day") == last)
        .join(truth_of(demo, last), on=["request_id", "item_id"])
        .join(past.rename({"click": "popularity"}), on="item_id", how="left")
        .with_columns(pl.col("popularity").fill_null(0.2))
    )
    assert hits_at_3(judged, "click_relevance") > hits_at_3(judged, "popularity") + 0.04
    fresh = judged.with_columns(click=pl.col("click") * pl.col("fresh"))
    assert hits_at_3(fresh, "click_relevance") > hits_at_3(fresh, "popularity") + 0.08


def test_content_tells_the_quality_of_an_item_without_history(demo: Dataset) -> None:
    """A linear reading of the embeddings of old items predicts the click rate of items created later."""
    rates = with_age(demo).group_by("item_id").agg(pl.col("click").mean().alias("rate"), pl.len())
    items = demo.items().join(rates.filter(pl.col("len") >= 20), on="item_id").drop_nulls("embedding").sort("item_id")
    from sklearn.linear_model import LinearRegression

    vectors, half = items["embedding"].list.to_array(8).to_numpy(), len(items) // 2
    model = LinearRegression().fit(vectors[:half], items["rate"].to_numpy()[:half])
    assert model.score(vectors[half:], items["rate"].to_numpy()[half:]) > 0.15


def test_query_items_are_there_only_when_asked_for(tmp_path: Path, demo: Dataset) -> None:
    """Half of the requests name one; one request names one query only."""
    world = SMALL.model_copy(update={"query_items": True})
    log = simulate(tmp_path / "world", world).impressions().collect()
    query = pl.col("query_item_id")
    requests = log.group_by("request_id").agg(query.n_unique().alias("queries"), query.is_null().any().alias("none"))
    assert not demo.schema.has_query
    assert (requests["queries"] == 1).all()
    assert 0.3 < requests["none"].mean() < 0.7  # type: ignore[operator]


@given(
    candidates=st.integers(2, 15),
    items=st.integers(1, 30),
    new=st.integers(0, 5),
    exploration=st.floats(0, 1),
    seed=st.integers(0, 5),
)
@hypothesis_settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_world_shows_distinct_living_items(
    tmp_path: Path, candidates: int, items: int, new: int, exploration: float, seed: int
) -> None:
    """Whatever the sizes, a request shows an item once, none before it was born, and never more than it may."""
    world = WorldConfig(
        seed=seed,
        days=2,
        users=5,
        items_at_start=items,
        new_items_per_day=new,
        impressions_per_day=120,
        candidates=candidates,
        exploration=exploration,
    )
    log = with_age(simulate(tmp_path / "world", world))
    assert log.select("request_id", "item_id").is_unique().all()
    assert (log["age"] > timedelta(0)).all()
    assert log.group_by("request_id").len()["len"].max() <= candidates  # type: ignore[operator]


def test_an_impossible_world_is_refused_by_name() -> None:
    """A size of zero names its field."""
    with pytest.raises(ValidationError, match="users"):
        WorldConfig(users=0)


def test_a_size_that_cannot_be_is_told_with_value_and_bound() -> None:
    """All of them at once."""
    with pytest.raises(ConfigError) as refused:
        WorldConfig.of(days=0, users=-5)
    bound = "expected a value greater than or equal to 1"
    assert str(refused.value) == f"days: received 0, {bound}; users: received -5, {bound}"


def test_time_grows_with_the_rows_not_with_their_square(tmp_path: Path) -> None:
    """Eight times the impressions take at most about eight times as long (with room for a busy machine)."""

    def seconds(rows: int, name: str) -> float:
        start = time.process_time()
        simulate(tmp_path / name, SMALL.model_copy(update={"impressions_per_day": rows}))
        return time.process_time() - start

    seconds(1_000, "warm-up")
    assert seconds(160_000, "large") < 24 * seconds(20_000, "small")
