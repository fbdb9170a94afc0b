"""`freshrank serve`, `status` and `rollback` as a person types them."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served

from freshrank.serving.deploy.local_server import Ports, TritonServer
from freshrank.serving.repository import ModelRepository
from tests.homes import Home

pytestmark = pytest.mark.integration


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A workspace whose servers are stopped at the end."""
    home = Home.make(tmp_path)
    yield home
    for name in ("simulated", "other"):
        served_by(home, name).server.stop()


def served_by(home: Home, name: str) -> Served:
    """The repository and the server of dataset ``name`` on the ports of ``home``."""
    ports = {name: int(home.environment[f"FRESHRANK_TRITON_{name.upper()}_PORT"]) for name in Ports.model_fields}
    root = home.triton.parent / name
    return Served(TritonServer(ModelRepository(root), Ports(**ports)), home.path / f"bundles of {name}")


def test_status_and_rollback_say_what_serves_and_what_would(home: Home) -> None:
    """A rollback is done once; with no server running the pointer is a promise, and the exit code tells."""
    served = served_by(home, "simulated")
    absent = home.freshrank("status")
    assert (absent.returncode, "nothing is published yet" in absent.stdout) == (1, True)
    assert f"workspace: {home.path / 'home'}\n" in absent.stdout
    served.server.start()
    served.publish(1.0)
    first = home.freshrank("rollback")
    assert (first.returncode, "no version before 1 has served" in first.stderr) == (5, True)
    served.publish(2.0)
    done, again = home.freshrank("rollback"), home.freshrank("rollback")
    assert (done.returncode, done.stdout) == (0, "served version: 2 -> 1 (run 2022-05-01)\n")
    assert (again.returncode, again.stdout) == (0, "version 1 already serves (rolled back from 2)\n")
    present = home.freshrank("status")
    assert (present.returncode, "\nserved version: 1 (run 2022-05-01)\n" in present.stdout) == (0, True)
    # The day's version is installed, though no `freshrank calibrate` left a bundle in its run.
    stays = home.freshrank("publish", "--date", "2022-05-01")
    assert (stays.returncode, stays.stdout) == (0, "served version: 1\n")
    assert "publish with --force" in stays.stderr
    back = home.freshrank("publish", "--date", "2022-05-01", "--force")
    assert (back.returncode, back.stdout) == (0, "served version: 2\n")
    home.freshrank("rollback")
    served.server.stop()
    stopped = home.freshrank("status")
    assert (stopped.returncode, "would serve version 1 (run 2022-05-01) once started" in stopped.stdout) == (1, True)


def test_rank_refuses_the_server_of_another_dataset(home: Home) -> None:
    """It holds the port of ours; its answer would be about its own items."""
    served_by(home, "other").server.start()
    result = home.freshrank("rank", "--user", "1", "--candidates", "1,2")
    assert result.returncode == 5
    assert "serves 'other', expected 'simulated'; run `freshrank serve --data PATH`" in result.stderr
    assert result.stdout == ""


def test_serving_in_the_foreground_takes_the_ports_over_and_says_so(home: Home) -> None:
    """As plain `freshrank serve` does; the sentence comes once requests are answered, and Ctrl-C ends both."""
    other = served_by(home, "other")
    other.server.start()
    with subprocess.Popen(
        home.command("serve", "--foreground"), env=home.environment, stdout=subprocess.PIPE, text=True
    ) as foreground:
        assert foreground.stdout
        said = foreground.stdout.readline() + foreground.stdout.readline()
        assert "stopped the Triton of dataset 'other'" in said
        assert "Triton answers at" in said
        assert served_by(home, "simulated").server.status().ready
        foreground.send_signal(signal.SIGINT)
        assert foreground.wait(30) == 0
    assert served_by(home, "simulated").server.status().pid is None
