"""One client in the processes, threads and event loops of a web server."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
from ranking_world import RUN_DATE, RankingWorld, noon

from freshrank.serving.client import Answer, AsyncClient, Client
from freshrank.serving.fork_gate import ForkGate

AT = datetime.fromisoformat(noon(RUN_DATE))
HANGS = 300
"""Seconds after which a process counts as hanging: far more than it needs, so that a failure ends the test."""


@pytest.fixture
def mappings(tmp_path: Path) -> Path:
    """User u1 and items i1, i2 and i3 are 1, 2 and 3 to the server."""
    pl.DataFrame({"value": ["u0", "u1"], "code": [0, 1]}).write_parquet(tmp_path / "user_id.parquet")
    pl.DataFrame({"value": ["i0", "i1", "i2", "i3"], "code": [0, 1, 2, 3]}).write_parquet(tmp_path / "item_id.parquet")
    return tmp_path


def test_importing_the_client_brings_nothing_heavy() -> None:
    """numpy and gRPC come with the first client, pyarrow with the first id that is text."""
    program = "import sys, freshrank.serving.client; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {"polars", "torch", "pandas", "pyarrow", "numpy", "tritonclient", "grpc", "jinja2", "safetensors", "feast"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize("how", ["quiet", "threads", "asyncio"])
def test_a_server_that_forks_its_workers_is_answered_in_all_of_them(
    world: RankingWorld, mappings: Path, how: str
) -> None:
    """Though the parent has mapped ids and has a connection, or its threads ask while it forks; no socket, lock or
    thread of its is needed in a worker, and it keeps its own."""
    server = Path(__file__).parent / "preloading_server.py"
    command = [sys.executable, str(server), str(world.data), str(mappings), noon(RUN_DATE), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    with Client.for_dataset(world.data) as client:
        expected = [round(score, 5) for score in client.rank_ids(1, [1, 2, 3], AT).score.tolist()]
    assert said == {"parent": [expected] * 2, "workers": [expected] * 6, "heavy": []}


def test_threads_share_a_client(world: RankingWorld, mappings: Path) -> None:
    """Among them the first ask at once: the connection is opened and a mapping is read by one of them."""
    with Client.for_dataset(world.data) as client:
        expected = [client.rank_ids(user, [1, 2, 3], AT).score.tolist() for user in (0, 1)]
        together = threading.Barrier(8)
        with Client(client.url, client.schema, mappings) as shared, ThreadPoolExecutor(8) as threads:

            def ask(number: int) -> list[float]:
                together.wait()
                scores: list[float] = shared.rank(f"u{number % 2}", ["i1", "i2", "i3"], AT).score.tolist()
                return scores

            for number, scores in enumerate(threads.map(ask, range(16))):
                assert scores == pytest.approx(expected[number % 2], abs=1e-6)


def test_event_loops_share_an_asyncio_client(world: RankingWorld) -> None:
    """One after the other, and at the same time in threads of their own; those that are over leave nothing behind."""
    client = AsyncClient.for_dataset(world.data)

    async def ask(user: int) -> list[Answer]:
        return await asyncio.gather(*(client.rank_ids(user, [1, 2, 3], AT) for _ in range(5)))

    in_turn = [asyncio.run(ask(user)) for user in range(4)]
    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(lambda user: asyncio.run(ask(user)), range(4)))
    asyncio.run(client.close())
    for one, other in zip(in_turn, at_once, strict=True):
        scores = [answer.score.tolist() for answer in (*one, *other)]
        assert scores == [pytest.approx(scores[0], abs=1e-6)] * 10


def test_a_task_that_is_cancelled_leaves_the_asyncio_client_usable(world: RankingWorld) -> None:
    """As when a visitor goes away."""

    async def cancel_one_ask_another(client: AsyncClient) -> Answer:
        await client.rank_ids(1, [1])
        task = asyncio.create_task(client.rank_ids(1, [1, 2]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await client.rank_ids(1, [1, 2, 3])

    assert len(asyncio.run(cancel_one_ask_another(AsyncClient.for_dataset(world.data))).score) == 3


def test_a_closed_client_opens_again_when_it_is_asked(world: RankingWorld) -> None:
    """A parent may close it before it forks."""
    client = Client.for_dataset(world.data)
    for _ in range(2):
        assert len(client.rank_ids(1, [1, 2]).score) == 2
        client.close()


def test_a_fork_waits_for_what_is_under_way_and_holds_up_what_begins() -> None:
    """Else a child would inherit half a call, or a lock that nobody releases."""
    gate = ForkGate()
    steps: list[str] = []
    gate.enter()
    fork = threading.Thread(target=lambda: (gate.before_fork(), steps.append("fork")))
    fork.start()
    while not gate.forking:
        os.sched_yield()
    late = threading.Thread(target=lambda: (gate.enter(), steps.append("late")))
    late.start()
    steps.append("done")
    gate.leave()
    fork.join(HANGS)
    assert steps == ["done", "fork"]
    gate.after_fork_in_parent()
    late.join(HANGS)
    assert steps == ["done", "fork", "late"]
