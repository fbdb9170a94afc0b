"""kill -9 of the publisher and of the server at every step: the same call again ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from publishing_steps import at_step
from served import Served
from tiny_bundles import expected, request

from freshrank.errors import ServerUnreachable
from freshrank.serving.deploy.publish import publish, rollback
from freshrank.serving.repository import ModelRepository

PUBLISH_STEPS = ("install", "load", "verify", "warm-up", "switch", "tidy")
ROLLBACK_STEPS = ("load", "verify", "warm-up", "switch")
MOST_RENAMES = 20
PUBLISHER = """
import logging, os, signal, sys
from pathlib import Path
from freshrank.serving.deploy.publish import publish, rollback
from freshrank.serving.repository import ModelRepository

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class AtStep(logging.Handler):
    def emit(self, record):
        if f"step={sys.argv[4]} " in record.getMessage():
            die()

renames = 0

def at_rename(event, arguments):
    global renames
    if event == "os.rename":
        renames += 1
        if str(renames) == sys.argv[4]:
            die()

logging.getLogger("freshrank").setLevel(logging.INFO)
logging.getLogger("freshrank").addHandler(AtStep())
repository = ModelRepository(Path(sys.argv[2]))
sys.addaudithook(at_rename)
rollback(sys.argv[3], repository) if sys.argv[1] == "-" else publish(Path(sys.argv[1]), sys.argv[3], repository)
"""


def die_at(moment: str, served: Served, bundle: Path | str = "-") -> int:
    """Publish ``bundle``, or roll back, in a process that kills itself at a step or at its n-th rename."""
    arguments = [str(bundle), str(served.repository.root), served.url, moment]
    return subprocess.run([sys.executable, "-c", PUBLISHER, *arguments], check=False, capture_output=True).returncode


def check_serves(served: Served, versions: set[int]) -> None:
    """The pointer names one of ``versions``, which is whole, loaded and right: version v has weight v."""
    pointer = served.repository.served()
    assert pointer
    assert pointer.version in versions
    files = {path.name for path in served.repository.version_directory(pointer.version).iterdir()}
    assert files >= {"ranker.onnx", "model.py", "golden.safetensors"}
    score = served.ask(pointer.version)["score"]
    assert abs(score - expected(request(), weight_of(served, pointer.version))["score"]).max() < 1e-6


def weight_of(served: Served, version: int) -> float:
    return float(served.repository.info(version).fingerprint.removeprefix("weight"))


def bundle(served: Served, weight: float) -> Path:
    return served.bundle(weight, fingerprint=f"weight{weight}")


@pytest.fixture
def pair(new_server: Callable[[], Served]) -> Served:
    """A running server that has served versions 1 and 2."""
    served = new_server()
    served.server.start()
    for weight in (1.0, 2.0):
        publish(bundle(served, weight), served.url, served.repository)
    return served


def test_a_publisher_killed_at_any_step_is_finished_by_the_same_call(pair: Served) -> None:
    """Until the switch the old version serves, from then on the new one; nothing half is left."""
    for number, step in enumerate(PUBLISH_STEPS, start=3):
        wanted = bundle(pair, float(number))
        assert die_at(step, pair, wanted) == -signal.SIGKILL
        check_serves(pair, {number if step == "tidy" else number - 1})
        pointer = publish(wanted, pair.url, pair.repository)
        assert (pointer.version, pointer.previous) == (number, number - 1)
        check_serves(pair, {number})
        assert pair.server.status().models["ranker"] == pointer.live
        assert not list(pair.repository.root.rglob("*.tmp"))


def test_a_publisher_killed_before_any_rename_is_finished_by_the_same_call(pair: Served) -> None:
    """Every change of the repository is a rename: kill before the first, the second, ... until none is left."""
    for number in range(1, MOST_RENAMES):
        version = number + 2
        wanted = bundle(pair, float(version))
        died = die_at(str(number), pair, wanted) == -signal.SIGKILL
        check_serves(pair, {version - 1, version})
        assert publish(wanted, pair.url, pair.repository).version == version
        check_serves(pair, {version})
        if not died:
            assert number > 3
            return
    pytest.fail(f"a publication renames more than {MOST_RENAMES} times")


def test_a_roll_back_killed_at_any_step_is_finished_by_the_same_call(pair: Served) -> None:
    """The version that was left or the one gone back to serves; never neither."""
    for step in ROLLBACK_STEPS:
        assert die_at(step, pair) == -signal.SIGKILL
        check_serves(pair, {2})
        assert rollback(pair.url, pair.repository).version == 1
        check_serves(pair, {1})
        assert rollback(pair.url, pair.repository, to=2).version == 2
        pair.repository.point_to(pair.repository.served().model_copy(update={"previous": 1, "rolled_back_from": None}))


def server_dies_at(step: str, served: Served) -> AbstractContextManager[None]:
    """The server is killed in the moment the publisher says that ``step`` begins."""
    pid = served.server.status().pid
    assert pid

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)], timeout=10)

    return at_step(step, kill)


@pytest.mark.parametrize("step", ["install", "load", "verify"])
def test_a_server_killed_under_a_publication_blames_no_version(pair: Served, step: str) -> None:
    """The pointer stays; after a start the old version answers, and the same publication gets the same number."""
    wanted = bundle(pair, 3.0)
    with server_dies_at(step, pair), pytest.raises(ServerUnreachable):
        publish(wanted, pair.url, pair.repository)
    pair.server.start()
    check_serves(pair, {2})
    assert pair.server.status().models["ranker"] == [1, 2]
    assert not list((pair.repository.root / "rejected").glob("*"))
    assert publish(wanted, pair.url, pair.repository).version == 3
    check_serves(pair, {3})


@pytest.mark.parametrize("step", ["switch", "tidy"])
def test_a_server_killed_once_the_candidate_was_right_starts_with_it(pair: Served, step: str) -> None:
    """The switch is a rename and needs no server; what it pointed to is what the next start loads."""
    with server_dies_at(step, pair):
        assert publish(bundle(pair, 3.0), pair.url, pair.repository).version == 3
    pair.server.start()
    check_serves(pair, {3})
    assert pair.server.status().models["ranker"] == [2, 3]


@pytest.mark.parametrize("step, served", [("load", 2), ("verify", 2), ("switch", 1)])
def test_a_server_killed_under_a_roll_back_leaves_a_valid_pointer(pair: Served, step: str, served: int) -> None:
    """Before the switch nothing has changed, after it everything has; the same call again ends it."""
    with server_dies_at(step, pair):
        if served == 2:
            with pytest.raises(ServerUnreachable):
                rollback(pair.url, pair.repository)
        else:
            rollback(pair.url, pair.repository)
    pair.server.start()
    check_serves(pair, {served})
    assert rollback(pair.url, pair.repository).version == 1
    check_serves(pair, {1})


def test_server_and_publisher_killed_together_leave_what_a_start_can_serve(pair: Served) -> None:
    """A power cut in the middle of a publication."""
    wanted = bundle(pair, 3.0)
    assert die_at("verify", pair, wanted) == -signal.SIGKILL
    pid = pair.server.status().pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    pair.server.start()
    check_serves(pair, {2})
    assert pair.server.status().models["ranker"] == [1, 2]
    assert publish(wanted, pair.url, ModelRepository(pair.repository.root)).version == 3
    check_serves(pair, {3})
