"""Object stores to test against: a directory, and moto's S3 behind a proxy that can be told to misbehave."""

import http.client
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "freshrank-test"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_DEFAULT_REGION": "us-east-1"}


class Proxy(ThreadingHTTPServer):
    """Hands requests on to ``upstream``, but for what the test asks for."""

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.unavailable = 0
        """How many of the next requests are answered 503."""
        self.hold_after: int | None = None
        """After that many uploads the next ones wait for ``released``."""
        self.held, self.released = threading.Event(), threading.Event()
        self.requests: list[tuple[str, str]] = []

    def behave(self) -> None:
        """Forget what was asked for before."""
        self.unavailable, self.hold_after = 0, None
        self.held.clear()
        self.released.clear()
        self.requests.clear()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def uploads(self) -> list[str]:
        return [path for method, path in self.requests if method == "PUT"]

    def busy(self) -> bool:
        self.unavailable -= 1
        return self.unavailable >= 0


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "PUT" and self.server.hold_after is not None:
            self.server.hold_after -= 1
            if self.server.hold_after < 0:
                self.server.held.set()
                self.server.released.wait(60)
        if self.server.busy():
            self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>")
            return
        # A writer that died while it was held back must not write after its death.
        if self._is_gone():
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        text = answer.read()
        self.server.requests.append((self.command, self.path))
        self._answer(answer.status, dict(answer.getheaders()), text)

    def _is_gone(self) -> bool:
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.setblocking(True)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _any

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def s3() -> Iterator[Proxy]:
    """An S3 with the empty bucket :data:`BUCKET`; the environment points to it."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    with pytest.MonkeyPatch.context() as environment, Proxy(moto.get_host_and_port()[1]) as proxy:
        for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": proxy.address}).items():
            environment.setenv(name, value)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        bare_client().create_bucket(Bucket=BUCKET)
        yield proxy
        proxy.shutdown()
    moto.stop()


@cache
def _client(address: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=address)


def bare_client() -> Any:
    """boto3's own client on the same store, to look and to spoil behind freshrank's back."""
    return _client(os.environ["AWS_ENDPOINT_URL"])
