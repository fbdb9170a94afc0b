"""Starting, finding and stopping a real tritonserver, however the one before it ended."""

import os
import py_compile
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from threading import Timer

import numpy as np
import psutil
import pytest
from served import Served
from tiny_bundles import OUTPUTS, expected, request

from freshrank.errors import ServingError
from freshrank.serving.deploy.local_server import SHARED_MEMORY, Ports, TritonServer
from freshrank.storage.files import write_json

NewServer = Callable[[], Served]
EARLIER_CODE = """
from freshrank.serving.cores import usable_cores
from freshrank.serving.golden import golden_cases
"""


def stubs_of(served: Served) -> list[psutil.Process]:
    return list(served.server._own_processes())


def test_starts_in_its_own_process_group_and_stops_without_leaving_anything(new_server: NewServer) -> None:
    """After stop no process, no pid file and no shared memory of this repository is left."""
    served = new_server()
    status = served.server.start()
    served.publish(1.0)
    assert status.ready
    assert os.getpgid(status.pid) == status.pid
    assert len(stubs_of(served)) == 3
    assert served.server.stop()
    assert not stubs_of(served)
    assert not served.server.pid_path.exists()
    assert not list(SHARED_MEMORY.glob(f"{served.server.shared_memory_prefix}*"))
    assert not served.server.stop()
    assert served.server.status().sentence() == "no Triton runs here; start one with `freshrank serve`"


def test_every_socket_listens_on_loopback_only(running: Served) -> None:
    """No port of the server can be reached from another machine."""
    process = psutil.Process(running.server.status().pid)
    listening = {c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {address.port for address in listening} == set(dict(running.server.ports).values())
    assert {address.ip for address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1"}


def test_starting_twice_leaves_the_first_server_alone(running: Served) -> None:
    """`freshrank serve` may be typed twice; on other ports it says who is in the way."""
    pid = running.server.status().pid
    assert running.server.start().pid == pid
    with pytest.raises(ServingError, match=rf"already runs \(pid {pid}\)"):
        TritonServer(running.repository, Ports(grpc=1, http=2, metrics=3)).start()


def test_a_port_in_use_is_named_before_anything_starts(running: Served, new_server: NewServer) -> None:
    """The message says which port is taken and which variable changes it."""
    served = new_server()
    served.server.ports = running.server.ports
    with pytest.raises(ServingError, match=r"grpc port .* FRESHRANK_TRITON_GRPC_PORT"):
        served.server.start()


def test_versions_that_an_earlier_release_installed_are_served_after_a_start(new_server: NewServer) -> None:
    """Their code imports modules that are gone; what it answers with is the bundle's and stays."""
    served = new_server()
    served.server.start()
    older, version = served.publish(2.0).version, served.publish(1.0).version
    served.server.stop()
    for number in (older, version):
        code = served.repository.version_directory(number) / "model.py"
        code.write_text(EARLIER_CODE)
        py_compile.compile(str(code))
    assert served.server.start().models["ranker"] == [older, version]
    for number, weight in ((older, 2.0), (version, 1.0)):
        assert np.allclose(served.ask(number)["probabilities"], expected(request(), weight)["probabilities"])


def test_a_server_that_cannot_load_its_models_shows_the_end_of_its_log(new_server: NewServer) -> None:
    """A damaged served version is an error with Triton's own words, not a wait until the deadline."""
    served = new_server()
    served.server.start()
    version = served.publish(1.0).version
    served.server.stop()
    (served.repository.version_directory(version) / "ranker.onnx").write_bytes(b"damaged")
    with pytest.raises(ServingError, match=r"(?s)exited.*load failed for model 'ranker'"):
        served.server.start()
    assert not stubs_of(served)


def test_killed_server_starts_again_and_serves_the_pointed_version(new_server: NewServer) -> None:
    """kill -9 leaves a stale pid file and orphaned stubs; the next start clears them and answers as before."""
    served = new_server()
    first = served.server.start()
    served.publish(1.0)
    version = served.publish(2.0).version
    before = served.ask(version)
    os.kill(first.pid, signal.SIGKILL)
    assert not served.server.status().ready
    again = served.server.start()
    assert again.pid != first.pid
    assert again.models == {"ranker": [version - 1, version], "ranking": [1]}
    assert again.sentence().endswith(f"pid {again.pid}; ranker versions [{version - 1}, {version}]")
    assert len(stubs_of(served)) == 4
    after = served.ask(version)
    assert all(before[name].tobytes() == after[name].tobytes() for name in OUTPUTS)


def test_a_server_that_dies_while_a_start_waits_for_it_is_started_anew(new_server: NewServer) -> None:
    """Stopped, it is alive and ignores requests: as one is between its kill and its end."""
    served = new_server()
    first = served.server.start().pid
    assert first
    os.kill(first, signal.SIGSTOP)
    killer = Timer(2.0, os.kill, (first, signal.SIGKILL))
    killer.start()
    again = served.server.start()
    assert killer.finished.is_set()
    assert again.ready
    assert again.pid != first


def test_a_pid_that_now_belongs_to_another_program_is_neither_trusted_nor_harmed(new_server: NewServer) -> None:
    """After a reboot the number in the pid file may be anyone's."""
    served = new_server()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        write_json(served.server.pid_path, {"pid": stranger.pid, "ports": served.server.ports.model_dump()})
        assert served.server.status().pid is None
        assert not served.server.stop()
        assert stranger.poll() is None
        stranger.kill()


def test_a_server_started_by_one_process_is_stopped_by_another(new_server: NewServer) -> None:
    """`freshrank serve` in one shell, everything else in the next."""
    served = new_server()
    program = (
        "import sys; from pathlib import Path\n"
        "from freshrank.serving.repository import ModelRepository\n"
        "from freshrank.serving.deploy.local_server import Ports, TritonServer\n"
        "TritonServer(ModelRepository(Path(sys.argv[1])), Ports.model_validate_json(sys.argv[2])).start()\n"
    )
    arguments = [str(served.repository.root), served.server.ports.model_dump_json()]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    assert served.server.status().ready
    assert served.server.stop()


def test_foreground_server_stops_with_its_terminal(new_server: NewServer) -> None:
    """SIGTERM to the foreground process ends tritonserver too, and cleanly."""
    served = new_server()
    program = (
        "import sys; from pathlib import Path\n"
        "from freshrank.serving.repository import ModelRepository\n"
        "from freshrank.serving.deploy.local_server import Ports, TritonServer\n"
        "TritonServer(ModelRepository(Path(sys.argv[1])), Ports.model_validate_json(sys.argv[2])).run()\n"
    )
    arguments = [str(served.repository.root), served.server.ports.model_dump_json()]
    with subprocess.Popen([sys.executable, "-c", program, *arguments]) as foreground:
        deadline = time.monotonic() + 30
        while not served.server.status().ready and time.monotonic() < deadline:
            time.sleep(0.1)
        foreground.terminate()
        assert foreground.wait(30) == 0
    assert not stubs_of(served)


def test_batches_of_any_size_are_answered_exactly(running: Served) -> None:
    """No tensor comes back empty: the trap of this Triton under numpy 2."""
    version = running.publish(0.5).version
    for rows in (1, 500):
        answer = running.ask(version, request(rows))
        for name, value in expected(request(rows), 0.5).items():
            assert answer[name].shape == value.shape
            assert abs(answer[name] - value).max() < 1e-6
