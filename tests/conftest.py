"""What tests of several parts need: a workspace of their own, and an object store."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from freshrank.settings import settings

if TYPE_CHECKING:
    from tests.object_stores import Proxy


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: what is short then fills up whichever worker is done before the other."""
    items.sort(key=lambda item: item.get_closest_marker("integration") is None)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workspace; settings are read anew before and after the test."""
    monkeypatch.setenv("FRESHRANK_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield tmp_path / "home"
    settings.cache_clear()


@pytest.fixture(scope="module")
def running_store() -> "Iterator[Proxy]":
    """moto's S3 behind a proxy, for all tests of a module."""
    from tests.object_stores import s3

    with s3() as proxy:
        yield proxy


@pytest.fixture
def proxy(running_store: "Proxy") -> "Proxy":
    """The same, behaving."""
    running_store.behave()
    return running_store
