"""Ids in, scores out, through a real Triton and a real online store."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import numpy as np
import polars as pl
import pytest
from ranking_world import RUN_DATE, WORLD, RankingWorld, noon
from tritonclient.grpc import InferenceServerClient as GrpcClient
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from freshrank.errors import ServingError
from freshrank.frames import Frame
from freshrank.serving.bundle import Tensors
from freshrank.serving.client import Answer, Client, TritonClient, on_wire
from freshrank.serving.protocol import MAX_CANDIDATES
from freshrank.serving.publish import publish, rollback
from freshrank.serving.ranking import BadRequest, NothingPublished, OnlineReader, Query, RankingService
from freshrank.serving.repository import ModelRepository
from freshrank.settings import settings
from tests.worlds import tiny_schema

UNKNOWN = 10_000_000
TOLERANCE = 1e-5


def ask(world: RankingWorld, logged: Frame) -> Answer:
    """Send a logged request as a client would."""
    rows = logged.rows
    first = rows.row(0, named=True)
    with Client.for_dataset(world.data) as client:
        return client.rank(
            first["user_id"], rows["item_id"].to_list(), first["event_timestamp"],
            {"surface": first["surface"]}, first["query_item_id"],
        )  # fmt: skip


def rank_noon(world: RankingWorld, user: int, items: list[int]) -> Answer:
    with Client.for_dataset(world.data) as client:
        return client.rank(user, items, at=noon(RUN_DATE))


def request(**tensors: object) -> Tensors:
    """A valid request with some tensors replaced."""
    arrays = {"user_id": np.array([1]), "item_ids": np.arange(1, 4)} | tensors
    return {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}


def test_the_server_answers_logged_requests_as_the_offline_features_would(world: RankingWorld) -> None:
    """No skew: online and offline features of the same request give the same probabilities, and they do differ."""
    ranker, items = world.served_ranker(), world.dataset.items()
    everything = []
    for logged in world.requests(60):
        expected, answer = ranker.score(logged, items), ask(world, logged)
        assert np.abs(answer.probabilities - expected["probabilities"]).max() < TOLERANCE
        assert np.abs(answer.score - expected["score"]).max() < TOLERANCE * sum(world.dataset.schema.utilities)
        assert (answer.cold == (logged.rows["item_age_days"] < WORLD.fresh_days).to_numpy()).all()
        assert answer.known.all()
        assert not answer.degraded
        everything.append(answer.probabilities)
    assert np.concatenate(everything).std(axis=0).min() > 100 * TOLERANCE


def test_features_that_are_missing_altogether_score_the_same_online_and_offline(world: RankingWorld) -> None:
    """Unknown user, unknown items, unknown query: what the model sees is what nulls in a frame would show it."""
    ranker, items = world.served_ranker(), world.dataset.items()
    for logged in world.requests(10):
        missing = without_features(logged)
        answer = ask(world, missing)
        expected = ranker.score(missing, items)["probabilities"]
        assert np.abs(answer.probabilities - expected).max() < TOLERANCE
        assert answer.cold.all()
        assert not answer.known.any()


def without_features(frame: Frame) -> Frame:
    def emptied(table: pl.DataFrame, key: str) -> pl.DataFrame:
        nulls = [pl.lit(None, table.schema[name]).alias(name) for name in table.columns if name not in (key, "day")]
        return table.with_columns(pl.col(key) + UNKNOWN, *nulls)

    ids = [pl.col(name) + UNKNOWN for name in ("user_id", "item_id", "query_item_id")]
    rows = frame.rows.with_columns(*ids, pl.lit(0.0, pl.Float32).alias("item_age_days"))
    return Frame(emptied(frame.users, "user_id"), emptied(frame.items, "item_id"), rows)


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
        Query.parse(request(**tensors), tiny_schema())


def test_a_context_value_marked_as_absent_is_missing_whatever_it_holds() -> None:
    """Without marks every value that was sent is there, and a column that was not sent is missing."""
    schema = tiny_schema()
    sent = request(context_categorical=np.array([2]), context_numeric=np.array([np.nan], np.float32),
                   context_present=np.array([True, False]))  # fmt: skip
    assert {name: value.tolist() for name, value in Query.parse(sent, schema).context.items()} == {"surface": [2, 2, 2]}
    assert not Query.parse(request(), schema).context


def test_a_broken_online_store_degrades_the_answer_and_mends_without_a_restart(world: RankingWorld) -> None:
    """Damaged or gone: finite answers from missing features, marked and counted; once it is back all is as before."""
    before, degraded = rank_noon(world, 1, [1, 2, 3]), counted(world, "degraded")
    content = world.online_store.read_bytes()
    for damage in (b"not a database" * 500, b""):
        world.online_store.write_bytes(damage)
        answer = rank_noon(world, 1, [1, 2, 3])
        assert answer.degraded
        assert answer.cold.all()
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


def test_a_store_that_never_answers_costs_one_deadline_and_no_more(world: RankingWorld) -> None:
    """The first read is given up in time, later ones do not wait behind it, and once it ends all is well again."""
    reader = OnlineReader(world.dataset.schema, settings().home, seconds=0.5)
    before = reader.read(1, [1])
    release, started = hang(reader), time.monotonic()
    for sentence in ("no answer from the online store within 0.5 s", "still hangs", "still hangs"):
        with pytest.raises(TimeoutError, match=sentence):
            reader.read(1, [1])
    assert time.monotonic() - started < 1
    release()
    assert reader._pending
    reader._pending.exception(10)
    with pytest.raises(ConnectionError):
        reader.read(1, [1])
    assert reader.read(1, [1]).items.equals(before.items)


def hang(reader: OnlineReader) -> Callable[[], None]:
    """Let the reader's store wait, and then fail, at its next read until the returned function is called."""
    released, store = threading.Event(), reader._store

    def wait(ids: list[int]) -> None:
        released.wait(30)
        raise ConnectionError("the store is gone")

    store.online_users = wait
    return released.set


def test_before_anything_is_published_a_request_is_told_so(tmp_path: Path) -> None:
    """`ranking` loads without a pointer: the server can stand before the first bundle exists."""
    service = RankingService(ModelRepository(tmp_path), tmp_path, lambda version, blocks: {})
    service.warm_up()
    with pytest.raises(NothingPublished, match="freshrank publish"):
        service.rank(request())


def test_the_answering_version_is_that_of_the_pointer_at_the_next_request(world: RankingWorld) -> None:
    """Publication and roll-back both take effect at once, for requests that name no version."""
    first = rank_noon(world, 1, [1, 2, 3])
    second_version = world.publish(seed=1).version
    second = rank_noon(world, 1, [1, 2, 3])
    rollback(settings().triton_grpc_url, world.repository)
    third = rank_noon(world, 1, [1, 2, 3])
    assert [first.model_version, second.model_version, third.model_version] == [1, second_version, 1]
    assert np.abs(second.probabilities - first.probabilities).max() > 100 * TOLERANCE
    assert np.abs(third.probabilities - first.probabilities).max() < 1e-6


def test_a_version_that_was_rolled_back_returns_only_when_it_is_told_to(world: RankingWorld) -> None:
    """Running the day again leaves the roll-back in force; `--force` does not."""
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
