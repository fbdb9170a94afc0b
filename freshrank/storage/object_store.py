"""Directories in an object store, stored atomically although such stores cannot rename.

<url>/<name>/objects/<sha256>                contents of files, each once
<url>/<name>/manifests/<number>-<hash>.json  the files of one version, by their sha256; <hash> is that of its own bytes

A manifest is written after everything it names, so a version is there or it is not: whoever writes may be killed at any
moment. Readers take what the newest whole manifest names and check every byte of it, else they take the one before.
One writer per name is expected; a second one costs at most a version, which readers then pass over.
"""

import hashlib
import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from freshrank.errors import ConfigError, MissingArtifact, StorageError
from freshrank.retry import retrying
from freshrank.settings import settings, store_endpoint, store_url
from freshrank.storage.files import atomic_directory, read_json, sha256_of, write_json

ATTEMPTS = 5
PARALLEL = 8
FETCHED = ".fetched.json"
"""In a fetched directory: which of its files has which sha256."""

log = logging.getLogger(__name__)
_MANIFEST = re.compile(r"(\d{8})-([0-9a-f]{16})\.json")
_LEFT_OVER = timedelta(days=1)
"""What no manifest names after that long belongs to no upload that still runs."""
_URL = re.compile(r"(s3|file):/+(.+)")
"""A Path has one slash where the URL had two."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
P = ParamSpec("P")
T = TypeVar("T")


class Entry(BaseModel):
    """One file of a version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """One version: its files by their path inside the directory, and what else its writer said of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, Entry]
    facts: dict[str, Any] = {}

    @classmethod
    def of(cls, directory: Path, names: Iterable[str], facts: dict[str, Any]) -> "Manifest":
        paths = {name: directory / name for name in sorted(names)}
        files = {name: Entry(sha256=sha256_of(path), bytes=path.stat().st_size) for name, path in paths.items()}
        return cls(files=files, facts=facts)

    @property
    def objects(self) -> set[str]:
        return {entry.sha256 for entry in self.files.values()}


@dataclass(frozen=True)
class Stored:
    """A manifest in the store, not yet read."""

    number: int
    digest: str
    path: str


class Broken(Exception):
    """A version cannot be used; the one before it may be."""


class ObjectStore:
    """The store at ``url`` (``file:///directory`` or ``s3://bucket/prefix``).

    Every method raises StorageError where the store refuses, or still fails after :data:`ATTEMPTS` attempts.
    """

    def __init__(self, url: str) -> None:
        try:
            self.url = store_url(url)
        except ValueError as error:
            raise ConfigError(f"object store: {error}") from None
        self._fs: Any = _file_system(self.url)
        self._root: str = self._fs._strip_protocol(self.url)
        # A missing bucket or directory would look like an empty one.
        if self.url.startswith("s3:"):
            self._call(self._fs.call_s3, "head_bucket", Bucket=self._root.partition("/")[0])
        elif not Path(self._root).is_dir():
            raise StorageError(f"{self.url}: is not a directory; create it, or mount what belongs there")

    def save(
        self,
        name: str,
        directory: Path,
        facts: dict[str, Any] | None = None,
        keep: int = 2,
        names: Iterable[str] | None = None,
    ) -> Manifest:
        """Keep ``directory`` (of it the files ``names``; default all) as the newest version of ``name``.

        Only contents that the store lacks are sent. All but the newest ``keep`` versions are removed.
        """
        manifest = Manifest.of(directory, _files(directory) if names is None else names, facts or {})
        held = {path.rpartition("/")[2]: found["size"] for path, found in self._list(name, "objects").items()}
        entries = manifest.files.items()
        missing = {entry.sha256: directory / file for file, entry in entries if held.get(entry.sha256) != entry.bytes}

        def send(item: tuple[str, Path]) -> None:
            sha256, path = item
            self._call(self._write, self._object(name, sha256), lambda key: self._fs.put_file(str(path), key))

        _in_parallel(send, missing.items())
        self._write_manifest(name, manifest)
        self._prune(name, keep)
        log.info("kept %s/%s: %d files, %d of them sent", self.url, name, len(manifest.files), len(missing))
        return manifest

    def newest(self, name: str) -> Manifest | None:
        """The newest whole manifest of ``name``; None where nothing is kept."""
        for stored in self._stored(name):
            try:
                return self._read(stored)
            except Broken as broken:
                log.warning("%s", broken)
        return None

    def fetch(self, name: str, directory: Path) -> Manifest | None:
        """Make ``directory`` the newest version of ``name`` that is whole; None, and no change, where nothing is kept.

        Files that an earlier fetch left there are not sent again.

        Raises:
            StorageError: versions are kept but none is whole; ``directory`` is unchanged.
        """
        problems = []
        for stored in self._stored(name):
            try:
                return self._fetch(name, self._read(stored), directory)
            except Broken as broken:
                log.warning("%s; trying the version before", broken)
                problems.append(str(broken))
        if problems:
            raise StorageError(f"{self.url}/{name}: no version is whole: {'; '.join(problems)}")
        return None

    def names(self, prefix: str) -> list[str]:
        """What is kept directly under ``prefix``, sorted."""
        where = f"{self._root}/{prefix}/"
        paths = self._call(self._fs.find, where)
        return sorted({path.removeprefix(where).partition("/")[0] for path in paths})

    def remove(self, name: str) -> None:
        """Delete all versions of ``name``, manifests first."""
        for part in ("manifests", "objects"):
            self._delete(self._list(name, part))

    def _fetch(self, name: str, manifest: Manifest, directory: Path) -> Manifest:
        listed = read_json(directory / FETCHED) if (directory / FETCHED).exists() else {}
        known = {file: Entry(**entry) for file, entry in listed.items()}
        if known == manifest.files and all(_is_there(directory / file, entry) for file, entry in known.items()):
            return manifest
        with atomic_directory(directory) as temporary:

            def place(item: tuple[str, Entry]) -> None:
                path, before = _inside(temporary, item[0]), directory / item[0]
                path.parent.mkdir(parents=True, exist_ok=True)
                if known.get(item[0]) == item[1] and _is_there(before, item[1]):
                    link(before, path)
                else:
                    self._get(self._object(name, item[1].sha256), path, item[1])

            _in_parallel(place, manifest.files.items())
            write_json(temporary / FETCHED, manifest.model_dump()["files"])
        return manifest

    def _get(self, key: str, path: Path, entry: Entry) -> None:
        try:
            # Truncated in transit or in the store? A second read tells.
            for _ in range(2):
                self._call(self._fs.get_file, key, str(path))
                if path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256:
                    return
        except _Absent as error:
            raise Broken(f"{key}: is gone from the store") from error
        raise Broken(f"{key}: {path.stat().st_size} bytes that are not the {entry.bytes} that were kept there")

    def _write(self, key: str, write: Callable[[str], object]) -> None:
        """An upload is seen once it is whole in S3, but not in a directory, where it needs a rename."""
        if self.url.startswith("s3:"):
            write(key)
            return
        temporary = f"{key}.{uuid.uuid4().hex}.tmp"
        self._fs.makedirs(key.rpartition("/")[0], exist_ok=True)
        write(temporary)
        self._fs.mv(temporary, key)

    def _write_manifest(self, name: str, manifest: Manifest) -> None:
        text = json.dumps(manifest.model_dump(), default=str, sort_keys=True).encode()
        number = max((stored.number for stored in self._stored(name)), default=0) + 1
        key = f"{self._root}/{name}/manifests/{number:08d}-{_digest(text)}.json"
        self._call(self._write, key, lambda target: self._fs.pipe_file(target, text))

    def _read(self, stored: Stored) -> Manifest:
        try:
            text = self._call(self._fs.cat_file, stored.path)
        except _Absent as error:
            raise Broken(f"{stored.path}: is gone from the store") from error
        if _digest(text) != stored.digest:
            raise Broken(f"{stored.path}: its bytes are not those that were written")
        try:
            return Manifest.model_validate_json(text)
        except ValidationError as error:
            raise Broken(f"{stored.path}: is no manifest of this release: {error}") from error

    def _stored(self, name: str) -> list[Stored]:
        """Manifests of ``name``, the newest first."""
        matches = [(path, _MANIFEST.fullmatch(path.rpartition("/")[2])) for path in self._list(name, "manifests")]
        return sorted(
            (Stored(int(match[1]), match[2], path) for path, match in matches if match),
            key=lambda stored: (stored.number, stored.path),
            reverse=True,
        )

    def _prune(self, name: str, keep: int) -> None:
        stored = self._stored(name)
        retained, doomed = ([self._manifest(each) for each in part] for part in (stored[:keep], stored[keep:]))
        self._delete([each.path for each in stored[keep:]])
        needed, dropped = ({sha for manifest in part for sha in manifest.objects} for part in (retained, doomed))
        held = {path: path.rpartition("/")[2] for path in self._list(name, "objects")}
        unnamed = {path: sha for path, sha in held.items() if sha not in needed}
        self._delete([path for path, sha in unnamed.items() if sha in dropped or self._is_old(path)])

    def _manifest(self, stored: Stored) -> Manifest:
        """An unreadable one names nothing."""
        try:
            return self._read(stored)
        except Broken:
            return Manifest(files={})

    def _is_old(self, path: str) -> bool:
        with suppress(_Absent):
            written: datetime = self._call(self._fs.modified, path)
            return datetime.now(UTC) - written.astimezone(UTC) > _LEFT_OVER
        return False

    def _list(self, name: str, part: str) -> dict[str, dict[str, Any]]:
        where = f"{self._root}/{name}/{part}"
        entries: dict[str, dict[str, Any]] = self._call(self._fs.find, where, detail=True)
        return entries

    def _delete(self, paths: Iterable[str]) -> None:
        def one(path: str) -> None:
            with suppress(_Absent):
                self._call(self._fs.rm_file, path)

        _in_parallel(one, paths)

    def _object(self, name: str, sha256: str) -> str:
        return f"{self._root}/{name}/objects/{sha256}"

    def _call(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Tried again while what failed may pass; then an error that says what to mend."""
        try:
            return retrying(_may_pass, attempts=ATTEMPTS)(function, *arguments, **named)
        except Exception as error:
            self._explain(error)

    def _explain(self, error: Exception) -> NoReturn:
        named = f"{self.url}: {type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError):
            raise _Absent(f"{named}; expected an existing bucket: create it, or fix FRESHRANK_STORAGE_URL") from error
        if isinstance(error, PermissionError) or type(error).__name__ in _CREDENTIAL_ERRORS:
            hint = "fix AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role's policy"
            raise StorageError(f"{named}; expected the right to list, read, write and delete there: {hint}") from error
        if not isinstance(error, OSError) and not _is_of_botocore(error):
            raise error
        raise StorageError(
            f"{named}; it failed {ATTEMPTS} times: is the store, AWS_ENDPOINT_URL if set, reachable from here?"
        ) from error


class _Absent(StorageError):
    """What was asked for is not there."""


_CREDENTIAL_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}


def _may_pass(error: BaseException) -> bool:
    final = isinstance(error, _FINAL) or type(error).__name__ in _CREDENTIAL_ERRORS
    return not final and (isinstance(error, OSError) or _is_of_botocore(error))


def _is_of_botocore(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp")


def _file_system(url: str) -> Any:
    import fsspec

    if not url.startswith("s3:"):
        return fsspec.filesystem("file")
    # The attempts are counted here, so the layers below make one each.
    once = {"retries": {"mode": "standard", "total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}
    file_system = fsspec.filesystem("s3", endpoint_url=store_endpoint(), config_kwargs=once, use_listings_cache=False)
    file_system.retries = 1
    return file_system


def _in_parallel(work: Callable[[T], object], items: Iterable[T]) -> None:
    """All of ``items``, some at a time; the first failure is raised."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        for done in [pool.submit(work, item) for item in items]:
            done.result()


def _files(directory: Path) -> list[str]:
    return [
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name != FETCHED
    ]


def _is_there(path: Path, entry: Entry) -> bool:
    """By its size: what was fetched was checked byte by byte, and nobody writes there."""
    return path.is_file() and path.stat().st_size == entry.bytes


def _inside(directory: Path, name: str) -> Path:
    """``name`` under ``directory``; a manifest must not reach beyond it."""
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise Broken(f"{name!r}: names a file outside the directory")
    return path


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def configured() -> ObjectStore | None:
    """The store of the settings; None where there is none."""
    return ObjectStore(settings().storage_url) if settings().storage_url else None


def local_dataset(data: str | Path) -> Path:
    """``data`` itself, or where the workspace has its copy of an ``s3://`` or ``file://`` one, brought up to date.

    Raises:
        MissingArtifact: no dataset is kept at that URL.
        StorageError: the store refuses or is away.
    """
    url = _URL.fullmatch(str(data))
    if url is None:
        return Path(data)
    root, _, name = url[2].rstrip("/").rpartition("/")
    store = ObjectStore(f"{url[1]}://{'/' if url[1] == 'file' else ''}{root}")
    directory = settings().home / "data" / name
    if store.fetch(name, directory) is None:
        raise MissingArtifact(
            f"{store.url}/{name}: no dataset is kept there; run `freshrank backup --data DIR` where "
            "it is, and name the URL that it prints"
        )
    return directory
