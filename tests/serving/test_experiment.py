"""An experiment: who meets which version, what a request log keeps of it, and what an analyst does with both."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ranking_world import RUN_DATE, RankingWorld, noon, served_world
from scipy.stats import binomtest

from freshrank.bundle.onnx_ranker import OnnxRanker
from freshrank.errors import ConfigError, ServingError
from freshrank.serving.client.client import Client
from freshrank.serving.deploy.publish import rollback
from freshrank.serving.deploy.run_experiment import described, planned, start, stop
from freshrank.serving.experiment import Arm, Experiment, ExperimentFile
from freshrank.serving.ranking.request_log import inputs_of, read_log
from freshrank.serving.repository import ModelRepository
from freshrank.serving.triton import TritonClient
from freshrank.settings import settings

pytestmark = pytest.mark.integration

USERS = range(1, 151)


def half(name: str = "half") -> Experiment:
    return Experiment(name=name, challengers=(Arm(version=2, share=0.5),))


@given(st.lists(st.floats(0.02, 0.3), min_size=1, max_size=3), st.text("abc", min_size=1, max_size=5))
def test_users_are_spread_by_the_shares_and_always_alike(shares: list[float], name: str) -> None:
    """Over 4,000 users every arm gets its share, up to chance; asked one by one they get the same arm."""
    arms = tuple(Arm(version=number, share=share) for number, share in enumerate(shares, start=1))
    experiment = Experiment(name=name, challengers=arms)
    drawn = experiment.arms(range(4000))
    for number, share in enumerate(shares, start=1):
        assert binomtest(int((drawn == number).sum()), 4000, share).pvalue > 1e-6
    assert [experiment.assign(user).arm for user in range(50)] == drawn[:50].tolist()


def test_the_formula_is_the_documented_one() -> None:
    """What an analyst computes elsewhere from the name and the user id."""
    from hashlib import blake2b

    places = [int.from_bytes(blake2b(f"half/{u}".encode(), digest_size=8).digest(), "big") / 2**64 for u in range(500)]
    assert half().arms(range(500)).tolist() == [1 if place < 0.5 else 0 for place in places]


def test_a_growing_share_takes_users_from_the_champion_alone_and_a_salt_keeps_them() -> None:
    """From 10% to 40% nobody leaves the challenger; another name draws others, unless it is given the first as salt."""
    before, after = (Experiment(name="x", challengers=(Arm(version=2, share=s),)).arms(range(2000)) for s in (0.1, 0.4))
    assert (after[before == 1] == 1).all()
    other, salted = (Experiment(name="y", salt=salt, challengers=(Arm(version=2, share=0.4),)) for salt in ("", "x"))
    assert (salted.arms(range(2000)) == after).all()
    assert 0.3 < (other.arms(range(2000)) == after).mean() < 0.7


@pytest.mark.parametrize(
    ("challengers", "shadows", "sentence"),
    [
        (["2=0.6", "3=0.5"], [], "shares sum to 1.1, expected at most 1"),
        (["2=0.1"], ["2=1"], "hold one twice"),
        ([], [], "no challenger and no shadow"),
        (["2"], [], "received '2', expected VERSION=SHARE"),
        (["2=0"], [], "received '2=0', expected VERSION=SHARE"),
    ],
    ids=["too much", "twice", "nothing", "no share", "zero"],
)
def test_what_cannot_be_is_said(challengers: list[str], shadows: list[str], sentence: str) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match=sentence):
        planned("x", "", challengers, shadows)


def test_a_file_that_cannot_be_read_leaves_the_last_experiment_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half written, of unknown fields or gone mad: logged once, and no request fails for it."""
    file = ExperimentFile(tmp_path)
    assert file.read() is None
    file.write(half())
    assert file.read() == half()
    for text in ('{"name": "ha', json.dumps(half().model_dump() | {"colour": "red"})):
        file.path.write_text(text)
        assert [file.read(), file.read()] == [half(), half()]
        with pytest.raises(ServingError, match="experiment stop"):
            ModelRepository(tmp_path).live()
    assert caplog.text.count("'half' goes on") == 2
    file.remove()
    assert file.read() is None
    with pytest.raises(ValidationError):
        Experiment.model_validate(half().model_dump() | {"colour": "red"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankingWorld]:
    """Versions 1 (served), 2 and 3, and a log of every request."""
    with served_world(tmp_path_factory.mktemp("experiment"), REQUEST_LOG_SHARE="1") as world:
        for seed in (1, 2):
            world.publish(seed)
        rollback(settings().triton_grpc_url, world.repository, to=1)
        yield world


PLAN = planned("first", "", ["2=0.5"], ["3=0.5"])


def loaded(world: RankingWorld) -> list[int]:
    with TritonClient.controlling(world.repository, settings().triton_grpc_url) as client:
        return client.ready_versions()["ranker"]


def test_an_experiment_of_a_version_that_is_not_there_changes_nothing(world: RankingWorld) -> None:
    """Nor one of the served version."""
    for version, sentence in ((9, "not installed"), (1, "serves already")):
        with pytest.raises(ConfigError, match=sentence):
            start(settings().triton_grpc_url, world.repository, planned("x", "", [f"{version}=0.5"], []))
    assert described(world.repository) == "no experiment runs"


def test_each_user_is_answered_by_the_version_of_its_arm_and_the_answer_says_so(world: RankingWorld) -> None:
    """Half by version 2, the rest by the served one; named versions and the end of the experiment go before it."""
    start(settings().triton_grpc_url, world.repository, PLAN)
    assert loaded(world) == [1, 2, 3]
    arms = PLAN.arms(USERS).tolist()
    with Client.for_dataset(world.data) as client:
        answers = [client.rank(user, [1, 2, 3], noon(RUN_DATE), request_id=f"r{user}") for user in USERS]
        named = client.rank(1, [1], noon(RUN_DATE), version=3)
    assert [answer.arm for answer in answers] == arms
    assert [answer.model_version for answer in answers] == [{0: 1, 1: 2}[arm] for arm in arms]
    assert (named.model_version, named.arm) == (3, 0)
    assert described(world.repository).splitlines()[1:] == [
        "arm 0  champion    version 1  50.0% of users",
        "arm 1  challenger  version 2  50.0% of users",
        "       shadow      version 3  50.0% of users",
    ]


def test_a_challenger_that_cannot_answer_costs_its_users_nothing(world: RankingWorld) -> None:
    """Unloaded behind the experiment's back: the champion answers, as arm 0."""
    user = USERS[PLAN.arms(USERS).tolist().index(1)]
    with (
        TritonClient.controlling(world.repository, settings().triton_grpc_url) as client,
        Client.for_dataset(world.data) as asking,
    ):
        client.load("ranker", world.repository.ranker_config_json([1, 3]))
        try:
            answer = asking.rank(user, [1, 2], noon(RUN_DATE))
        finally:
            client.load("ranker", world.repository.ranker_config_json(world.repository.live()))
        again = asking.rank(user, [1, 2], noon(RUN_DATE))
    assert (answer.model_version, answer.arm) == (1, 0)
    assert (again.model_version, again.arm) == (2, 1)


def test_a_publication_leaves_the_experiment_loaded(world: RankingWorld) -> None:
    """The champion is another one, the challenger and the shadow are the same."""
    published = world.publish(seed=3).version
    assert {2, 3, published} <= set(loaded(world))
    rollback(settings().triton_grpc_url, world.repository, to=1)
    assert {1, 2, 3} <= set(loaded(world))


def test_metrics_tell_versions_arms_kinds_and_defaults_apart(world: RankingWorld) -> None:
    """On Triton's metrics port, with the labels of docs/serving.md."""
    page = build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{world.server.ports.metrics}/metrics").read().decode()
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in page.splitlines()
        if line.startswith("freshrank_ranking_")
    }
    assert values['freshrank_ranking_requests_total{outcome="ok",version="2"}'] >= PLAN.arms(USERS).sum()
    assert values['freshrank_ranking_arm_requests_total{arm="1",experiment="first"}'] >= PLAN.arms(USERS).sum()
    assert values['freshrank_ranking_fallbacks_total{version="2"}'] == 1
    assert values['freshrank_ranking_shadow_batches_total{outcome="ok",version="3"}'] > 30
    for version in (1, 2):
        number = values[f'freshrank_ranking_candidates_total{{kind="warm",version="{version}"}}']
        total = values[f'freshrank_ranking_probability_sum{{action="click",kind="warm",version="{version}"}}']
        assert 0 < total / number < 1
    asked = 'freshrank_ranking_values_total{arm="1",feature="item_click_rate_28d"}'
    missing = asked.replace("values_total", "defaults_total")
    assert 0 <= values[missing] < values[asked]
    assert any("stage_seconds_total" in name and 'stage="ranker"' in name for name in values)


def test_the_log_replays_bit_for_bit_and_is_enough_for_the_ab(world: RankingWorld) -> None:
    """Every request is there once the server has stopped; its inputs give its answer; outcomes join on request_id."""
    stop(settings().triton_grpc_url, world.repository)
    assert loaded(world) == [1]
    world.server.stop()
    log = read_log(world.workspace.requests).filter(pl.col("request_id").str.starts_with("r"))
    assert log["request_id"].to_list() == [f"r{user}" for user in USERS]
    assert log["arm"].to_list() == PLAN.arms(USERS).tolist()
    assert log["shadows"].list.len().to_list() == [len(PLAN.assign(user).shadows) for user in USERS]
    rankers = {number: OnnxRanker(world.repository.version_directory(number), threads=1) for number in (1, 2, 3)}
    for row in log.head(20).iter_rows(named=True):
        said = {row["model_version"]: row["probabilities"]} | {s["version"]: s["probabilities"] for s in row["shadows"]}
        for version, probabilities in said.items():
            again = rankers[version].run(inputs_of(row))["probabilities"]
            np.testing.assert_allclose(again, np.array(probabilities, np.float32), atol=1e-6)
    clicks = pl.DataFrame({"request_id": [f"r{user}" for user in USERS if user % 3 == 0], "clicks": 1})
    per_arm = (
        log.join(clicks, on="request_id", how="left")
        .group_by("experiment", "arm")
        .agg(users=pl.col("user_id").n_unique(), clicks=pl.col("clicks").sum())
        .sort("arm")
    )
    assert per_arm["users"].sum() == len(USERS)
    assert per_arm["clicks"].sum() == len(USERS) // 3
    world.server.start()


def test_a_start_that_fails_leaves_no_experiment(world: RankingWorld) -> None:
    """No server: nothing is written."""
    world.server.stop()
    with pytest.raises(ServingError, match="no Triton"):
        start(settings().triton_grpc_url, world.repository, PLAN)
    assert not ExperimentFile(world.repository.root).path.exists()
