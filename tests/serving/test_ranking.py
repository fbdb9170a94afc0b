"""Ids in, scores out, through a real Triton and a real online store."""

import os
import signal
import sqlite3
import time
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import numpy as np
import polars as pl
import pytest
from ranking_world import RUN_DATE, WORLD, RankingWorld, never_asked, noon
from tritonclient.grpc import InferenceServerClient as GrpcClient
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from freshrank.bundle.golden import Tensors
from freshrank.errors import ServingError
from freshrank.features.frames import Frame
from freshrank.schema import Schema
from freshrank.serving.client import Answer, Client
from freshrank.serving.deploy.publish import publish, rollback
from freshrank.serving.protocol import MAX_CANDIDATES, off_wire, on_wire
from freshrank.serving.ranking.query import BadRequest, Query, check_tensors
from freshrank.serving.ranking.ranked import Ranked
from freshrank.serving.ranking.served import NothingPublished
from freshrank.serving.ranking.service import RankingService, online_features
from freshrank.serving.repository import ModelRepository
from freshrank.serving.triton import TritonClient
from freshrank.settings import settings
from tests.worlds import tiny_schema

UNKNOWN = 10_000_000
TOLERANCE = 1e-5


def ask(client: Client, rows: pl.DataFrame) -> Answer:
    """Send a logged request as a client would."""
    first = rows.row(0, named=True)
    return client.rank(
        first["user_id"],
        rows["item_id"].to_list(),
        first["event_timestamp"],
        {"surface": first["surface"]},
        first["query_item_id"],
    )


def rank_noon(world: RankingWorld, user: int, items: list[int]) -> Answer:
    with Client.for_dataset(world.data) as client:
        return client.rank(user, items, at=noon(RUN_DATE))


def request(**tensors: object) -> Tensors:
    """A valid request with some tensors replaced."""
    arrays = {"user_id": np.array([1]), "item_ids": np.arange(1, 4)} | tensors
    return {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}


@pytest.mark.parametrize("missing", [(), ("user",), ("item",), ("user", "item")], ids="-".join)
def test_the_server_answers_every_logged_request_as_the_trainer_would(
    world: RankingWorld, missing: tuple[str, ...]
) -> None:
    """No skew: over 1,000 requests, as logged and with users, items or both that nobody knows, online and offline
    features give the same probabilities and scores within 1e-5; and they do differ from one another."""
    whole = without(world.logged, missing)
    expected = world.served_ranker().score(whole, world.dataset.items())
    utility = sum(world.dataset.schema.utilities)
    logged = whole.rows.with_row_index("place").partition_by("request_id", maintain_order=True)
    assert len(logged) >= 333
    with Client.for_dataset(world.data) as client:
        for rows in logged:
            answer, places = ask(client, rows), rows["place"]
            assert np.abs(answer.probabilities - expected["probabilities"][places]).max() < TOLERANCE
            assert np.abs(answer.score - expected["score"][places]).max() < TOLERANCE * utility
            assert (answer.cold == (rows["item_age_days"] < WORLD.fresh_days).to_numpy()).all()
            assert (answer.known == ("item" not in missing)).all()
            assert not answer.degraded
    if "item" not in missing:
        assert expected["probabilities"].std(axis=0).min() > 100 * TOLERANCE


def without(frame: Frame, missing: tuple[str, ...]) -> Frame:
    """The frame of users or items that nothing is known of."""

    def emptied(table: pl.DataFrame, key: str) -> pl.DataFrame:
        nulls = [pl.lit(None, table.schema[name]).alias(name) for name in table.columns if name not in (key, "day")]
        return table.with_columns(pl.col(key) + UNKNOWN, *nulls)

    rows, tables = frame.rows, {"user": frame.users, "item": frame.items}
    for name in missing:
        tables[name] = emptied(tables[name], f"{name}_id")
        rows = rows.with_columns(pl.col(column) + UNKNOWN for column in rows.columns if column.endswith(f"{name}_id"))
    if "item" in missing:
        rows = rows.with_columns(pl.lit(0.0, pl.Float32).alias("item_age_days"))
    return Frame(tables["user"], tables["item"], rows)


def test_unknown_candidates_stand_beside_known_ones_without_touching_them(world: RankingWorld) -> None:
    """A catalogue ahead of the store is no error: the new items are finite, cold and marked as unknown."""
    alone = rank_noon(world, 1, [1, 2, 3])
    mixed = rank_noon(world, 1, [1, UNKNOWN, 2, -1, 3])
    assert np.isfinite(mixed.probabilities).all()
    assert mixed.known.tolist() == [True, False, True, False, True]
    assert mixed.cold[[1, 3]].all()
    assert np.abs(mixed.score[[0, 2, 4]] - alone.score).max() < 1e-6


@pytest.mark.parametrize("count", [1, 2, 999, MAX_CANDIDATES])
def test_any_number_of_candidates_repeated_ones_too_is_answered(world: RankingWorld, count: int) -> None:
    """From one candidate to the most that are allowed; the same id twice gets the same score twice."""
    items = [1 + place % 150 for place in range(count)]
    answer = rank_noon(world, 1, items)
    assert answer.probabilities.shape == (count, 2)
    assert np.ptp(answer.score[np.array(items) == 1]) < 1e-6


def parsed(tensors: Tensors, schema: Schema) -> Query:
    """As the service does it: the tensors first, then what the schema says of them."""
    check_tensors(tensors)
    return Query.of(tensors, schema)


def test_the_time_of_the_request_decides_how_old_an_item_is(world: RankingWorld) -> None:
    """The same item is cold in its first week and warm after it; no time given means now."""
    born = world.dataset.items().filter(pl.col("item_id") == 1)["created_at"][0]
    with Client.for_dataset(world.data) as client:
        flags = [client.rank(1, [1], at).cold[0] for at in (born, noon(RUN_DATE), None)]
    assert flags == [True, False, False]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"item_ids": np.zeros(0, np.int64)}, "received 0 candidates, expected 1 to 2000"),
        ({"item_ids": np.zeros(2001, np.int64)}, "received 2001 candidates, expected 1 to 2000"),
        ({"event_time": np.array([-5])}, "event_time: received -5, expected microseconds since 1970"),
        ({"context_categorical": np.array([1, 2])}, r"context_categorical: received 2 values, expected 1.*'surface'"),
        ({"context_numeric": np.ones(3, np.float32)}, "context_numeric: received 3 values, expected 0"),
        ({"context_present": np.array([True, True])}, "context_present: received 2 values, expected 1"),
    ],
    ids=["no candidates", "too many", "negative time", "categorical count", "numeric count", "present count"],
)
def test_a_malformed_request_is_told_what_was_received_and_expected(
    world: RankingWorld, tensors: Tensors, sentence: str
) -> None:
    """The code is INVALID_ARGUMENT, so that a client does not try again."""
    with GrpcClient(settings().triton_grpc_url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
        inputs = []
        for name, value in on_wire(request(**tensors)).items():
            inputs.append(InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)))
            inputs[-1].set_data_from_numpy(value)
        with pytest.raises(InferenceServerException, match=sentence) as caught:
            client.infer("ranking", inputs)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"item_ids": None}, r"received tensors \['user_id'\], expected \['user_id', 'item_ids'\]"),
        ({"colour": np.ones(1)}, "received tensors .*colour"),
        ({"user_id": np.ones(1, np.float32)}, r"user_id: received float32 of shape \[1\], expected int64"),
        ({"user_id": np.array([1, 2])}, r"user_id: received int64 of shape \[2\]"),
        ({"item_ids": np.ones((2, 2), np.int64)}, r"item_ids: received int64 of shape \[2, 2\]"),
        ({"context_numeric": np.array([np.nan], np.float32)}, "'hour': received nan, expected a finite number"),
        ({"context_numeric": np.array([np.inf], np.float32)}, "'hour': received inf, expected a finite number"),
    ],
    ids=["missing", "unknown", "dtype", "shape", "rank", "NaN", "infinite"],
)
def test_what_triton_would_let_through_is_checked_as_well(tensors: dict, sentence: str) -> None:
    """The service stands on its own: names, dtypes and shapes, and numbers that are none."""
    with pytest.raises(BadRequest, match=sentence):
        parsed(request(**tensors), tiny_schema())


def test_a_context_value_marked_as_absent_is_missing_whatever_it_holds() -> None:
    """Without marks every value that was sent is there, and a column that was not sent is missing."""
    schema = tiny_schema()
    sent = request(
        context_categorical=np.array([2]),
        context_numeric=np.array([np.nan], np.float32),
        context_present=np.array([True, False]),
    )
    assert parsed(sent, schema).context == {"surface": 2}
    assert not parsed(request(), schema).context


def test_a_broken_online_store_degrades_the_answer_and_mends_without_a_restart(world: RankingWorld) -> None:
    """Damaged or gone: finite answers, marked and counted, items read lately still known and all others missing; once
    the store is back all is as before."""
    before, degraded = rank_noon(world, 1, [1, 2, 3]), counted(world, "degraded")
    content = world.online_store.read_bytes()
    for damage in (b"not a database" * 500, b""):
        world.online_store.write_bytes(damage)
        answer = rank_noon(world, 1, [1, 2, 3, never_asked(world)])
        assert answer.degraded
        assert answer.known.tolist() == [True, True, True, False]
        assert answer.cold[3]
        assert np.isfinite(answer.probabilities).all()
        assert np.isfinite(answer.score).all()
    assert counted(world, "degraded") == degraded + 2
    world.online_store.write_bytes(content)
    after = rank_noon(world, 1, [1, 2, 3])
    assert not after.degraded
    assert np.abs(after.score - before.score).max() < 1e-6


def counted(world: RankingWorld, outcome: str) -> float:
    """The counter of ranking requests on the metrics port."""
    opener = build_opener(ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{world.server.ports.metrics}/metrics") as page:
        lines = page.read().decode().splitlines()
    label = f'outcome="{outcome}"'
    return sum(float(line.split()[-1]) for line in lines if line.startswith("freshrank_ranking_req") and label in line)


def test_a_store_that_does_not_answer_costs_one_deadline_and_no_more(world: RankingWorld) -> None:
    """While somebody else holds the store: the first read is given up in time and the next ones do not wait; after a
    moment it is asked again, and once it answers all is well."""
    features = online_features(world.dataset.schema, world.workspace)
    nobody, items = np.zeros(0, np.int64), np.array([1])
    before = features.read(np.array([1]), items, nobody)
    with closing(sqlite3.connect(world.online_store, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        problems = [str(features.read(np.array([1]), items, nobody).problem) for _ in range(50)]
        other.execute("ROLLBACK")
    assert problems[0] == "database is locked"
    assert set(problems[1:]) == {"the online store did not answer in time a moment ago and is left alone"}
    assert before.problem is None
    deadline = time.monotonic() + 60
    while (after := features.read(np.array([1]), items, nobody)).problem is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for name, array in before.users.arrays.items():
        np.testing.assert_array_equal(after.users.arrays[name], array)


def test_requests_that_are_answered_together_get_the_answers_they_get_alone(world: RankingWorld) -> None:
    """Other users, lengths and times beside them, and requests that are refused, change nothing."""
    service = RankingService(world.repository, settings().home, lambda version, blocks: ranker.run(blocks))
    ranker = world.served_ranker()
    requests = [
        request(user_id=np.array([user]), item_ids=np.arange(1, 2 + 7 * user), event_time=np.array([noon_us(user)]))
        for user in range(1, 8)
    ]
    requests[3:3] = [request(item_ids=np.zeros(0, np.int64)), request(version=np.array([77]))]
    together = service.rank([on_wire(each) for each in requests])
    assert [type(each) for each in together[3:5]] == [BadRequest, BadRequest]
    assert "version: received 77, expected one of the installed versions" in str(together[4])
    for each, batched in zip(requests, together, strict=True):
        (alone,) = service.rank([on_wire(each)])
        if isinstance(batched, Ranked):
            assert isinstance(alone, Ranked)
            assert len(batched.answer["score"]) == len(each["item_ids"])
            np.testing.assert_allclose(batched.answer["score"], alone.answer["score"], atol=1e-6)
            assert (batched.answer["cold"] == alone.answer["cold"]).all()
            np.testing.assert_equal(batched.inputs, alone.inputs)


def noon_us(user: int) -> int:
    """Noon of the day that many days before the served one, in microseconds."""
    return int(datetime.fromisoformat(noon(RUN_DATE - timedelta(days=user))).timestamp() * 1e6)


def test_before_anything_is_published_a_request_is_told_so(tmp_path: Path) -> None:
    """`ranking` loads without a pointer: the server can stand before the first bundle exists."""
    service = RankingService(ModelRepository(tmp_path), tmp_path, lambda version, blocks: {})
    service.warm_up()
    (refused,) = service.rank([on_wire(request())])
    assert isinstance(refused, NothingPublished)
    assert "freshrank publish" in str(refused)


def test_the_answering_version_is_that_of_the_pointer_at_the_next_request(world: RankingWorld) -> None:
    """Publication and rollback both take effect at once; a request that names a loaded version is answered by it."""
    served = world.repository.served()
    assert served
    first = rank_noon(world, 1, [1, 2, 3])
    second_version = world.publish(seed=1).version
    assert second_version != served.version
    second = rank_noon(world, 1, [1, 2, 3])
    rollback(settings().triton_grpc_url, world.repository)
    third = rank_noon(world, 1, [1, 2, 3])
    with TritonClient(settings().triton_grpc_url) as client:
        named = off_wire(
            client.infer(
                "ranking",
                on_wire(request(version=np.array([second_version]), event_time=np.array([noon_us(0)]))),
                ["model_version", "score"],
            )
        )
    assert named["model_version"] == [second_version]
    assert np.abs(named["score"] - second.score).max() < 1e-6
    assert [first.model_version, second.model_version, third.model_version] == [
        served.version,
        second_version,
        served.version,
    ]
    assert np.abs(second.probabilities - first.probabilities).max() > 100 * TOLERANCE
    assert np.abs(third.probabilities - first.probabilities).max() < 1e-6


def test_a_version_that_was_rolled_back_returns_only_when_it_is_told_to(world: RankingWorld) -> None:
    """Running the day again leaves the rollback in force; `--force` does not."""
    url, before, bundle = settings().triton_grpc_url, world.repository.served(), world.bundle(seed=1)
    assert before
    forced = publish(bundle, url, world.repository, force=True)
    assert forced.version != before.version
    back = rollback(url, world.repository)
    assert publish(bundle, url, world.repository) == back
    assert world.repository.served() == back


def test_answers_are_the_same_after_a_restart(world: RankingWorld) -> None:
    """kill -9, start, ask: the pointed version answers from the same store."""
    before = rank_noon(world, 1, [1, 2, 3])
    pid = world.server.status().pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ServingError):
        rank_noon(world, 1, [1, 2, 3])
    world.server.start()
    after = rank_noon(world, 1, [1, 2, 3])
    assert after.model_version == before.model_version
    assert np.abs(after.probabilities - before.probabilities).max() < 1e-6


def test_a_refusal_of_the_ranker_is_an_error_not_an_answer(world: RankingWorld) -> None:
    """A version that is not loaded cannot be answered for: the client hears Triton's reason."""
    pointer = world.repository.served()
    assert pointer
    with TritonClient.controlling(world.repository, settings().triton_grpc_url) as client:
        client.unload("ranker")
        try:
            with pytest.raises(ServingError, match=f"ranker version {pointer.version}"):
                rank_noon(world, 1, [1])
        finally:
            client.load("ranker", world.repository.ranker_config_json(pointer.live))
    assert rank_noon(world, 1, [1]).model_version == pointer.version
