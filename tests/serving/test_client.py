"""Clients speak the log's own ids, times and values."""

import asyncio
import re
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from ranking_world import RUN_DATE, RankingWorld, noon
from served import Served
from tritonclient.grpc.model_config_pb2 import ModelConfig

from freshrank.errors import ConfigError, ServerUnreachable, ServingError
from freshrank.schema import Schema
from freshrank.serving.client import UNKNOWN_ID, Answer, AsyncClient, Client, Codes, unknown_id
from freshrank.serving.client.session import context_tensors, microseconds
from freshrank.serving.connection import refuse_other_project
from freshrank.serving.triton import TritonClient
from freshrank.settings import settings
from tests.worlds import tiny_schema


@pytest.fixture
def codes(tmp_path: Path) -> Codes:
    """Items a and b, surface "home"; user ids are integers in the log."""
    for name, values in {"item_id": ["a", "b"], "surface": ["feed", "home"]}.items():
        table = pl.DataFrame({"value": values, "code": pl.int_range(len(values), eager=True)})
        table.write_parquet(tmp_path / f"{name}.parquet")
    return Codes(tmp_path)


def test_text_ids_are_translated_and_integers_pass_through(codes: Codes) -> None:
    """The query item shares the items' codes; text no import has seen is unknown, not an error."""
    assert [codes.id("item_id", value) for value in ("a", "b", 7, np.int64(8))] == [0, 1, 7, 8]
    assert codes.id("query_item_id", "b") == 1
    assert codes.id("item_id", "never seen") == unknown_id("never seen") < UNKNOWN_ID
    assert [codes.id("user_id", value) for value in ("12", "anna")] == [12, unknown_id("anna")]


def test_new_users_have_codes_of_their_own() -> None:
    """Else all of them would be one user: drawn into one arm, and one row in the request log."""
    assert unknown_id("anna") == -2 - (int("55579b557896d0ce", 16) >> 2)
    assert len({unknown_id(f"new-{number}") for number in range(1000)}) == 1000


@pytest.mark.parametrize("value", [None, 1.5, float("nan"), [1]])
def test_an_id_that_cannot_be_is_named(codes: Codes, value: Any) -> None:
    """A missing user is not a user; whole numbers of any type are."""
    with pytest.raises(ConfigError, match=r"user_id: received .* expected text or an integer"):
        codes.id("user_id", value)
    assert codes.id("user_id", np.float64(12.0)) == 12


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 1e300, float("inf"), True, np.True_])
def test_an_id_that_is_no_int64_is_refused_in_a_sentence(codes: Codes, tmp_path: Path, value: Any) -> None:
    """The column, what was received and what is expected; the ends of int64 are ids."""
    sentence = re.escape(f"user_id: received {value!r}, expected text or an integer, as in the log")
    with pytest.raises(ConfigError, match=f"^{sentence}(, within int64 .-2\\*\\*63 to 2\\*\\*63 - 1.)?$"):
        codes.id("user_id", value)
    with pytest.raises(ConfigError, match="user_id: received 9223372036854775808, expected text or an integer"):
        codes.id("user_id", "9223372036854775808")
    for end in (2**63 - 1, -(2**63)):
        assert codes.id("user_id", end) == codes.id("user_id", str(end)) == end
    with Client("127.0.0.1:1", tiny_schema(), tmp_path) as client:
        for user, items in ((value, [1]), (1, [1, value])):
            with pytest.raises(ConfigError, match=r"^(user|item)_id: received .* expected an integer"):
                client.rank_ids(user, items)


def test_half_a_surrogate_pair_is_text_that_no_import_has_seen() -> None:
    """A request's JSON may hold one, and UTF-8 does not."""
    assert unknown_id("\ud800") < UNKNOWN_ID


def test_a_text_is_no_list_of_candidates(tmp_path: Path) -> None:
    """Its letters would be ranked."""
    with Client("127.0.0.1:1", tiny_schema(), tmp_path) as client, pytest.raises(ConfigError, match="expected a list"):
        client.rank("anna", "2152")


def test_context_values_become_the_tensors_of_the_protocol(codes: Codes) -> None:
    """In the order of the schema, with a mark for each column that was given."""
    tensors = context_tensors(["surface=home"], tiny_schema(), codes)
    assert tensors["context_categorical"].tolist() == [1]
    assert tensors["context_present"].tolist() == [True, False]
    tensors = context_tensors({"hour": 13.5, "surface": "new here"}, tiny_schema(), codes)
    assert (tensors["context_categorical"].tolist(), tensors["context_numeric"].tolist()) == ([UNKNOWN_ID], [13.5])
    assert tensors["context_present"].tolist() == [True, True]
    assert context_tensors(None, tiny_schema(), codes) == context_tensors({"surface": None}, tiny_schema(), codes) == {}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["colour=red"], r"received column 'colour', expected one of \['surface', 'hour'\]"),
        (["surface"], "received 'surface', expected name=value"),
        (["hour=noon"], "'hour': received 'noon', expected a finite number"),
        ({"hour": float("nan")}, "'hour': received nan, expected a finite number"),
        ({"surface": float("nan")}, "'surface': received nan, expected text or an integer"),
    ],
    ids=["unknown column", "no value", "not a number", "NaN", "a category that is NaN"],
)
def test_a_context_that_cannot_be_is_named(codes: Codes, given: list[str], sentence: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ConfigError, match=sentence):
        context_tensors(given, tiny_schema(), codes)


def test_a_category_of_integers_refuses_text(tmp_path: Path) -> None:
    """The log holds codes of the user's own: there is nothing to translate a word to."""
    with pytest.raises(ConfigError, match="'surface': received 'home', expected an integer as in the log"):
        context_tensors(["surface=home"], tiny_schema(), Codes(tmp_path))


def test_a_time_has_a_zone() -> None:
    """The same instant in any notation; a local time would mean another day on another machine."""
    noon_utc = datetime(2024, 1, 6, 12, tzinfo=UTC)
    same = [
        "2024-01-06T12:00:00Z",
        "2024-01-06T20:00:00+08:00",
        noon_utc,
        noon_utc.astimezone(timezone(timedelta(hours=-5))),
    ]
    assert {microseconds(at) for at in same} == {1_704_542_400_000_000}
    for bad in ("2024-01-06T12:00:00", datetime(2024, 1, 6, 12), "noon"):
        with pytest.raises(ConfigError, match="expected a time with its zone"):
            microseconds(bad)


def test_rows_are_sorted_best_first(world: RankingWorld) -> None:
    """What `freshrank rank` prints: rank, item as it was given, score, one probability per action, flags."""
    with Client.for_dataset(world.data) as client:
        answer = client.rank("1", ["2", "1", "no such item"], at=noon(RUN_DATE), context=["surface=1"])
    rows = answer.rows()
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert [row["score"] for row in rows] == sorted(answer.score.tolist(), reverse=True)
    assert list(rows[0]) == ["rank", "item", "score", "p_click", "p_save", "cold", "known"]
    assert {row["item"]: row["known"] for row in rows} == {"2": True, "1": True, "no such item": False}
    for row in rows:
        assert row["score"] == pytest.approx(row["p_click"] + 3 * row["p_save"], rel=1e-5)


def test_no_candidates_is_an_error_that_says_so(world: RankingWorld) -> None:
    """The server's sentence reaches the caller."""
    with (
        Client.for_dataset(world.data) as client,
        pytest.raises(ServingError, match="received 0 candidates, expected 1"),
    ):
        client.rank_ids(1, [])


def test_the_asyncio_client_answers_many_requests_at_once(world: RankingWorld) -> None:
    """The same answers as one after the other."""
    at = datetime.fromisoformat(noon(RUN_DATE))

    async def ask_all() -> list[Answer]:
        async with AsyncClient.for_dataset(world.data) as client:
            return await asyncio.gather(*(client.rank_ids(user, [1, 2, 3], at) for user in range(20)))

    with Client.for_dataset(world.data) as client:
        for user, answer in enumerate(asyncio.run(ask_all())):
            assert np.abs(answer.score - client.rank_ids(user, [1, 2, 3], at).score).max() < 1e-6


def ask(url: str, schema: Schema) -> None:
    with Client(url, schema, Path("no mappings")) as client:
        client.rank_ids(1, [1])


def ask_async(url: str, schema: Schema) -> None:
    async def once() -> None:
        async with AsyncClient(url, schema, Path()) as client:
            await client.rank_ids(1, [1])

    asyncio.run(once())


both_clients = pytest.mark.parametrize("asked", [ask, ask_async], ids=["sync", "asyncio"])


@both_clients
@pytest.mark.parametrize("url", ["127.0.0.1:1", "no-such-host.invalid:8001"], ids=["refused", "no such host"])
def test_without_a_server_the_error_names_the_address_and_the_mend(asked: Callable[..., None], url: str) -> None:
    """Asking nobody is an error, not a wait."""
    with pytest.raises(ServingError, match=f"^no Triton answers at {url}; start it with `freshrank serve --data PATH`"):
        asked(url, tiny_schema())


@both_clients
def test_a_server_that_takes_a_connection_and_says_nothing_is_not_called_absent(asked: Callable[..., None]) -> None:
    """One that is stopped or hangs: nobody should start a second one beside it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerUnreachable, match=f"^what listens at {url} does not answer in time"):
            asked(url, tiny_schema())
        with TritonClient(url) as client, pytest.raises(ServerUnreachable, match=f"^what listens at {url} does not"):
            client.require_ready()


@both_clients
def test_the_server_of_another_dataset_is_not_asked(world: RankingWorld, asked: Callable[..., None]) -> None:
    """It would answer with items and actions of its own, and nobody would notice."""
    url, schema = settings().triton_grpc_url, world.dataset.schema.model_copy(update={"name": "my_log"})
    sentence = f"the server at {url} serves 'simulated', expected 'my_log'; run `freshrank serve --data PATH`"
    with pytest.raises(ServingError, match=f"^{sentence}$"):
        asked(url, schema)


def test_a_server_that_does_not_say_whom_it_serves_is_not_trusted() -> None:
    """The configuration of an older freshrank has no project."""
    with pytest.raises(ServingError, match=r"h:1 does not say which dataset it serves, expected 'my_log'.*stop --data"):
        refuse_other_project("h:1", ModelConfig(), "my_log")


def test_a_server_without_a_publication_is_heard_and_not_taken_for_absent(new_server: Callable[[], Served]) -> None:
    """Both are UNAVAILABLE to gRPC; only one is mended by starting a server."""
    served = new_server()
    served.server.start()
    with pytest.raises(ServingError, match="nothing is published yet; publish a bundle"):
        ask(served.url, tiny_schema().model_copy(update={"name": served.repository.project}))
