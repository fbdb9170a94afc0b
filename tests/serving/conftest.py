"""A real tritonserver for the whole session, and more of them for tests of the server itself."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranking_world import RankingWorld, served_world
from served import Served

from freshrank.bench.measure import free_ports
from freshrank.serving.deploy.local_server import TritonServer
from freshrank.serving.repository import ModelRepository

SERVERS = {"new_server", "running", "world"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks one of these servers is no unit test."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and SERVERS & set(item.fixturenames):
            item.add_marker(pytest.mark.integration)


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[[], Served]]:
    """Servers of one repository, not yet started; whatever runs at the end is stopped."""
    made: list[Served] = []

    def make() -> Served:
        made.append(Served(TritonServer(ModelRepository(tmp_path / "triton"), free_ports()), tmp_path / f"{len(made)}"))
        return made[-1]

    yield make
    for served in made:
        served.server.stop()


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests that only publish; each test starts from whatever the ones before it left."""
    home = tmp_path_factory.mktemp("serving")
    served = Served(TritonServer(ModelRepository(home / "triton"), free_ports()), home)
    served.server.start()
    yield served
    served.server.stop()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankingWorld]:
    """A world whose first bundle is served; tests that break something mend it again."""
    with served_world(tmp_path_factory.mktemp("ranking")) as world:
        yield world
