"""A workspace that is lost, broken or hangs while a server runs: clients are answered as before."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import numpy as np
import pytest
from ranking_world import RUN_DATE, RankingWorld, noon

from freshrank.errors import ServingError
from freshrank.serving.client import Client
from freshrank.serving.experiment import Arm, Experiment, ExperimentFile
from freshrank.serving.ranking.latest import LookedTooLong
from freshrank.serving.ranking.ranked import Ranked
from freshrank.serving.ranking.service import RankingService, ServiceObserver
from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.settings import settings

REQUEST = {"user_id": np.array([[1]]), "item_ids": np.array([[1, 2, 3]])}


class Losses(ServiceObserver):
    """Remembers what kept the pointer from being read."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def pointer_lost(self, error: Exception) -> None:
        self.errors.append(error)


class Ranking:
    """A service on a repository of its own, in this process; versions 1 and 2 are the same ranker."""

    def __init__(self, world: RankingWorld, root: Path) -> None:
        served = world.repository.served()
        assert served
        self.repository = ModelRepository(root)
        for version in (1, 2):
            installed = world.repository.version_directory(served.version)
            shutil.copytree(installed, self.repository.version_directory(version))
        ranker, self.losses = world.served_ranker(), Losses()
        self.service = RankingService(self.repository, settings().home, lambda _, b: ranker.run(b), self.losses)

    @property
    def pointer(self) -> Path:
        return self.repository.pointer_path

    def point_to(self, version: int) -> None:
        self.repository.point_to(Pointer(version=version, run_date="2024-01-01", fingerprint=str(version)))

    def version(self) -> int:
        """That of the answer."""
        (answer,) = self.service.rank([REQUEST])
        assert isinstance(answer, Ranked), answer
        return int(answer.answer["model_version"][0])


@pytest.fixture
def ranking(world: RankingWorld, tmp_path: Path) -> Ranking:
    """One that has answered with version 1."""
    ranking = Ranking(world, tmp_path / "triton" / world.repository.project)
    ranking.point_to(1)
    assert ranking.version() == 1
    return ranking


def gone(ranking: Ranking) -> None:
    ranking.pointer.unlink()


def a_directory(ranking: Ranking) -> None:
    ranking.pointer.unlink()
    ranking.pointer.mkdir()


def a_loop(ranking: Ranking) -> None:
    ranking.pointer.unlink()
    ranking.pointer.symlink_to(ranking.pointer)


def torn(ranking: Ranking) -> None:
    ranking.pointer.write_bytes(ranking.pointer.read_bytes()[:9])


def garbage(ranking: Ranking) -> None:
    ranking.pointer.write_bytes(b"\x00\xff\n\x01" * 10)


def of_a_version_that_is_not_there(ranking: Ranking) -> None:
    ranking.pointer.write_text(ranking.pointer.read_text().replace('"version": 1', '"version": 7'))


def root_is_a_file(ranking: Ranking) -> None:
    shutil.rmtree(ranking.repository.root)
    ranking.repository.root.write_text("")


def workspace_gone(ranking: Ranking) -> None:
    shutil.rmtree(ranking.repository.root.parent)


@pytest.mark.parametrize(
    "damage",
    [gone, a_directory, a_loop, torn, garbage, of_a_version_that_is_not_there, root_is_a_file, workspace_gone],
    ids=lambda damage: damage.__name__,
)
def test_what_the_pointer_said_last_stands_while_it_cannot_be_read(
    ranking: Ranking, damage: Callable[[Ranking], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Every request is answered by the same version; each is counted, and one line says so."""
    damage(ranking)
    assert [ranking.version() for _ in range(5)] == [1] * 5
    assert len(ranking.losses.errors) == 5
    assert caplog.text.count("what it said last stands") == 1


def test_a_pointer_that_is_back_is_followed_at_once(ranking: Ranking, caplog: pytest.LogCaptureFixture) -> None:
    """The same file, then one of another version."""
    shutil.move(ranking.pointer, ranking.pointer.with_name("aside"))
    assert ranking.version() == 1
    shutil.move(ranking.pointer.with_name("aside"), ranking.pointer)
    assert ranking.version() == 1
    ranking.point_to(2)
    assert ranking.version() == 2
    assert caplog.text.count("can be read again") == 1
    assert len(ranking.losses.errors) == 1


def test_an_experiment_goes_on_while_the_workspace_is_away_and_ends_when_it_is_stopped(ranking: Ranking) -> None:
    """A file that is missing has been removed only where its neighbours are still there."""
    file = ExperimentFile(ranking.repository.root)
    file.write(Experiment(name="all", challengers=(Arm(version=2, share=1.0),)))
    assert ranking.version() == 2
    away = ranking.repository.root.with_name("away")
    ranking.repository.root.rename(away)
    assert ranking.version() == 2
    away.rename(ranking.repository.root)
    assert ranking.version() == 2
    file.remove()
    assert ranking.version() == 1


def test_a_file_system_that_hangs_costs_one_deadline_and_no_more(ranking: Ranking) -> None:
    """The pointer is a pipe that nobody writes to, so whoever reads it waits for ever: the first request waits for its
    part of a second, the next ones do not; once the look ends, the pointer is followed again."""
    pipe = ranking.pointer.with_name("pipe")
    os.mkfifo(pipe)
    pipe.replace(ranking.pointer)
    moments = [time.monotonic()]
    for _ in range(20):
        assert ranking.version() == 1
        moments.append(time.monotonic())
    first, *others = np.diff(moments)
    assert np.median(others) < first / 2
    assert {type(error) for error in ranking.losses.errors} == {LookedTooLong}

    shutil.move(ranking.pointer, pipe)
    ranking.point_to(2)
    assert ranking.version() == 1
    with os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "w"):
        pass
    assert followed_within(ranking, 2, seconds=5)


def followed_within(ranking: Ranking, version: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while ranking.version() != version:
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.01)
    return True


def test_clients_of_a_real_server_notice_nothing(world: RankingWorld) -> None:
    """The model repository is moved away under requests and comes back: the same answers, counted and logged."""
    with Client.for_dataset(world.data) as client:

        def ask() -> tuple[int, list[float]]:
            answer = client.rank(1, [1, 2, 3], at=noon(RUN_DATE))
            return answer.model_version, answer.score.round(5).tolist()

        before, counted, root = ask(), failures(world), world.repository.root
        away = root.with_name("away")
        root.rename(away)
        try:
            assert [ask() for _ in range(10)] == [before] * 10
        finally:
            away.rename(root)
        assert ask() == before
    assert failures(world) - counted == 10
    log = (root / "server.log").read_text()
    assert [log.count(words) for words in ("what it said last stands", "can be read again")] == [1, 1]


def failures(world: RankingWorld) -> float:
    """The counter of batches of requests without a pointer."""
    with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{world.server.ports.metrics}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("freshrank_ranking_pointer_failures_total"))


def test_a_process_that_has_never_seen_a_pointer_has_nothing_to_stand_by(world: RankingWorld, tmp_path: Path) -> None:
    """One that is broken from the start is an error, and not taken for an empty repository."""
    ranking = Ranking(world, tmp_path / "triton" / world.repository.project)
    ranking.pointer.write_text("{}")
    (refused,) = ranking.service.rank([REQUEST])
    assert isinstance(refused, ServingError)
    assert "served.json cannot be read" in str(refused)
    with pytest.raises(ServingError, match="remove it and publish again"):
        ranking.point_to(1)
    ranking.pointer.unlink()
    ranking.point_to(1)
    assert ranking.version() == 1
