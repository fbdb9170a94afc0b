"""A small seeded world with known truth, written in the data contract: the demo and the tests live in it.

What a user does follows :class:`Truth`; what a user is shown follows a logging policy that trusts clicks of past
days, so that new items are under-shown as in a real log. Days are generated one after the other from their own
random streams: memory is bounded by one day, and a longer world starts with the very days of a shorter one.

OUT/truth/date=YYYY-MM-DD/part-0.parquet, outside the contract's tables, holds per impression and action
``<action>_probability`` (as shown) and ``<action>_relevance`` (had it been shown first).
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import track

from freshrank.datasets.dataset import Dataset
from freshrank.datasets.writer import write_dataset
from freshrank.dates import days, midnight
from freshrank.errors import ConfigError
from freshrank.schema import (
    CREATED_AT,
    EVENT_TIMESTAMP,
    ITEM_ID,
    POSITION,
    QUERY_ITEM_ID,
    REQUEST_ID,
    USER_ID,
    Column,
    HistoryConfig,
    Kind,
    Role,
    Schema,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

CLICK = "click"
SAVE = "save"
TRUE_PROBABILITIES = ["click_probability", "click_relevance", "save_probability", "save_relevance"]
TRUTH = "truth"
_SURFACES = 3
_COUNTRIES = 8
_AGE_GROUPS = 6
_TAGS_PER_ITEM = 3
_MICROSECONDS_PER_DAY = 86_400_000_000
_REQUESTS_PER_BLOCK = 20_000
# One random stream per thing that is drawn, so that a change in one leaves the others alone.
_STREAM_MAP, _STREAM_USERS, _STREAM_ITEMS, _STREAM_DAYS = range(4)


class WorldConfig(BaseModel):
    """Size and shape of a simulated world; everything else is drawn from ``seed``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0)] = 0
    first_day: date = date(2024, 1, 1)
    days: Count = 12
    users: Count = 3_000
    items_at_start: Count = 1_500
    """Items created in the 90 days before ``first_day``."""
    new_items_per_day: Annotated[int, Field(ge=0)] = 60
    impressions_per_day: Count = 12_000
    candidates: Annotated[int, Field(ge=2)] = 12
    """Items shown per request."""
    retrieved: Annotated[int, Field(ge=2)] = 36
    """Items the logging policy chooses the shown ones from."""
    exploration: Share = 0.25
    """Share of the retrieved that is drawn uniformly: all a new item gets on its first day."""
    personalised: Share = 0.3
    """Share of the retrieved that is drawn from the user's favourite categories, by popularity."""
    latent_dim: Count = 8
    embedding_dim: Count = 8
    categories: Count = 20
    authors: Count = 300
    tags: Count = 60
    missing_embeddings: Share = 0.03
    missing_durations: Share = 0.05
    fresh_days: Annotated[float, Field(gt=0)] = 7
    query_items: bool = False
    """Half of the requests start from an item that is looked at (``query_item_id``)."""

    @classmethod
    def of(cls, **values: Any) -> "WorldConfig":
        """The world of ``values``; a :class:`ConfigError` names each field that cannot be, its value and the bound."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("; ".join(_problem(each) for each in error.errors())) from None

    @property
    def last_day(self) -> date:
        return self.first_day + timedelta(days=self.days - 1)

    def schema_of(self) -> Schema:
        """The data contract of this world."""
        query = {QUERY_ITEM_ID: Column(role=Role.KEY)} if self.query_items else {}
        return Schema(
            name="simulated",
            fresh_days=self.fresh_days,
            impressions={
                REQUEST_ID: Column(role=Role.KEY),
                EVENT_TIMESTAMP: Column(role=Role.TIME),
                USER_ID: Column(role=Role.KEY),
                ITEM_ID: Column(role=Role.KEY),
                **query,
                CLICK: Column(role=Role.ACTION, utility=1.0),
                SAVE: Column(role=Role.ACTION, utility=3.0),
                POSITION: Column(role=Role.META, description="1 is the top"),
                "surface": Column(role=Role.CONTEXT, kind=Kind.CATEGORICAL),
            },
            items={
                ITEM_ID: Column(role=Role.KEY),
                CREATED_AT: Column(role=Role.TIME),
                "category": Column(role=Role.CONTENT, kind=Kind.CATEGORICAL),
                "author": Column(role=Role.CONTENT, kind=Kind.CATEGORICAL),
                "tags": Column(role=Role.CONTENT, kind=Kind.MULTI_VALUED, max_values=_TAGS_PER_ITEM),
                "duration": Column(role=Role.CONTENT, kind=Kind.NUMERIC, transform="log1p", description="seconds"),
                "embedding": Column(role=Role.CONTENT, kind=Kind.EMBEDDING, dim=self.embedding_dim),
            },
            users={
                USER_ID: Column(role=Role.KEY),
                "country": Column(role=Role.PROFILE, kind=Kind.CATEGORICAL),
                "age_group": Column(role=Role.PROFILE, kind=Kind.CATEGORICAL),
                "tenure_days": Column(role=Role.PROFILE, kind=Kind.NUMERIC, transform="log1p"),
            },
            history=HistoryConfig(sequence_length=20, affinity=("category",), siblings=("author", "category")),
        )


def simulate(out: Path, world: WorldConfig) -> Dataset:
    """Write the world under ``out`` and open it; the same ``world`` gives byte-identical files."""
    # The truth waits beside ``out``, because writing the dataset replaces ``out`` as a whole.
    truth = out.parent / f".{out.name}.{TRUTH}"
    shutil.rmtree(truth, ignore_errors=True)
    people, catalogue = _users(world), _items(world)
    try:
        dataset = write_dataset(
            out,
            world.schema_of(),
            _impressions(world, people, catalogue, truth),
            _items_table(world, catalogue),
            _users_table(people),
            {"adapter": "simulator", "world": world.model_dump(mode="json")},
        )
        truth.rename(out / TRUTH)
    finally:
        shutil.rmtree(truth, ignore_errors=True)
    return dataset


def _problem(error: Any) -> str:
    wrong = error["msg"].lower().replace("input should be", "expected a value")
    return f"{'.'.join(map(str, error['loc']))}: received {error['input']!r}, {wrong}"


@dataclass(frozen=True)
class Users:
    """Row u is user u + 1."""

    taste: Floats
    """[U, latent], unit length."""
    category_share: Floats
    """[U, categories] cumulative: what the logging policy knows of the taste."""
    activity: Floats
    """[U] cumulative share of all requests."""
    country: Ints
    age_group: Ints
    tenure_days: Ints


@dataclass(frozen=True)
class Items:
    """Row i is item i + 1; rows are in order of creation."""

    created: Ints
    """[I] microseconds since the world's first midnight, negative for what was there before."""
    category: Ints
    author: Ints
    tags: Ints
    duration: Floats
    """[I] seconds, NaN where missing."""
    latent: Floats
    """[I, latent], unit length: the item's place in the space of tastes."""
    quality: Floats
    embedding: Floats
    """[I, embedding], a NaN row where missing: latent and quality, rotated, with noise."""


@dataclass(frozen=True)
class _Map:
    """Where categories, authors and embeddings lie; drawn once per world."""

    centres: Floats
    author_quality: Floats
    author_category: Ints
    rotation: Floats

    @classmethod
    def of(cls, world: WorldConfig) -> "_Map":
        rng = _rng(world, _STREAM_MAP)
        return cls(
            centres=_unit(rng.normal(size=(world.categories, world.latent_dim))),
            author_quality=rng.normal(scale=0.6, size=world.authors),
            author_category=rng.integers(world.categories, size=world.authors),
            rotation=rng.normal(size=(world.latent_dim + 1, world.embedding_dim)) / np.sqrt(world.latent_dim + 1),
        )


def _rng(world: WorldConfig, stream: int, day: int = 0) -> np.random.Generator:
    return np.random.default_rng([world.seed, stream, day])


def _unit(vectors: Floats) -> Floats:
    length: Floats = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / length


def _sigmoid(logit: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-logit))


def _users(world: WorldConfig) -> Users:
    rng, centres = _rng(world, _STREAM_USERS), _Map.of(world).centres
    age_group = rng.integers(_AGE_GROUPS, size=world.users)
    # An age group has one favourite category, a user one more of their own.
    shared, own = age_group % world.categories, rng.integers(world.categories, size=world.users)
    noise = rng.normal(scale=0.2, size=(world.users, world.latent_dim))
    taste = _unit(0.6 * centres[shared] + centres[own] + noise)
    appeal = np.exp(4.0 * taste @ centres.T)
    weight = rng.lognormal(sigma=1.0, size=world.users)
    return Users(
        taste=taste,
        category_share=np.cumsum(appeal / appeal.sum(axis=1, keepdims=True), axis=1),
        activity=np.cumsum(weight) / weight.sum(),
        country=rng.integers(_COUNTRIES, size=world.users),
        age_group=age_group,
        tenure_days=rng.integers(1, 1_000, size=world.users),
    )


def _items(world: WorldConfig) -> Items:
    """All items the world will see; those of a day come from that day's stream (day 0: what was there before)."""
    places = _Map.of(world)
    before = _items_created(world, places, 0, world.items_at_start, -90, 0)
    daily = [_items_created(world, places, day + 1, world.new_items_per_day, day, day + 1) for day in range(world.days)]
    parts = [vars(part) for part in [before, *daily]]
    return Items(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _items_created(world: WorldConfig, places: _Map, stream: int, count: int, start: int, end: int) -> Items:
    """``count`` items created from the start of day ``start`` to the start of day ``end``."""
    rng = _rng(world, _STREAM_ITEMS, stream)
    author = rng.integers(world.authors, size=count)
    stray = rng.random(count) < 0.2
    category = np.where(stray, rng.integers(world.categories, size=count), places.author_category[author])
    latent = _unit(places.centres[category] + rng.normal(scale=0.3, size=(count, world.latent_dim)))
    quality = places.author_quality[author] + rng.normal(scale=0.6, size=count)
    tags = (category[:, None] * _TAGS_PER_ITEM + rng.integers(8, size=(count, _TAGS_PER_ITEM))) % world.tags
    embedding = np.column_stack([latent, quality]) @ places.rotation
    embedding += rng.normal(scale=0.15, size=embedding.shape)
    embedding[rng.random(count) < world.missing_embeddings] = np.nan
    duration = rng.lognormal(mean=4.0 + 0.2 * quality, sigma=0.6)
    duration[rng.random(count) < world.missing_durations] = np.nan
    created = np.sort(rng.integers(start * _MICROSECONDS_PER_DAY, end * _MICROSECONDS_PER_DAY, size=count))
    return Items(created, category, author, tags, duration, latent, quality, embedding)


def _items_table(world: WorldConfig, items: Items) -> pl.DataFrame:
    tags = pl.Series("tags", items.tags).cast(pl.List(pl.Int64)).list.unique(maintain_order=True)
    embedding = pl.Series("embedding", items.embedding.astype(np.float32)).cast(pl.List(pl.Float32))
    missing = pl.Series(np.isnan(items.embedding[:, 0]))
    return pl.DataFrame(
        {
            ITEM_ID: np.arange(1, len(items.created) + 1),
            CREATED_AT: _timestamps(world, items.created),
            "category": items.category,
            "author": items.author,
            "tags": tags,
            "duration": pl.Series(items.duration.astype(np.float32)).fill_nan(None),
            "embedding": embedding,
        }
    ).with_columns(pl.when(~missing).then("embedding").alias("embedding"))


def _users_table(users: Users) -> pl.DataFrame:
    return pl.DataFrame(
        {
            USER_ID: np.arange(1, len(users.country) + 1),
            "country": users.country,
            "age_group": users.age_group,
            "tenure_days": users.tenure_days.astype(np.float32),
        }
    )


def _timestamps(world: WorldConfig, microseconds: Ints) -> pl.Series:
    start = int(midnight(world.first_day, 0).timestamp()) * 1_000_000
    return pl.Series(start + microseconds).cast(pl.Datetime("us", "UTC"))


def _impressions(world: WorldConfig, users: Users, items: Items, truth: Path) -> Iterator[pl.DataFrame]:
    """The log, day by day; writes each day's truth beside it."""
    policy = _Policy(world, users, items)
    calendar = list(days(world.first_day, world.last_day))
    for day in track(range(world.days), "simulating", console=Console(stderr=True), transient=True):
        log = _day(world, users, items, policy, day)
        folder = truth / f"date={calendar[day].isoformat()}"
        folder.mkdir(parents=True)
        log.select(REQUEST_ID, ITEM_ID, *TRUE_PROBABILITIES).write_parquet(folder / "part-0.parquet")
        yield log.drop(TRUE_PROBABILITIES)


def _day(world: WorldConfig, users: Users, items: Items, policy: "_Policy", day: int) -> pl.DataFrame:
    rng = _rng(world, _STREAM_DAYS, day)
    policy.start_day(day)
    requests = max(1, world.impressions_per_day // world.candidates)
    start, first = day * _MICROSECONDS_PER_DAY, day * requests + 1
    time = np.sort(rng.integers(start, start + _MICROSECONDS_PER_DAY, size=requests))
    blocks = [
        _block(world, users, items, policy, rng, first + at, time[at : at + _REQUESTS_PER_BLOCK])
        for at in range(0, requests, _REQUESTS_PER_BLOCK)
    ]
    log = pl.concat(blocks)
    policy.observe(log[ITEM_ID].to_numpy() - 1, log[CLICK].to_numpy())
    return log


def _block(
    world: WorldConfig,
    users: Users,
    items: Items,
    policy: "_Policy",
    rng: np.random.Generator,
    first_request: int,
    time: Ints,
) -> pl.DataFrame:
    """What the requests at ``time`` [R] were shown and did: one row per impression, best position first."""
    user = np.minimum(np.searchsorted(users.activity, rng.random(len(time))), len(users.country) - 1)
    query = _queries(world, policy, rng, len(time))
    shown = policy.show(rng, user, time, np.where(query < 0, -1, items.category[query]))
    request, position = np.nonzero(shown >= 0)
    item = shown[request, position]
    age_days = (time[request] - items.created[item]) / _MICROSECONDS_PER_DAY
    truth = _truth(items, users.taste[user[request]], query[request], item, age_days, position)
    labels = _act(rng, truth)
    surface = rng.integers(_SURFACES, size=len(time))
    asked = {QUERY_ITEM_ID: pl.Series(query[request] + 1).replace(0, None)} if world.query_items else {}
    return pl.DataFrame(
        {
            REQUEST_ID: first_request + request,
            EVENT_TIMESTAMP: _timestamps(world, time[request]),
            USER_ID: user[request] + 1,
            ITEM_ID: item + 1,
            **asked,
            **labels,
            POSITION: position + 1,
            "surface": surface[request],
            **{name: values.astype(np.float32) for name, values in truth.items()},
        }
    )


def _queries(world: WorldConfig, policy: "_Policy", rng: np.random.Generator, count: int) -> Ints:
    """[R] row of the item the request starts from, -1 for none."""
    if not world.query_items:
        return np.full(count, -1)
    return np.where(rng.random(count) < 0.5, policy.popular(rng, (count, 1))[:, 0], -1)


def _truth(items: Items, taste: Floats, query: Ints, item: Ints, age_days: Floats, position: Ints) -> dict[str, Floats]:
    """True probabilities of N impressions, as shown and had each stood at the top.

    A click needs quality, match of taste (and of the query), novelty that fades, and position; a save needs a click.
    """
    quality, latent = items.quality[item], items.latent[item]
    match = (taste * latent).sum(axis=1)
    related = np.where(query < 0, 0.0, (items.latent[query] * latent).sum(axis=1))
    top = -2.9 + quality + 2.8 * match + 0.8 * related + 0.4 * np.exp(-age_days / 5.0)
    after_click = _sigmoid(-2.0 + 0.6 * quality + 1.2 * match)
    relevance, probability = _sigmoid(top), _sigmoid(top - 0.35 * np.log1p(position))
    return dict(
        zip(
            TRUE_PROBABILITIES,
            (probability, relevance, probability * after_click, relevance * after_click),
            strict=True,
        )
    )


def _act(rng: np.random.Generator, truth: dict[str, Floats]) -> dict[str, npt.NDArray[np.int8]]:
    """One draw per impression: saved below the probability of a save, clicked below that of a click."""
    draw = rng.random(len(truth[f"{CLICK}_probability"]))
    return {action: (draw < truth[f"{action}_probability"]).astype(np.int8) for action in (CLICK, SAVE)}


class _Policy:
    """The recommender that wrote the log: retrieves and ranks by the clicks of past days."""

    def __init__(self, world: WorldConfig, users: Users, items: Items) -> None:
        self._world, self._users, self._items = world, users, items
        self._clicks = np.zeros(len(items.created))
        self._shown = np.zeros(len(items.created))

    def start_day(self, day: int) -> None:
        """Freeze what the policy knows at midnight."""
        known = np.searchsorted(self._items.created, day * _MICROSECONDS_PER_DAY)
        weight = np.sqrt(self._clicks[:known] + 1.0)
        category = self._items.category[:known]
        self._by_category = np.argsort(category, kind="stable")
        self._popularity = np.cumsum(weight)
        self._category_weight = np.concatenate([[0.0], np.cumsum(weight[self._by_category])])
        self._category_start = np.searchsorted(category[self._by_category], np.arange(self._world.categories + 1))
        self._recent = np.searchsorted(self._items.created, (day - self._world.fresh_days) * _MICROSECONDS_PER_DAY)
        prior = (self._clicks.sum() + 1.0) / (self._shown.sum() + 10.0)
        self._rate = np.log((self._clicks + 10.0 * prior) / (self._shown + 10.0))

    def observe(self, item: Ints, click: Ints) -> None:
        """Learn from a finished day: rows of shown items and whether they were clicked."""
        self._shown += np.bincount(item, minlength=len(self._shown))
        self._clicks += np.bincount(item, weights=click, minlength=len(self._clicks))

    def popular(self, rng: np.random.Generator, shape: tuple[int, int]) -> Ints:
        draws = rng.random(shape) * self._popularity[-1]
        rows: Ints = np.searchsorted(self._popularity, draws, side="right")
        return rows

    def show(self, rng: np.random.Generator, user: Ints, time: Ints, category: Ints) -> Ints:
        """[R, candidates] rows of distinct items, best first; -1 pads a list that ran short.

        ``category`` [R] is what the request is about, -1 where only the user's taste is known.
        """
        retrieved = self._retrieve(rng, user, time, category)
        score = self._rate[retrieved] + np.log(self._affinity(user, self._items.category[retrieved]) + 0.02)
        score += rng.gumbel(scale=0.5, size=score.shape)
        score[_repeats(retrieved)] = -np.inf
        best = np.argsort(-score, axis=1)[:, : self._world.candidates]
        return np.where(np.isinf(_pick(score, best)), -1, _pick(retrieved, best))

    def _retrieve(self, rng: np.random.Generator, user: Ints, time: Ints, category: Ints) -> Ints:
        world, rows = self._world, len(user)
        explored = round(world.retrieved * world.exploration)
        personal = min(round(world.retrieved * world.personalised), world.retrieved - explored)
        uniform = self._explore(rng, time, explored)
        favourite = self._favourite(rng, user, category, personal)
        popular = self.popular(rng, (rows, world.retrieved - explored - personal))
        return np.concatenate([uniform, favourite, popular], axis=1)

    def _explore(self, rng: np.random.Generator, time: Ints, count: int) -> Ints:
        """Uniform over what exists at ``time`` [R]: even columns over the recent items, odd ones over all."""
        alive = np.searchsorted(self._items.created, time)
        oldest = np.where(np.arange(count) % 2 == 0, np.minimum(self._recent, alive - 1)[:, None], 0)
        return oldest + (rng.random((len(time), count)) * (alive[:, None] - oldest)).astype(np.int64)

    def _favourite(self, rng: np.random.Generator, user: Ints, category: Ints, count: int) -> Ints:
        draws = rng.random((len(user), count))
        liked = (draws[:, :, None] > self._users.category_share[user][:, None, :]).sum(axis=2)
        liked = np.where(category[:, None] < 0, liked, category[:, None])
        start = self._category_weight[self._category_start[liked]]
        width = self._category_weight[self._category_start[liked + 1]] - start
        place = np.searchsorted(self._category_weight, start + rng.random(start.shape) * width, side="right") - 1
        rows: Ints = self._by_category[np.minimum(place, len(self._by_category) - 1)]
        return rows

    def _affinity(self, user: Ints, category: Ints) -> Floats:
        share = np.diff(self._users.category_share, axis=1, prepend=0.0)
        return share[user[:, None], category]


def _pick(values: Any, order: Ints) -> Any:
    return np.take_along_axis(values, order, axis=1)


def _repeats(rows: Ints) -> npt.NDArray[np.bool_]:
    """True where a value stood earlier in its row."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = _pick(rows, order)
    repeated = np.zeros(rows.shape, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeated
