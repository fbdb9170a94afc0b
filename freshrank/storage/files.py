"""Atomic writes, file locks and fingerprints."""

import ctypes
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

_HOST = socket.gethostname().replace("-", "_")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
Value = TypeVar("Value")


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    return path.parent / f".{path.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex}.tmp"


def _remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine that were killed left beside ``path``."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{_HOST}-*.tmp"):
        pid = leftover.name.removesuffix(".tmp").split("-")[-2]
        if not Path(f"/proc/{pid}").exists():
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside ``path``; on success fsync it and rename it over ``path``.

    An exception, or a process killed at any moment, leaves what was at ``path`` before.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory; on success it takes the name ``path``, replacing what stood there."""
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
    elif not _exchanged(temporary, path):
        doomed = _temporary(path)
        path.rename(doomed)
        temporary.rename(path)
        _remove(doomed)
    _sync(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux), so that no moment lacks either; False where the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0


@contextmanager
def locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path``, alone or with others who share it; a killed holder frees it.

    Whether it is held: without ``wait`` a lock that others hold is not waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, kind)
        except BlockingIOError:
            yield False
        else:
            yield True


class WatchedFile(Generic[Value]):
    """What ``read`` makes of the file ``path``, read again only when it is another file."""

    def __init__(self, path: Path, read: Callable[[], Value]) -> None:
        self.path = path
        self.last: Value | None = None
        """What was read last; what cannot be read now leaves it."""
        self._read = read
        self._seen: tuple[int, int, int] | None = None

    def value(self) -> Value:
        """FileNotFoundError where it is gone, whatever ``read`` raises where it cannot be read."""
        state = self.path.stat()
        seen = (state.st_mtime_ns, state.st_size, state.st_ino)
        if self.last is None or seen != self._seen:
            self.last, self._seen = self._read(), seen
        return self.last

    def forget(self) -> None:
        self.last = self._seen = None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; keys keep their order, which is the columns' order in a schema."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """16 hex digits that change when any part of the JSON-able ``value`` does, the order of keys included."""
    text = json.dumps(value, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
