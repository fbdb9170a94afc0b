"""Writes that either happened whole or not at all, and fingerprints of what was read."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"


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
    if path.exists():
        doomed = _temporary(path)
        path.rename(doomed)
        temporary.rename(path)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        temporary.rename(path)
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; keys keep their order, which is the columns' order in a schema."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """16 hex digits that change when any part of the JSON-able ``value`` does, the order of keys included."""
    text = json.dumps(value, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
