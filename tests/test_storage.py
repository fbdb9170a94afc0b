"""Writes that happen whole or not at all."""

from pathlib import Path

import pytest

from freshrank.storage import atomic_directory, atomic_write, fingerprint, read_json, write_json


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path):
    """The old content survives; the temporary name is gone."""
    path = tmp_path / "a.json"
    write_json(path, {"version": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"version": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_directory_leaves_the_old_one(tmp_path: Path):
    """Nothing of the half-written directory shows under its name."""
    path = tmp_path / "out"
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(path) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError
    assert (path / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path):
    """Files of the old one do not shine through."""
    path = tmp_path / "out"
    for name in ("a", "b"):
        with atomic_directory(path) as temporary:
            (temporary / name).touch()
    assert [entry.name for entry in path.iterdir()] == ["b"]


def test_json_keeps_the_order_of_keys_and_the_fingerprint_sees_it(tmp_path: Path):
    """The order of a schema's columns is the order of the model's inputs."""
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]
    assert fingerprint({"b": 1, "a": 2}) != fingerprint({"a": 2, "b": 1})
