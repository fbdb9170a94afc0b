"""Threads are counted by what a container is given, not by what its node has."""

import os
from pathlib import Path

import pytest

from freshrank.serving.cpu import usable_cores

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("100001 100000", min(2, CORES)),
        ("6400000 100000", CORES),
        ("max 100000", CORES),
        ("", CORES),
    ],
)
def test_a_containers_quota_bounds_the_cores(limit: str, expected: int, tmp_path: Path) -> None:
    """Half a core is one; no quota, or one above the node's cores, is all of them."""
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert usable_cores(tmp_path / "cpu.max") == expected


def test_without_a_control_group_it_is_the_cores_of_the_process(tmp_path: Path) -> None:
    """No such file: an older kernel, or no Linux container."""
    assert usable_cores(tmp_path / "absent") == CORES
