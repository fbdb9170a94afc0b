"""A private redis-server: loopback, a free port, no persistence."""

import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from freshrank.bench.measure import free_ports
from freshrank.errors import ConfigError
from freshrank.serving.deploy.local_server import LOOPBACK

START_SECONDS = 10.0


class RedisServer:
    """A context manager; the server can be killed, restarted (empty), paused and resumed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port = free_ports().grpc
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """As ``FRESHRANK_REDIS_URL`` takes it."""
        return f"{LOOPBACK}:{self.port}"

    def start(self) -> None:
        """Return once it answers; ConfigError where there is no redis-server or it does not start."""
        binary = shutil.which("redis-server")
        if binary is None:
            raise ConfigError("redis-server is not on the PATH; on Debian: apt-get install redis-server")
        self._directory.mkdir(parents=True, exist_ok=True)
        command = [
            binary,
            "--bind",
            LOOPBACK,
            "--port",
            str(self.port),
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(self._directory),
            "--daemonize",
            "no",
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.kill()
                raise ConfigError(f"redis-server did not start on port {self.port} within {START_SECONDS:.0f} s")
            time.sleep(0.02)

    def kill(self) -> None:
        """All it holds is lost."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """From now on it accepts connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection((LOOPBACK, self.port), timeout=0.2) as probe:
            probe.sendall(b"PING\r\n")
            return probe.recv(16).startswith(b"+PONG")
        return False
