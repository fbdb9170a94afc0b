"""Directories in an object store are whole or not at all, whatever happens to writer, network and store."""

import os
import signal
import subprocess
import sys
import urllib.request
import uuid
from pathlib import Path

import pytest

from freshrank.errors import ConfigError, StorageError
from freshrank.settings import Settings, settings
from freshrank.storage.object_store import FETCHED, ObjectStore
from tests.object_stores import BUCKET, Proxy, bare_client
from tests.paths import PROJECT_ROOT

pytestmark = pytest.mark.integration

FIRST, SECOND = {"a.txt": "one", "deep/b.txt": "two"}, {"a.txt": "one", "deep/b.txt": "changed", "c.txt": "new"}


@pytest.fixture
def url(proxy: Proxy) -> str:
    """A prefix of its own in the one bucket."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        return ObjectStore(request.getfixturevalue("url"))
    (tmp_path / "bucket").mkdir()
    return ObjectStore(f"file://{tmp_path / 'bucket'}")


def directory(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def contents(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): file.read_text()
        for file in path.rglob("*")
        if file.is_file() and file.name != FETCHED
    }


def test_the_newest_version_is_fetched_whole(store: ObjectStore, tmp_path: Path) -> None:
    """What an earlier fetch left and the version lacks is gone."""
    store.save("models/x", directory(tmp_path / "first", FIRST | {"gone.txt": "old"}))
    store.fetch("models/x", tmp_path / "out")
    store.save("models/x", directory(tmp_path / "second", SECOND), {"step": 7})
    manifest = store.fetch("models/x", tmp_path / "out")
    assert manifest is not None
    assert manifest.facts == {"step": 7}
    assert contents(tmp_path / "out") == SECOND


def test_where_nothing_is_kept_nothing_changes(store: ObjectStore, tmp_path: Path) -> None:
    """None, and the directory is as it was."""
    directory_before = directory(tmp_path / "out", FIRST)
    assert store.newest("models/x") is None
    assert store.fetch("models/x", directory_before) is None
    assert contents(directory_before) == FIRST


def test_versions_beyond_the_kept_ones_are_removed(store: ObjectStore, tmp_path: Path) -> None:
    """With the contents that only they had; another name is untouched."""
    store.save("other", directory(tmp_path / "other", FIRST))
    for number in range(4):
        store.save("models/x", directory(tmp_path / str(number), {"same": "same", "own": str(number)}), keep=2)
    assert len(store._list("models/x", "manifests")) == 2
    assert len(store._list("models/x", "objects")) == 3
    store.remove("models/x")
    assert store.newest("models/x") is None
    assert store.newest("other") is not None


def test_only_what_changed_is_sent_and_fetched(proxy: Proxy, url: str, tmp_path: Path) -> None:
    """A second version costs its new contents and one manifest."""
    store = ObjectStore(url)
    store.save("data", directory(tmp_path / "in", FIRST))
    store.fetch("data", tmp_path / "out")
    proxy.requests.clear()
    store.save("data", directory(tmp_path / "in", SECOND))
    assert len(proxy.uploads) == 3
    proxy.requests.clear()
    store.fetch("data", tmp_path / "out")
    assert len([path for method, path in proxy.requests if method == "GET" and "/objects/" in path]) == 2
    assert contents(tmp_path / "out") == SECOND


def _spoil(url: str, part: str, change: str) -> None:
    """The newest manifest, or the largest object."""
    client, prefix = bare_client(), url.rpartition("/")[2]
    objects = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/data/{part}")["Contents"]
    newest = max(objects, key=lambda each: each["Key"] if part == "manifests" else each["Size"])
    body = client.get_object(Bucket=BUCKET, Key=newest["Key"])["Body"].read()
    if change == "gone":
        client.delete_object(Bucket=BUCKET, Key=newest["Key"])
    else:
        other = body[:-1] if change == "truncated" else bytes([body[0] ^ 1]) + body[1:]
        client.put_object(Bucket=BUCKET, Key=newest["Key"], Body=other)


@pytest.mark.parametrize("part", ["objects", "manifests"])
@pytest.mark.parametrize("change", ["truncated", "altered", "gone"])
def test_a_spoilt_version_is_passed_over(proxy: Proxy, url: str, tmp_path: Path, part: str, change: str) -> None:
    """The one before is fetched instead, and nothing of the spoilt one."""
    store = ObjectStore(url)
    store.save("data", directory(tmp_path / "first", {"a.txt": "one"}))
    store.save("data", directory(tmp_path / "second", {"a.txt": "a longer text"}))
    _spoil(url, part, change)
    assert store.fetch("data", tmp_path / "out") is not None
    assert contents(tmp_path / "out") == {"a.txt": "one"}


def test_without_a_whole_version_nothing_is_touched(proxy: Proxy, url: str, tmp_path: Path) -> None:
    """The error names what is broken."""
    store = ObjectStore(url)
    store.save("data", directory(tmp_path / "first", FIRST))
    _spoil(url, "objects", "truncated")
    out = directory(tmp_path / "out", SECOND)
    with pytest.raises(StorageError, match="no version is whole"):
        store.fetch("data", out)
    assert contents(out) == SECOND


def test_a_truncated_object_is_sent_again(proxy: Proxy, url: str, tmp_path: Path) -> None:
    """Its size gives it away to the next upload of the same contents."""
    store = ObjectStore(url)
    store.save("data", directory(tmp_path / "first", FIRST))
    _spoil(url, "objects", "truncated")
    store.save("data", tmp_path / "first")
    store.fetch("data", tmp_path / "out")
    assert contents(tmp_path / "out") == FIRST


def test_a_busy_store_is_asked_again(proxy: Proxy, url: str, tmp_path: Path) -> None:
    """Some answers of 503 delay an upload and no more."""
    store = ObjectStore(url)
    proxy.unavailable = 3
    store.save("data", directory(tmp_path / "first", FIRST))
    assert store.fetch("data", tmp_path / "out") is not None


def test_a_store_that_stays_busy_is_given_up_on(proxy: Proxy, url: str) -> None:
    """The error says how often it was tried and what to look at."""
    proxy.unavailable = 1000
    with pytest.raises(StorageError, match=r"failed 5 times.*AWS_ENDPOINT_URL"):
        ObjectStore(url)
    assert proxy.unavailable == 1000 - 5


def test_a_missing_bucket_is_named(proxy: Proxy, url: str, tmp_path: Path) -> None:
    """It would look like an empty one otherwise."""
    with pytest.raises(StorageError, match=r"s3://nobody.*create it, or fix FRESHRANK_STORAGE_URL"):
        ObjectStore("s3://nobody/x")
    with pytest.raises(StorageError, match="is not a directory"):
        ObjectStore(f"file://{tmp_path / 'nowhere'}")


def test_a_wrong_key_is_named_and_not_tried_again(proxy: Proxy, url: str) -> None:
    """What to mend, without the secret."""
    _authenticate(proxy, "0")
    try:
        with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID") as failure:
            ObjectStore(url)
    finally:
        _authenticate(proxy, "inf")
    assert "hunter2" not in str(failure.value)
    assert len([path for method, path in proxy.requests if method == "HEAD"]) == 1


def _authenticate(proxy: Proxy, after: str) -> None:
    """moto looks at keys from its ``after``-th request on."""
    url = f"http://127.0.0.1:{proxy.upstream}/moto-api/reset-auth"
    kind = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(url, after.encode(), kind, method="POST")).close()


WRITER = """
import sys
from pathlib import Path
from freshrank.storage.object_store import ObjectStore
ObjectStore(sys.argv[1]).save("data", Path(sys.argv[2]))
"""


@pytest.mark.parametrize("sent", [1, 2])
def test_a_writer_killed_with_kill_9_leaves_the_version_before(
    proxy: Proxy, url: str, tmp_path: Path, sent: int
) -> None:
    """In the middle of its second file, or of the manifest; the next writer sends only what is missing."""
    store = ObjectStore(url)
    store.save("data", directory(tmp_path / "first", FIRST))
    second = directory(tmp_path / "second", {"x": "new one", "y": "new two"})
    proxy.hold_after = sent
    arguments = [sys.executable, "-c", WRITER, url, str(second)]
    with subprocess.Popen(arguments, cwd=PROJECT_ROOT, env=os.environ) as writer:
        assert proxy.held.wait(30)
        writer.send_signal(signal.SIGKILL)
    proxy.hold_after = None
    proxy.released.set()
    store.fetch("data", tmp_path / "out")
    assert contents(tmp_path / "out") == FIRST
    store.save("data", second)
    store.fetch("data", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(second)


def test_a_manifest_cannot_reach_beyond_its_directory(store: ObjectStore, tmp_path: Path) -> None:
    """Whoever can write to the bucket cannot write elsewhere on this machine."""
    outside = directory(tmp_path / "in", {"x": "text"})
    (tmp_path / "y").write_text("text")
    store.save("data", outside, names=["../y"])
    with pytest.raises(StorageError, match="outside the directory"):
        store.fetch("data", tmp_path / "out")


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket/x",
        "http://bucket/x",
        "s3://",
        "file://host/x",
        "s3://b?k=hunter2",
        "/var/lib",
        "s3://[hunter2",
    ],
)
def test_a_url_of_another_kind_is_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold a secret, and settings travel in the clear to every step."""
    monkeypatch.setenv("FRESHRANK_STORAGE_URL", url)
    settings.cache_clear()
    with pytest.raises(
        ConfigError, match="FRESHRANK_STORAGE_URL: received a value that is not repeated here"
    ) as failure:
        settings()
    settings.cache_clear()
    assert "hunter2" not in str(failure.value)


def test_an_endpoint_with_credentials_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """It travels in the clear as well."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://key:hunter2@minio:9000")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL") as failure:
        ObjectStore("s3://bucket")
    assert "hunter2" not in str(failure.value)


@pytest.mark.parametrize("url", ["", "s3://bucket", "s3://bucket/prefix/", "file:///mnt/store"])
def test_a_url_of_a_store_is_taken(url: str) -> None:
    """A slash at the end means nothing."""
    assert Settings(storage_url=url).storage_url == url.rstrip("/")
