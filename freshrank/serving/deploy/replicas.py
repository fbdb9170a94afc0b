"""Every Triton that serves one model repository: where they are, and what is asked of all of them.

On one machine that is one server, asked as it always was. On a cluster every replica follows the same pointer, so what
the pointer is to name must be loaded and right on each of them first, and nobody knows for long how many there are.
"""

import logging
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from freshrank.errors import ConfigError, NoAnswerInTime, ServerUnreachable, ServingError
from freshrank.serving.repository import RANKER, ModelRepository
from freshrank.serving.triton import TritonClient
from freshrank.settings import settings

PATIENCE_SECONDS = 300.0
AT_ONCE = 0.2
"""Share of the replicas that load at a time: the rest answer as fast as ever."""
ROUNDS = 5
GONE_SECONDS = 30.0
"""A name server may go on naming a pod for some seconds after it is gone."""
WITHDRAW_SECONDS = 30.0
LATE_SECONDS = 60.0
STRAGGLER_SECONDS = 10.0
_KNOCK_SECONDS = 5.0
_POLL_SECONDS = 0.2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replicas:
    """Addresses (``host:port``, gRPC) of the Tritons of one model repository."""

    resolve: Callable[[], list[str]]
    """Who they are now."""
    may_change: bool = False
    """Whether one that ``resolve`` no longer names, or on whose port nothing listens, is simply not there."""
    patience: float = PATIENCE_SECONDS
    """Seconds that one replica may take to load, verify and warm up."""

    @classmethod
    def of(cls, servers: "Replicas | str") -> "Replicas":
        """``servers``; an address is that one server."""
        return cls.fixed([servers]) if isinstance(servers, str) else servers

    @classmethod
    def fixed(cls, addresses: Sequence[str], patience: float = PATIENCE_SECONDS) -> Self:
        """These, whatever happens to them."""
        return cls(lambda: list(addresses), patience=patience)

    @classmethod
    def configured(cls) -> Self:
        """Those the settings name: a list, a host name that resolves to all, or else the one server.

        Raises:
            ConfigError: both are set, or an entry of the list is not ``host:port`` or is there twice.
        """
        chosen = settings()
        listed, host = chosen.triton_replicas, chosen.triton_replicas_host
        if listed and host:
            raise ConfigError(
                f"FRESHRANK_TRITON_REPLICAS: received {listed!r}, and FRESHRANK_TRITON_REPLICAS_HOST "
                f"{host!r}; expected one of the two"
            )
        if host:
            return cls(lambda: resolved(host, chosen.triton_grpc_port), True, chosen.triton_replica_seconds)
        if listed:
            return cls.fixed(_addresses(listed), chosen.triton_replica_seconds)
        return cls.fixed([chosen.triton_grpc_url])

    @property
    def is_one(self) -> bool:
        """Whether there is one server and never another."""
        return not self.may_change and len(self.resolve()) == 1

    def listening(self) -> list[str]:
        """Those that must answer: all of a fixed list; of others, those that are up."""
        named = self.resolve()
        return [address for address in named if _listens(address)] if self.may_change else named


def _addresses(listed: str) -> list[str]:
    addresses = [entry.strip() for entry in listed.split(",")]
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"FRESHRANK_TRITON_REPLICAS: received {address!r}, expected host:port,host:port,...")
    if repeated := sorted({address for address in addresses if addresses.count(address) > 1}):
        raise ConfigError(
            f"FRESHRANK_TRITON_REPLICAS: received {', '.join(repeated)} more than once, expected each replica once"
        )
    return addresses


def resolved(host: str, port: int) -> list[str]:
    """Every address that ``host`` stands for now, with ``port``; ServerUnreachable where it stands for none.

    A pod with addresses of both kinds is one replica: where there are IPv4 addresses, IPv6 ones are left out.
    """
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServerUnreachable(
            f"FRESHRANK_TRITON_REPLICAS_HOST: {host!r} does not resolve to a replica: {error}; "
            "expected a headless service with at least one pod"
        ) from error
    older = {f"{where[0]}:{port}" for family, *_, where in answers if family == socket.AF_INET}
    newer = {f"[{where[0]}]:{port}" for family, *_, where in answers if family == socket.AF_INET6}
    return sorted(older or newer)


@dataclass
class Replica:
    """One of them, and how far it has come."""

    client: TritonClient
    tag: str = ""
    step: str = "not asked"
    began: float = 0.0
    seconds: float = 0.0
    error: ServingError | None = None
    is_absent: bool = False

    def enter(self, step: str, what: object) -> None:
        """Say that ``step`` begins."""
        self.step = step
        log.info("publish step=%s of=%s%s", step, what, self.tag)

    def line(self) -> str:
        """For the report: address, step, seconds, and what was wrong."""
        problem = f": {self.error}" if self.error else ""
        return f"  {self.client.url}  {self.step}  {self.seconds:.1f} s{problem}"


Action = Callable[[Replica], None]
Question = Callable[[TritonClient], bool]


@dataclass
class Fleet:
    """Connections to the replicas of ``repository``; use it in a ``with``.

    Where there is one server, every call here is that call to it, and its errors are that server's.
    """

    replicas: Replicas
    repository: ModelRepository
    _known: dict[str, Replica] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for replica in self._known.values():
            replica.client.close()

    @property
    def is_one(self) -> bool:
        return self.replicas.is_one

    def require_ready(self) -> None:
        """ServerUnreachable unless all that listen are ready, and one does."""
        self.each(lambda replica: replica.client.require_ready(), "connect")

    def is_ready(self) -> bool:
        """Whether :meth:`require_ready` has nothing to say."""
        try:
            self.require_ready()
        except ServerUnreachable:
            return False
        return True

    def each(self, action: Action, step: str, *, gently: bool = False) -> None:
        """``action`` on every replica, beginning at ``step``.

        ``gently``: on the first alone, then on few at a time, and on no other once one has failed.

        Raises:
            ServerUnreachable: no replica listens, or those that failed did not answer.
            ServingError: a replica refused. The text has a line for each replica.
        """
        if self.is_one:
            action(self._replica(self.replicas.resolve()[0]))
            return
        present = self._present()
        if not present:
            raise ServerUnreachable(f"none of the replicas {self.replicas.resolve()} listens")
        self._run(present, action, step, gently=gently)

    def complete(self, has: Question, action: Action) -> None:
        """``action`` on those that came up or started anew meanwhile, until every replica that listens ``has`` it."""
        for _ in range(ROUNDS):
            lacking = self._lacking(has)
            if not lacking:
                return
            log.warning("came up meanwhile: %s", ", ".join(replica.client.url for replica in lacking))
            self._run(lacking, action, "connect", gently=True)
        raise ServerUnreachable(f"replicas started anew {ROUNDS} times, at last {[r.client.url for r in lacking]}")

    def _lacking(self, has: Question) -> list[Replica]:
        lacking: list[Replica] = []

        def check(replica: Replica) -> None:
            if not has(replica.client):
                lacking.append(replica)

        self.each(check, "check")
        return lacking

    def withdraw(self, live: Collection[int]) -> str:
        """Only ``live`` stay loaded wherever that can be reached; names the replicas where it cannot.

        One that has just not answered is not waited for once more.
        """
        config = self.repository.ranker_config_json(live) if live else None

        def unload(replica: Replica) -> None:
            replica.client.load(RANKER, config) if config else replica.client.unload(RANKER)

        if self.is_one:
            # The caller must hear why the candidate failed, not that a broken server cannot be tidied either.
            with suppress(ServingError):
                self.each(unload, "withdraw")
            return ""
        there = [replica for replica in self._known.values() if not replica.is_absent]
        silent = [replica for replica in there if _is_silent(replica)]
        asked = [Replica(replica.client, replica.tag) for replica in there if not _is_silent(replica)]
        failed = self._attempt_all(asked, unload, "withdraw", min(WITHDRAW_SECONDS, self.replicas.patience))
        left = ", ".join(replica.client.url for replica in [*silent, *failed])
        return f"; may have it loaded until the next publication: {left}" if left else ""

    def bring_in_latecomers(self) -> None:
        """Wait for replicas that are named and do not listen yet, and load what the pointer names where it lacks.

        One that had read its configuration before the pointer moved would be without it. Not under the repository's
        lock: a server that starts waits for that.
        """
        if self.repository.served() is None:
            return
        deadline = time.monotonic() + min(LATE_SECONDS, self.replicas.patience)
        if late := self._absent():
            log.warning("waiting for %s to come up", ", ".join(late))
        while (late := self._absent()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if came := [address for address in late if _listens(address)]:
                with self.repository.lock():
                    self._bring_in([self._replica(address) for address in came])
        if late:
            log.warning("nothing listens at %s; what starts there loads what the pointer names", ", ".join(late))

    def _bring_in(self, replicas: Sequence[Replica]) -> None:
        live = self.repository.live()

        def load(replica: Replica) -> None:
            if live and not set(live) <= set(replica.client.ready_versions().get(RANKER, [])):
                replica.client.load(RANKER, self.repository.ranker_config_json(live))

        for replica in replicas:
            replica.is_absent = False
        if failed := self._attempt_all(replicas, load, "load", self.replicas.patience):
            log.warning("started late and could not be brought in:\n%s", _lines(failed))

    def _replica(self, address: str) -> Replica:
        if address not in self._known:
            tag = "" if self.is_one else f" replica={address}"
            self._known[address] = Replica(TritonClient.controlling(self.repository, address), tag)
        return self._known[address]

    def _present(self) -> list[Replica]:
        present = self.replicas.listening()
        for address, replica in self._known.items():
            replica.is_absent = address not in present
        return [self._replica(address) for address in present]

    def _absent(self) -> list[str]:
        """Named, and not listening when last asked."""
        if not self.replicas.may_change:
            return []
        return [a for a in self.replicas.resolve() if a not in self._known or self._known[a].is_absent]

    def _run(self, replicas: Sequence[Replica], action: Action, step: str, *, gently: bool) -> None:
        failed = self._attempt_all(replicas, action, step, self.replicas.patience, gently=gently)
        if failed:
            raise (ServerUnreachable if all(map(_is_silent, failed)) else ServingError)(
                f"{len(failed)} of {len(replicas)} replicas failed:\n{_lines(replicas)}"
            )

    def _attempt_all(
        self, replicas: Sequence[Replica], action: Action, step: str, patience: float, *, gently: bool = False
    ) -> list[Replica]:
        """Who failed."""
        for replica in replicas:
            replica.step, replica.seconds, replica.error = "not asked", 0.0, None

        def attempt(replica: Replica) -> None:
            if not (gently and any(each.error for each in replicas)):
                self._attempt(replica, action, step, patience)

        lead = 1 if gently else 0
        for few in (replicas[:lead], replicas[lead:]):
            width = max(1, round(len(replicas) * AT_ONCE)) if gently else len(few)
            with ThreadPoolExecutor(max(1, width)) as pool:
                _wait_aloud([pool.submit(attempt, replica) for replica in few], replicas)
        return [replica for replica in replicas if replica.error]

    def _attempt(self, replica: Replica, action: Action, step: str, patience: float) -> None:
        replica.step, replica.began = step, time.monotonic()
        try:
            with replica.client.within(patience):
                action(replica)
            replica.step = "done"
        except (ServerUnreachable, NoAnswerInTime) as error:
            if self._is_gone(replica.client.url):
                log.warning("replica %s went away during %s", replica.client.url, replica.step)
                replica.step, replica.is_absent = f"gone during {replica.step}", True
            else:
                replica.error = error
        except ServingError as error:
            replica.error = error
        replica.seconds = time.monotonic() - replica.began
        replica.began = 0.0
        log.info("replica %s: %s after %.1f s", replica.client.url, replica.step, replica.seconds)

    def _is_gone(self, address: str) -> bool:
        """Whether nobody names it any more. One that died and is still named may have died of what it was asked."""
        deadline = time.monotonic() + min(GONE_SECONDS, self.replicas.patience)
        while self.replicas.may_change and time.monotonic() < deadline:
            # A name server that says nothing has not said that the replica is gone.
            with suppress(ServerUnreachable):
                if address not in self.replicas.resolve():
                    return True
            time.sleep(_POLL_SECONDS)
        return False


@contextmanager
def changing(servers: Replicas | str, repository: ModelRepository) -> Iterator[Fleet]:
    """The replicas of ``repository``, under its lock; afterwards those that start late are brought in."""
    with Fleet(Replicas.of(servers), repository) as fleet:
        with repository.lock():
            yield fleet
        try:
            fleet.bring_in_latecomers()
        except ServingError as error:
            log.warning("who starts late could not be found out: %s", error)


def _wait_aloud(futures: Sequence[Future[None]], replicas: Sequence[Replica]) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, STRAGGLER_SECONDS)
        for future in done:
            future.result()
        for replica in replicas if pending else ():
            since = time.monotonic() - replica.began
            if replica.began and since >= STRAGGLER_SECONDS:
                log.warning("waiting for replica %s: %s, %.0f s", replica.client.url, replica.step, since)


def _listens(address: str) -> bool:
    """False where a machine says that nothing does; whoever says nothing is asked again, and then fails."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True


def _is_silent(replica: Replica) -> bool:
    return isinstance(replica.error, ServerUnreachable | NoAnswerInTime)


def _lines(replicas: Sequence[Replica]) -> str:
    return "\n".join(replica.line() for replica in replicas)


@dataclass(frozen=True)
class ReplicaStatus:
    """What one replica says of itself: the versions of ranker it has loaded, or why it says nothing."""

    address: str
    versions: list[int]
    problem: str = ""

    def sentence(self) -> str:
        loaded = f"ranker versions {self.versions}" if self.versions else "no ranker is loaded"
        return f"{self.address}  {self.problem or loaded}"


def statuses(replicas: Replicas, repository: ModelRepository) -> list[ReplicaStatus]:
    """Of every replica that is named now, in that order."""
    addresses = replicas.resolve()
    with ThreadPoolExecutor(max(1, len(addresses))) as pool:
        return list(pool.map(lambda address: _status(address, repository), addresses))


def _status(address: str, repository: ModelRepository) -> ReplicaStatus:
    try:
        with TritonClient.controlling(repository, address, timeout=5.0) as client:
            return ReplicaStatus(address, sorted(client.ready_versions().get(RANKER, [])))
    except ServingError as error:
        return ReplicaStatus(address, [], str(error))
