"""Writes that happen whole or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from freshrank.storage.files import WatchedFile, atomic_directory, atomic_write, fingerprint, read_json, write_json


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    """The old content survives; the temporary name is gone."""
    path = tmp_path / "a.json"
    write_json(path, {"version": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"version": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    """Nothing of the half-written directory shows under its name."""
    path = tmp_path / "out"
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(path) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError
    assert (path / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Files of the old one do not shine through."""
    path = tmp_path / "out"
    for name in ("a", "b"):
        with atomic_directory(path) as temporary:
            (temporary / name).touch()
    assert [entry.name for entry in path.iterdir()] == ["b"]


def test_json_keeps_the_order_of_keys_and_the_fingerprint_sees_it(tmp_path: Path) -> None:
    """The order of a schema's columns is the order of the model's inputs."""
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]
    assert fingerprint({"b": 1, "a": 2}) != fingerprint({"a": 2, "b": 1})


def test_what_a_killed_process_left_is_removed_by_the_next_write_and_never_seen(tmp_path: Path) -> None:
    """kill -9 in the middle of a replacement: the old directory stands, and the next write tidies up."""
    path = tmp_path / "out"
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("old")
    code = (
        "import os, signal, pathlib\nfrom freshrank.storage.files import atomic_directory\n"
        f"with atomic_directory(pathlib.Path({str(path)!r})) as t:\n"
        " (t / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (path / "a").read_text() == "new"


def test_a_watched_file_is_read_again_only_when_it_is_another_one(tmp_path: Path) -> None:
    """Replaced with a file of the same length, too."""
    path, reads = tmp_path / "a.json", []

    def read() -> int:
        reads.append(read_json(path))
        return reads[-1]

    watched = WatchedFile(path, read)
    for number in (1, 1, 2):
        if number not in reads:
            write_json(path, number)
        assert watched.value() == watched.value() == number
    assert reads == [1, 2]


def test_a_watched_file_that_cannot_be_read_leaves_what_it_said_last(tmp_path: Path) -> None:
    """Until it is whole again, or its watcher forgets it."""
    path = tmp_path / "a.json"
    watched = WatchedFile(path, lambda: read_json(path))
    with pytest.raises(FileNotFoundError):
        watched.value()
    write_json(path, "good")
    assert watched.value() == "good"
    path.write_text("{")
    for _ in range(2):
        with pytest.raises(ValueError, match="Expecting"):
            watched.value()
    assert watched.last == "good"
    write_json(path, "better")
    assert watched.value() == "better"
    watched.forget()
    assert watched.last is None
