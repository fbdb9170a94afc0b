"""Run the tritonserver of the ``nvidia-pytriton`` wheel on this machine, bound to loopback."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import psutil
from pydantic import BaseModel, ConfigDict

from freshrank.errors import ServingError
from freshrank.serving import control_token
from freshrank.serving.repository import RANKER, ModelRepository
from freshrank.serving.triton import TritonClient
from freshrank.settings import Settings, settings
from freshrank.storage.files import atomic_directory, read_json, write_json

LOOPBACK = "127.0.0.1"
START_SECONDS = 120.0
STOP_SECONDS = 20.0
LOG_TAIL_LINES = 25
STUB_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
"""No model multiplies matrices in numpy, whose idle pool would cost every load of a version time on all cores."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # where Triton and its Python stubs meet


class Ports(BaseModel):
    """The three ports of one server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002

    @classmethod
    def of(cls, where: Settings) -> Self:
        return cls(grpc=where.triton_grpc_port, http=where.triton_http_port, metrics=where.triton_metrics_port)


@dataclass(frozen=True)
class ServerStatus:
    """What runs: ``pid`` is None when nothing does; ``models`` maps each model to its loaded versions."""

    pid: int | None
    ready: bool
    ports: Ports
    models: dict[str, list[int]]

    @property
    def grpc_url(self) -> str:
        return f"{LOOPBACK}:{self.ports.grpc}"

    def sentence(self) -> str:
        """The status as a person wants to hear it."""
        if self.pid is None:
            return "no Triton runs here; start one with `freshrank serve`"
        if not self.ready:
            return f"Triton (pid {self.pid}) runs but is not ready at {self.grpc_url} (gRPC)"
        versions = self.models.get(RANKER)
        loaded = f"ranker versions {versions}" if versions else "no ranker is loaded yet"
        return f"Triton answers at {self.grpc_url} (gRPC), pid {self.pid}; {loaded}"


class _Record(BaseModel):
    """The pid file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int
    ports: Ports


class TritonServer:
    """The tritonserver of one model repository. Any process may start it and any other one stop it."""

    def __init__(self, repository: ModelRepository, ports: Ports | None = None, replica: str = "") -> None:
        """``replica`` names another server of the same repository, on ports of its own; the first has no name."""
        self.repository = repository
        self.ports = ports or Ports.of(settings())
        self.replica = f"-{replica}" if replica else ""
        self.log_path = repository.root / f"server{self.replica}.log"
        self.pid_path = repository.root / f"server{self.replica}.json"
        self._wheel = Wheel.find()
        self._stub = repository.root / f"backends{self.replica}" / "python" / "triton_python_backend_stub"

    def start(self, timeout: float = START_SECONDS) -> ServerStatus:
        """Start in the background, in a process group of its own, and return once every served model is loaded.

        A server of this repository that already runs on the same ports is left as it is.
        """
        with self.repository.lock():
            if not self._adopts(timeout):
                self._launch()
                if not self._is_ready_within(timeout):
                    raise self._failure("exited")
        return self.status()

    def _adopts(self, timeout: float) -> bool:
        """Whether a server runs here already and is ready; one killed a moment ago looks alive until it is gone."""
        running = self._running()
        if running is None:
            return False
        self._require_same_ports(running)
        return self._is_ready_within(timeout)

    def stop(self, timeout: float = STOP_SECONDS) -> bool:
        """Stop the server and its Python stubs; False when none ran."""
        record = self._running()
        if record:
            with suppress(psutil.Error):
                psutil.Process(record.pid).terminate()
            _wait_until(lambda: not _command_of(record.pid), timeout)
        self._clear_leftovers()
        return record is not None

    def status(self) -> ServerStatus:
        record = self._running()
        if record is None:
            return ServerStatus(None, False, self.ports, {})
        with TritonClient.controlling(self.repository, f"{LOOPBACK}:{record.ports.grpc}", timeout=5.0) as client:
            ready = client.is_ready()
            return ServerStatus(record.pid, ready, record.ports, client.ready_versions() if ready else {})

    def run(self, start: Callable[[], object] | None = None) -> None:
        """Start, stay in the foreground until SIGINT or SIGTERM, stop. Raise ServingError if the server dies.

        ``start`` stands in for :meth:`start` where more is to be done or said.
        """
        asked_to_stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: asked_to_stop.set())
        (start or self.start)()
        while not asked_to_stop.wait(0.5):
            if self._running() is None:
                self._clear_leftovers()
                raise ServingError(f"tritonserver died\n{self._log_tail()}")
        self.stop()

    def _launch(self) -> None:
        self._clear_leftovers()
        self._require_free_ports()
        models = self.repository.write_configs()
        if not self._has_siblings():
            control_token.renew_token(self.repository.root)
        self._wheel.assemble_backends(self._stub.parent.parent)
        if self.log_path.exists():
            self.log_path.replace(self.log_path.with_suffix(".previous.log"))
        with self.log_path.open("wb") as log:
            process = subprocess.Popen(
                self._command(models),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The model `ranking` finds the online store there.
                env=self._wheel.environment() | STUB_ENVIRONMENT | {"FRESHRANK_HOME": str(settings().home)},
                start_new_session=True,
            )
        write_json(self.pid_path, _Record(pid=process.pid, ports=self.ports).model_dump())

    def _command(self, models: list[str]) -> list[str]:
        return [
            *self._identity(),
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory_prefix}",
            "--model-control-mode=explicit",
            # Every config is complete; completing it would start one more Python process per version.
            "--disable-auto-complete-config",
            # Strictly, a server is "not ready" while any version loads or unloads, or after a candidate failed to.
            "--strict-readiness=false",
            *(f"--load-model={model}" for model in models),
            f"--grpc-address={LOOPBACK}",
            f"--grpc-port={self.ports.grpc}",
            f"--http-address={LOOPBACK}",
            f"--http-port={self.ports.http}",
            f"--metrics-address={LOOPBACK}",
            f"--metrics-port={self.ports.metrics}",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=10",
            *control_token.restrictions(control_token.token_of(self.repository.root)),
        ]

    def _identity(self) -> list[str]:
        return [
            str(self._wheel.binary),
            f"--model-repository={self.repository.models}",
            f"--backend-directory={self._stub.parent.parent}",
        ]

    def _has_siblings(self) -> bool:
        """Whether another server of this repository runs, with the token that is there."""
        names = [
            path.stem.removeprefix("server").removeprefix("-") for path in self.repository.root.glob("server*.json")
        ]
        others = [TritonServer(self.repository, self.ports, name) for name in names]
        return any(other._running() for other in others if other.replica != self.replica)

    @property
    def shared_memory_prefix(self) -> str:
        """Of the names under SHARED_MEMORY."""
        return f"freshrank_{uuid.uuid5(uuid.NAMESPACE_URL, f'{self.repository.root}{self.replica}').hex}_"

    def _running(self) -> _Record | None:
        """The record of the pid file, unless that process is gone or its number now belongs to another program."""
        if not self.pid_path.exists():
            return None
        record = _Record.model_validate(read_json(self.pid_path))
        return record if self._is_own(_command_of(record.pid)) else None

    def _require_same_ports(self, record: _Record) -> None:
        if record.ports != self.ports:
            raise ServingError(
                f"the server of {self.repository.root} already runs (pid {record.pid}) on {record.ports}, "
                f"not on {self.ports}; stop it first"
            )

    def _require_free_ports(self) -> None:
        for name, port in self.ports:
            # A killed process closes its sockets a moment after it has lost its command line.
            if not _wait_until(partial(_is_free, port), 1.0):
                raise ServingError(
                    f"{name} port {port} of {LOOPBACK} is in use by another program; "
                    f"set FRESHRANK_TRITON_{name.upper()}_PORT to a free one"
                )

    def _is_ready_within(self, timeout: float) -> bool:
        """False as soon as the server is dead. Raise ServingError, and stop it, if it lives on without being ready."""
        with TritonClient(f"{LOOPBACK}:{self.ports.grpc}", timeout=5.0) as client:
            _wait_until(lambda: client.is_ready() or self._running() is None, timeout)
            if self._running() is None:
                return False
            if not client.is_ready():
                raise self._failure(f"was not ready after {timeout:.0f} s")
            return True

    def _failure(self, fate: str) -> ServingError:
        self.stop()
        return ServingError(f"tritonserver {fate}; the end of {self.log_path}:\n{self._log_tail()}")

    def _clear_leftovers(self) -> None:
        """Clean up after a dead or unresponsive server: kill it and its stubs, remove its shared memory and pid
        file.
        """
        for process in self._own_processes():
            with suppress(psutil.Error):
                process.kill()
        _wait_until(lambda: not any(self._own_processes()), 5.0)
        for region in SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"):
            region.unlink(missing_ok=True)
        self.pid_path.unlink(missing_ok=True)

    def _own_processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            command = _command_of(process.pid)
            if command[:1] == [str(self._stub)] or self._is_own(command):
                yield process

    def _is_own(self, command: list[str]) -> bool:
        return command[:3] == self._identity()

    def _log_tail(self) -> str:
        if not self.log_path.exists():
            return "(no log)"
        lines = self.log_path.read_text(errors="replace").splitlines()
        # Triton prints its models and options as tables, wide and of no use here.
        return "\n".join([line for line in lines if line and line[0] not in "|+"][-LOG_TAIL_LINES:])


@dataclass(frozen=True)
class Wheel:
    """Where the ``nvidia-pytriton`` wheel keeps its tritonserver; the package itself is never imported."""

    site_packages: Path

    @classmethod
    def find(cls) -> Self:
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise ServingError("no local tritonserver: install it with `pip install --no-deps nvidia-pytriton==0.7.0`")
        return cls(Path(spec.origin).parent.parent)

    @property
    def home(self) -> Path:
        return self.site_packages / "pytriton" / "tritonserver"

    @property
    def binary(self) -> Path:
        return self.home / "bin" / "tritonserver"

    def assemble_backends(self, directory: Path) -> None:
        """Link the Python backend and the stub of this Python version together, as the server expects them."""
        with atomic_directory(directory) as temporary:
            (temporary / "python").mkdir()
            for file in [*(self.home / "backends" / "python").glob("*.*"), self._stub()]:
                (temporary / "python" / file.name).symlink_to(file)

    def environment(self) -> dict[str, str]:
        """This process's environment with the wheel's and Python's libraries, and with this Python for the stubs."""
        libraries = [str(self.site_packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
        return {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *_path_entries("LD_LIBRARY_PATH")]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), *_path_entries("PATH")]),
        }

    def _stub(self) -> Path:
        stubs = self.home / "python_backend_stubs"
        wanted = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = stubs / wanted / "triton_python_backend_stub"
        if not stub.exists():
            offered = sorted(path.name for path in stubs.iterdir())
            raise ServingError(f"the tritonserver wheel has no stub for Python {wanted}, only for {offered}")
        return stub


def _path_entries(variable: str) -> list[str]:
    return [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _command_of(pid: int) -> list[str]:
    """Command line of a process; empty when it is gone, a zombie, or not ours to see."""
    try:
        return list(psutil.Process(pid).cmdline())
    except psutil.Error:
        return []


def _wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
