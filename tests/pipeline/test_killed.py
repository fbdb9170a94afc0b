"""kill -9 in the middle of a daily run, at every step: run it again and nothing is lost, doubled or different."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.homes import DAY_1, Home

pytestmark = pytest.mark.integration

TRAIN, DEPLOY = "step=train", "'deploy'"
EVERY_STEP = ("'validate-data'", TRAIN, "step=calibrate", "step=evaluate", DEPLOY)
"""What the log of a run says when a step begins."""


@pytest.fixture
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, Home]]:
    """Two workspaces with the same world."""
    pair = Home.make(tmp_path_factory.mktemp("undisturbed")), Home.make(tmp_path_factory.mktemp("killed"))
    yield pair
    for home in pair:
        home.freshrank("stop")


@pytest.mark.parametrize("markers", [(TRAIN, DEPLOY), pytest.param(EVERY_STEP, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_an_undisturbed_one(markers: tuple[str, ...], homes: tuple[Home, Home]) -> None:
    """The whole process group dies at each of the steps in turn; the last start runs through."""
    undisturbed, disturbed = homes
    assert undisturbed.run(DAY_1).returncode == 0
    assert disturbed.freshrank("serve").returncode == 0
    for marker in markers:
        _run_and_kill_at(disturbed, marker)
    assert disturbed.run(DAY_1).returncode == 0
    assert disturbed.state() == undisturbed.state()
    assert not list(disturbed.path.rglob("*.tmp")), "what the killed runs left half-written is gone"


def _run_and_kill_at(home: Home, marker: str) -> None:
    with subprocess.Popen(
        home.command(*home.run_arguments(DAY_1)),
        env=home.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        timer = threading.Timer(300, process.kill)
        timer.start()
        for line in process.stdout:
            if marker in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
        else:
            pytest.fail(f"the run ended before {marker!r}")
        timer.cancel()
