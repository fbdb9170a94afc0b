"""Three Tritons that serve one model repository: all of them get a version before any of them is asked for it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from publishing_steps import at_step
from ranking_world import RUN_DATE, RankingWorld, noon
from served import Served
from test_probe_requests import unseen

from freshrank.bench.measure import free_ports
from freshrank.cli import serving
from freshrank.errors import ConfigError, ServerUnreachable, ServingError
from freshrank.serving.client import Answer, Client
from freshrank.serving.deploy.local_server import TritonServer
from freshrank.serving.deploy.publish import publish, rollback
from freshrank.serving.deploy.replicas import Replicas, resolved, statuses
from freshrank.serving.deploy.run_experiment import planned, start, stop
from freshrank.serving.repository import RANKER, ModelRepository
from freshrank.settings import settings

pytestmark = pytest.mark.integration

PATIENCE = 3.0
"""Seconds after which a replica that is stopped counts as one that does not answer, where a test stops one."""
PUBLISHER = """
import logging, os, signal, sys
from pathlib import Path
from freshrank.serving.deploy.publish import publish
from freshrank.serving.deploy.replicas import Replicas
from freshrank.serving.repository import ModelRepository

class AtStep(logging.Handler):
    def emit(self, record):
        if f"step={sys.argv[4]} " in record.getMessage():
            os.kill(os.getpid(), signal.SIGKILL)

logging.getLogger("freshrank").setLevel(logging.INFO)
logging.getLogger("freshrank").addHandler(AtStep())
publish(Path(sys.argv[1]), Replicas.fixed(sys.argv[3].split(",")), ModelRepository(Path(sys.argv[2])))
"""


@dataclass
class Trio:
    """Three servers of one repository; ``named`` are those that the name of the service stands for."""

    servers: list[Served]
    named: list[str] = field(default_factory=list)
    patience: float = 60.0

    @property
    def repository(self) -> ModelRepository:
        return self.servers[0].repository

    @property
    def urls(self) -> list[str]:
        return [served.url for served in self.servers]

    @property
    def fixed(self) -> Replicas:
        return Replicas.fixed(self.urls, self.patience)

    @property
    def service(self) -> Replicas:
        return Replicas(lambda: list(self.named), may_change=True, patience=self.patience)

    def bundle(self, fingerprint: str = "", **how: object) -> Path:
        return self.servers[0].bundle(1.0, **how | ({"fingerprint": fingerprint} if fingerprint else {}))

    def loaded(self) -> list[list[int]]:
        return [status.versions for status in statuses(self.fixed, self.repository)]

    def served(self) -> int:
        pointer = self.repository.served()
        return pointer.version if pointer else 0

    def kill(self, number: int) -> None:
        pid = self.pid(number)
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)], timeout=10)

    def pid(self, number: int) -> int:
        pid = self.servers[number].server.status().pid
        assert pid
        return pid


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    home = tmp_path_factory.mktemp("replicas")
    repository = ModelRepository(home / "triton")
    trio = Trio([Served(TritonServer(repository, free_ports(), name), home) for name in ("", "b", "c")])
    for served in trio.servers:
        served.server.start()
    for _ in range(2):
        publish(trio.bundle(), trio.fixed, repository)
    yield trio
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda served: served.server.stop(), trio.servers))


@pytest.fixture
def trio(started: Trio) -> Trio:
    """All three run, serve what the pointer names, and have the version before it."""
    for served in started.servers:
        served.server.start()
    started.named, started.patience = started.urls, 60.0
    return started


@pytest.fixture
def impatient(trio: Trio) -> Trio:
    """The same, waiting for a replica that does not answer only as long as a test can."""
    trio.patience = PATIENCE
    return trio


@contextmanager
def asked_all_the_time(urls: list[str], world: RankingWorld) -> Iterator[dict[str, list[Answer | Exception]]]:
    """What `ranking` of each server says to 20 requests a second."""
    said: dict[str, list[Answer | Exception]] = {url: [] for url in urls}
    over = threading.Event()

    def ask(url: str) -> None:
        with Client(url, world.dataset.schema, world.dataset.path / "mappings") as client:
            while not over.wait(0.05):
                try:
                    said[url].append(client.rank(1, [1, 2, 3], noon(RUN_DATE)))
                except Exception as error:
                    said[url].append(error)

    threads = [threading.Thread(target=ask, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    yield said
    over.set()
    for thread in threads:
        thread.join()


def test_all_replicas_switch_and_no_request_misses_an_answer(world: RankingWorld) -> None:
    """Each answers with the old version, then with the new one, and never with anything else."""
    others = [TritonServer(world.repository, free_ports(), name) for name in ("b", "c")]
    try:
        for server in others:
            server.start()
        urls = [settings().triton_grpc_url, *(f"127.0.0.1:{server.ports.grpc}" for server in others)]
        before = world.repository.served()
        assert before
        with asked_all_the_time(urls, world) as said:
            pointer = publish(unseen(world, "replicas"), Replicas.fixed(urls), world.repository)
            answered = {url: len(answers) for url, answers in said.items()}
            deadline = time.monotonic() + 60
            while any(len(answers) < answered[url] + 3 for url, answers in said.items()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        wanted = said[urls[0]][0]
        assert isinstance(wanted, Answer)
        for answers in said.values():
            assert [answer for answer in answers if isinstance(answer, Exception)] == []
            versions = [answer.model_version for answer in answers if isinstance(answer, Answer)]
            assert (versions[0], versions[-1]) == (before.version, pointer.version)
            assert versions == sorted(versions)
            assert len(versions) > 20
            for answer in answers:
                # The new version is a copy of the old one, so every whole answer is the same.
                assert isinstance(answer, Answer)
                np.testing.assert_allclose(answer.score, wanted.score, rtol=1e-4)
        assert {tuple(status.versions) for status in statuses(Replicas.fixed(urls), world.repository)} == {
            tuple(pointer.live)
        }
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(TritonServer.stop, others))


def test_a_replica_that_cannot_load_the_version_keeps_it_out_everywhere(trio: Trio) -> None:
    """The error names it, the step and the reason; the others unload the version, and the pointer stays."""
    before, loaded = trio.served(), trio.loaded()
    # What it needs to start one more Python model, and only it.
    backend = trio.repository.root / "backends-c" / "python"
    backend.rename(backend.with_name("gone"))
    with pytest.raises(ServingError) as refused:
        publish(trio.bundle("mended"), trio.fixed, trio.repository)
    backend.with_name("gone").rename(backend)
    text = str(refused.value)
    assert f"1 of 3 replicas failed:\n  {trio.urls[0]}  done" in text
    assert re.search(f"\n  {trio.urls[2]}  load  .* s: loading ranker: Triton says: .*{before + 1}", text)
    assert text.endswith(f"\nversion {before} is still served")
    assert (trio.served(), trio.loaded()) == (before, loaded)
    assert publish(trio.bundle("mended"), trio.fixed, trio.repository).version == before + 2


def test_no_replica_but_the_first_meets_a_version_that_is_wrong(trio: Trio) -> None:
    """One tries it first: the others neither load it nor lose time on it."""
    before, loaded = trio.served(), trio.loaded()
    with pytest.raises(ServingError) as refused:
        publish(trio.bundle(wrong_case=1), trio.fixed, trio.repository)
    assert f"{trio.urls[0]}  verify" in str(refused.value)
    assert str(refused.value).count("not asked") == 2
    assert (trio.served(), trio.loaded()) == (before, loaded)


def test_a_replica_that_does_not_answer_is_named_and_nothing_switches(impatient: Trio) -> None:
    """Nobody blames the version: it stays installed, and the same call finishes once the replica answers again."""
    trio = impatient
    before, loaded = trio.served(), trio.loaded()
    wanted, pid = trio.bundle(), trio.pid(1)
    with at_step("load", lambda: os.kill(pid, signal.SIGSTOP), trio.urls[1]), pytest.raises(ServerUnreachable) as lost:
        publish(wanted, trio.fixed, trio.repository)
    others = [trio.servers[0].server.status().models[RANKER], trio.servers[2].server.status().models[RANKER]]
    os.kill(pid, signal.SIGCONT)
    assert f"{trio.urls[1]}  load  {PATIENCE:.1f} s" in str(lost.value)
    assert f"may have it loaded until the next publication: {trio.urls[1]}" in str(lost.value)
    assert (trio.served(), others) == (before, [loaded[0], loaded[2]])
    installed = trio.repository.versions()[-1]
    assert publish(wanted, trio.fixed, trio.repository).version == installed
    assert trio.loaded() == [[before, installed]] * 3


@pytest.mark.slow
def test_a_replica_that_lags_after_the_switch_is_named_and_nothing_is_unloaded(
    impatient: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    """What it may still be asked for stays loaded everywhere, until a later publication has all of them."""
    trio = impatient
    before, loaded = trio.served(), trio.loaded()
    pid = trio.pid(2)
    with at_step("follow", lambda: os.kill(pid, signal.SIGSTOP), trio.urls[0]):
        assert publish(trio.bundle(), trio.fixed, trio.repository).version == before + 1
    os.kill(pid, signal.SIGCONT)
    assert f"{trio.urls[2]}  follow" in caplog.text
    assert trio.loaded() == [[*loaded[0], before + 1]] * 3
    assert publish(trio.bundle(), trio.fixed, trio.repository).version == before + 2
    assert trio.loaded() == [[before + 1, before + 2]] * 3


@pytest.mark.slow
def test_a_replica_that_died_and_is_still_named_keeps_the_version_out(impatient: Trio) -> None:
    """It may have died of the version. Nobody blames it all the same: the same call again takes it."""
    trio = impatient
    before, wanted = trio.served(), trio.bundle()
    with at_step("verify", lambda: trio.kill(2), trio.urls[2]), pytest.raises(ServerUnreachable) as lost:
        publish(wanted, trio.service, trio.repository)
    assert f"{trio.urls[2]}  verify" in str(lost.value)
    assert trio.served() == before
    installed = trio.repository.versions()[-1]
    trio.servers[2].server.start()
    assert publish(wanted, trio.service, trio.repository).version == installed


def test_a_replica_that_nobody_names_any_more_is_left_out(trio: Trio) -> None:
    """Evicted in mid-publication, it starts with what serves by then."""
    before = trio.served()

    def evict() -> None:
        trio.kill(2)
        trio.named = trio.urls[:2]

    with at_step("verify", evict, trio.urls[2]):
        pointer = publish(trio.bundle(), trio.service, trio.repository)
    assert pointer.previous == before
    trio.servers[2].server.start()
    assert trio.loaded() == [pointer.live] * 3


@pytest.mark.parametrize("moment", ["warm-up", "tidy"])
def test_a_replica_that_comes_up_meanwhile_gets_the_version_as_well(trio: Trio, moment: str) -> None:
    """Before the switch or after it: it had read its configuration when the pointer was still the old one."""
    before = trio.served()
    trio.named = trio.urls[:2]
    with at_step(moment, lambda: setattr(trio, "named", trio.urls)):
        assert publish(trio.bundle(), trio.service, trio.repository).version == before + 1
    assert before + 1 in trio.loaded()[2]


def test_a_service_none_of_whose_pods_is_up_is_an_error(trio: Trio) -> None:
    """Nothing is installed, and the pointer stays."""
    before = trio.repository.versions()
    trio.named = ["127.0.0.1:1"]
    with pytest.raises(ServerUnreachable, match=r"none of the replicas \['127\.0\.0\.1:1'\] listens"):
        publish(trio.bundle(), trio.service, trio.repository)
    assert trio.repository.versions() == before


def test_a_publisher_killed_at_any_step_leaves_one_version_and_is_finished_by_the_same_call(trio: Trio) -> None:
    """Until the switch every replica serves the old version, from then on the new one, which all of them have."""
    for step in ("switch", "follow"):
        before, wanted = trio.served(), trio.bundle()
        arguments = [str(wanted), str(trio.repository.root), ",".join(trio.urls), step]
        killed = subprocess.run([sys.executable, "-c", PUBLISHER, *arguments], check=False, capture_output=True)
        assert killed.returncode == -signal.SIGKILL
        assert trio.served() == (before + 1 if step == "follow" else before)
        assert all(trio.served() in versions for versions in trio.loaded())
        assert publish(wanted, trio.fixed, trio.repository).version == before + 1
        assert trio.loaded() == [[before, before + 1]] * 3


def test_roll_backs_and_experiments_reach_every_replica(trio: Trio) -> None:
    """What an experiment needs is loaded on all of them before it starts, and unloaded when it ends."""
    published = publish(trio.bundle(), trio.fixed, trio.repository)
    old = trio.repository.versions()[0]
    assert published.previous
    assert rollback(trio.fixed, trio.repository).version == published.previous
    start(trio.fixed, trio.repository, planned("x", "", [f"{old}=0.5"], []))
    assert all(old in versions for versions in trio.loaded())
    assert stop(trio.fixed, trio.repository)
    assert trio.loaded() == [[published.previous]] * 3


@pytest.mark.slow
def test_a_roll_back_waits_for_every_replica_and_one_token_is_for_all(trio: Trio) -> None:
    """One that is down is named and nothing changes; started again, it keeps the token of those that run."""
    published = publish(trio.bundle(), trio.fixed, trio.repository)
    trio.kill(0)
    with pytest.raises(ServerUnreachable, match=trio.urls[0]):
        rollback(trio.fixed, trio.repository)
    assert trio.served() == published.version
    trio.servers[0].server.start()
    assert rollback(trio.fixed, trio.repository).version == published.previous


def test_status_lists_every_replica(
    trio: Trio, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it has loaded, or why it says nothing; exit code 1 when one is not as it should be."""
    monkeypatch.setenv("FRESHRANK_TRITON_REPLICAS", ", ".join([*trio.urls, "127.0.0.1:1"]))
    settings.cache_clear()
    assert serving._replicas_status(Replicas.configured(), trio.repository) == 1
    settings.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    loaded = trio.loaded()
    assert lines[:3] == [f"{url}  ranker versions {seen}" for url, seen in zip(trio.urls, loaded, strict=True)]
    assert lines[3].startswith("127.0.0.1:1  no Triton answers")
    assert lines[4] == f"served version: {trio.served()} (run 2022-05-01); not loaded on 127.0.0.1:1"
    assert serving._replicas_status(trio.fixed, trio.repository) == 0


def test_a_host_name_stands_for_all_its_addresses() -> None:
    """Each with the port; a name that stands for none is an error that says which."""
    assert resolved("localhost", 8001) == ["127.0.0.1:8001"]
    with pytest.raises(ServerUnreachable, match=r"FRESHRANK_TRITON_REPLICAS_HOST: 'nothing\.invalid' does not resolve"):
        resolved("nothing.invalid", 8001)


def test_an_address_of_the_newer_kind_is_written_as_grpc_reads_it() -> None:
    """In brackets; what stands for both kinds is asked once, at the older one (`localhost`, above)."""
    assert resolved("::1", 8001) == ["[::1]:8001"]


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"REPLICAS": "a:1,b"}, "FRESHRANK_TRITON_REPLICAS: received 'b', expected host:port,host:port"),
        ({"REPLICAS": "a:1,b:1, a:1"}, "FRESHRANK_TRITON_REPLICAS: received a:1 more than once"),
        ({"REPLICAS": "a:1", "REPLICAS_HOST": "b"}, "expected one of the two"),
        ({"REPLICA_SECONDS": "0"}, "FRESHRANK_TRITON_REPLICA_SECONDS: received '0'"),
    ],
)
def test_replicas_that_cannot_be_are_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problem: str
) -> None:
    """The variable, what it held, and what was expected."""
    for name, value in variables.items():
        monkeypatch.setenv(f"FRESHRANK_TRITON_{name}", value)
    settings.cache_clear()
    with pytest.raises(ConfigError) as error:
        Replicas.configured()
    settings.cache_clear()
    assert problem in str(error.value)


def test_without_a_setting_there_is_the_one_local_server() -> None:
    """It never changes, so nothing looks for others."""
    replicas = Replicas.configured()
    assert (replicas.resolve(), replicas.is_one) == ([settings().triton_grpc_url], True)
