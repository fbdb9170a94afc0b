"""Put a version bundle in service, or take the served one out, without a moment in which no version answers.

A candidate is installed beside what is served, loaded next to it, asked the golden requests and then whole requests at
its explicit version, and only then pointed to. Several replicas of one repository all do that before the pointer moves,
and a version is unloaded only once all of them follow it. The pointer moves by one rename after everything that can
fail, so a process killed at any moment leaves the old or the new version in service, and running the same call again
finishes the work.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from freshrank.bundle.format import check_bundle
from freshrank.bundle.golden import Tensors, difference, enlarged, golden_cases
from freshrank.errors import NoAnswerInTime, ServerUnreachable, ServingError
from freshrank.serving.deploy.replicas import Fleet, Replica, Replicas, changing
from freshrank.serving.experiment import CHAMPION, ExperimentFile
from freshrank.serving.probe_requests import requests_from_nobody, warm_up_requests
from freshrank.serving.protocol import MAX_CANDIDATES, RANKING, off_wire, on_wire
from freshrank.serving.repository import RANKER, ModelRepository, Pointer
from freshrank.serving.triton import TritonClient
from freshrank.storage.workspace import Workspace

TOLERANCE = 1e-5
RANKER_SIZES = (1, 50, 100, 500, MAX_CANDIDATES)
WARM_UP_ROUNDS = 2
KEPT_VERSIONS = 7
FOLLOW_SECONDS = 90.0
"""A network volume may show a file as it was for a minute."""
FOLLOW_POLL_SECONDS = 0.2

log = logging.getLogger(__name__)


def publish(
    bundle: Path,
    servers: Replicas | str,
    repository: ModelRepository,
    *,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Pointer:
    """Serve ``bundle`` from ``servers``, the replicas or the address (gRPC) of the one Triton; return the new pointer.

    On ServingError the pointer is as before and the candidate is unloaded and removed; where a server died under it, or
    a replica did not answer (ServerUnreachable), it stays installed, for the same call again. A bundle whose
    fingerprint is already served is verified again and changes nothing. The version the pointer was rolled back from
    stays out unless ``force``: somebody took it out, and running its day again must not undo that.
    """
    with changing(servers, repository) as fleet:
        fleet.require_ready()
        before = repository.served()
        if before and not force and _was_rolled_back(before, bundle, repository):
            log.warning(
                "version %d was rolled back and stays out of service, version %d serves; publish with --force "
                "to serve it again",
                before.rolled_back_from,
                before.version,
            )
            return before
        fleet.each(partial(_connect, repository=repository), "connect")
        requests = warm_up_requests(Workspace.of(repository.project).requests)
        _log_step("install", bundle)
        version = repository.install_version(bundle)
        try:
            pointer = before
            if pointer is None or pointer.version != version:
                pointer = _pointer(repository, version, previous=pointer.version if pointer else None)
            _load_and_verify(fleet, pointer, tolerance, requests)
        except ServerUnreachable:
            raise
        except ServingError as error:
            if version not in repository.live():
                repository.reject(version, str(error))
            raise
        _serve(fleet, pointer)
        return pointer


def _was_rolled_back(before: Pointer, bundle: Path, repository: ModelRepository) -> bool:
    left = before.rolled_back_from
    return left in repository.versions() and repository.info(left).fingerprint == check_bundle(bundle).fingerprint


def _connect(replica: Replica, repository: ModelRepository) -> None:
    client = replica.client
    # A server that refuses control (a wrong token) must be found out before the candidate can be blamed for it.
    client.ready_versions()
    # A server may have been started without it, and it must stand before a pointer sends requests its way.
    if not client.is_model_ready(RANKING):
        repository.write_configs()
        client.load(RANKING)
    client.require_project(repository.project)


def rollback(servers: Replicas | str, repository: ModelRepository, to: int | None = None) -> Pointer:
    """Serve the previous version again, or installed version ``to``, and return the new pointer.

    Rolling back twice goes back once: the second call finds its work done. To go further back, name ``to``.
    """
    with changing(servers, repository) as fleet:
        fleet.require_ready()
        before = repository.served()
        if before is None:
            raise ServingError("nothing is served yet; publish a bundle first")
        target = _target(before, repository, to)
        if target == before.version:
            return before
        # Not the recorded requests: a way back must not depend on what else is in the repository.
        pointer = _pointer(repository, target, rolled_back_from=before.version)
        _load_and_verify(fleet, pointer, TOLERANCE, requests_from_nobody())
        _log_step("switch", target)
        repository.point_to(pointer)
        _followed(fleet, pointer)
        return pointer


def _target(before: Pointer, repository: ModelRepository, to: int | None) -> int:
    target = to or before.previous or (before.version if before.rolled_back_from else None)
    if target is None:
        raise ServingError(
            f"no version before {before.version} has served; publish another, or name an installed one "
            f"of {repository.versions()} with --to"
        )
    if target not in repository.versions():
        raise ServingError(f"version {target} is not installed, only {repository.versions()} are")
    return target


def _log_step(step: str, what: object) -> None:
    log.info("publish step=%s of=%s", step, what)


def _load_and_verify(fleet: Fleet, pointer: Pointer, tolerance: float, requests: Sequence[Tensors]) -> None:
    repository, version = fleet.repository, pointer.version
    before, live = repository.served(), repository.live()
    repository.refresh_code([version])

    def prepare(replica: Replica) -> None:
        replica.enter("load", version)
        replica.client.load(RANKER, repository.ranker_config_json({*live, version}))
        replica.enter("verify", version)
        verify(replica.client, repository, version, tolerance)
        replica.enter("warm-up", version)
        warm_up(replica.client, repository, version, requests)

    def join(replica: Replica) -> None:
        _connect(replica, repository)
        prepare(replica)

    try:
        fleet.each(prepare, "load", gently=True)
        if not fleet.is_one:
            # From here on a server that starts loads the version as well: it may be up after the pointer has moved.
            repository.expect(pointer)
            fleet.complete(lambda client: client.is_model_ready(RANKER, version), join)
    except ServingError as error:
        left = fleet.withdraw(live)
        if not fleet.is_one:
            repository.expect_no_more()
        still = f"version {before.version} is still served" if before else "nothing is served"
        between = "; " if fleet.is_one else "\n"
        raise type(error)(f"version {version} was not put in service: {error}{between}{still}{left}") from error


def verify(client: TritonClient, repository: ModelRepository, version: int, tolerance: float = TOLERANCE) -> None:
    """Ask loaded ``version`` all its golden requests, more than once: the first answers warm it up. Then the same
    candidates again and again, in requests of every size; among the golden ones are those of an empty online store."""
    outputs = [spec.name for spec in repository.signature(version).outputs]
    cases = golden_cases(repository.version_directory(version))
    asked = [(f"golden case {number}", case) for number, case in enumerate(cases)] * WARM_UP_ROUNDS
    asked += [
        (f"golden case {number} enlarged to {size} candidates", larger)
        for size in RANKER_SIZES
        for number, case in enumerate(cases)
        if (larger := enlarged(case, size))
    ]
    for name, case in asked:
        with _leaving_room():
            answer = client.infer(RANKER, case.inputs, outputs, version)
        problem = difference(case.outputs, answer, tolerance)
        if problem:
            raise ServingError(f"{name}: {problem}")


def warm_up(client: TritonClient, repository: ModelRepository, version: int, requests: Sequence[Tensors]) -> None:
    """Ask `ranking` for loaded ``version``, so that what it keeps of a version is there before anybody waits for it.

    A version without an encoder has nothing there. ServingError where an answer is not its own, whole and finite.
    """
    if repository.info(version).dataset is None:
        return
    for request in requests:
        named = on_wire(request | {"version": np.array([version])})
        with _leaving_room():
            answer = off_wire(client.infer(RANKING, named, ["probabilities", "score", "model_version"]))
        problem = _defect(answer, version, len(request["item_ids"]))
        if problem:
            raise ServingError(f"{RANKING}, asked for {len(request['item_ids'])} candidates at this version, {problem}")


@contextmanager
def _leaving_room() -> Iterator[None]:
    """Then wait for as long as it took: requests of clients, who may wait for this one, go before the next."""
    began = time.perf_counter()
    yield
    time.sleep(time.perf_counter() - began)


def _defect(answer: Tensors, version: int, candidates: int) -> str | None:
    by = int(answer["model_version"][0])
    if by != version:
        return f"answered with version {by}"
    if len(answer["score"]) != candidates:
        return f"answered with {len(answer['score'])} scores"
    finite = all(np.isfinite(answer[name]).all() for name in ("probabilities", "score"))
    return None if finite else "answered with values that are not finite"


def _pointer(repository: ModelRepository, version: int, **others: int | None) -> Pointer:
    info = repository.info(version)
    return Pointer(version=version, run_date=info.run_date, fingerprint=info.fingerprint, **others)


def _serve(fleet: Fleet, pointer: Pointer) -> None:
    repository = fleet.repository
    _log_step("switch", pointer.version)
    models = repository.point_to(pointer)
    if not _followed(fleet, pointer):
        return
    _log_step("tidy", pointer.version)

    def tidy(replica: Replica) -> None:
        for model in models:
            # Triton skips a load whose config.pbtxt is older than the last override, so ranker is told outright.
            config = repository.ranker_config_json(repository.live()) if model == RANKER else None
            replica.client.load(model, config)

    # The pointer has moved: what follows only tidies, and the next publication or start would do it as well.
    try:
        fleet.each(tidy, "tidy")
        repository.prune(KEPT_VERSIONS)
    except ServingError as error:
        log.warning("version %d is served; tidying up after it failed: %s", pointer.version, error)


def _followed(fleet: Fleet, pointer: Pointer) -> bool:
    """Wait until all of several replicas follow the pointer: what they mount may show them the old one for a while.

    Those that lag are named, and False says that they may still need what the others do not.
    """
    if fleet.is_one:
        return True
    repository = fleet.repository

    def follow(replica: Replica) -> None:
        replica.enter("follow", pointer.version)
        client = replica.client
        if not client.is_model_ready(RANKER, pointer.version):
            client.load(RANKER, repository.ranker_config_json(repository.live()))
        deadline = time.monotonic() + FOLLOW_SECONDS
        while (answered := _answering(client, repository, pointer)) != pointer.version:
            if time.monotonic() > deadline:
                raise NoAnswerInTime(f"still answers with version {answered}")
            time.sleep(FOLLOW_POLL_SECONDS)

    try:
        fleet.each(follow, "follow")
    except ServingError as error:
        log.warning("version %d is served, not everywhere yet; so no other is unloaded: %s", pointer.version, error)
        return False
    return True


def _answering(client: TritonClient, repository: ModelRepository, pointer: Pointer) -> int:
    """The version that `ranking` answers with where no arm of an experiment is asked."""
    experiment = ExperimentFile(repository.root).read()
    champions = (user for user in range(-2, -66, -1) if experiment is None or experiment.assign(user).arm == CHAMPION)
    user = next(champions, None)
    if user is None or repository.info(pointer.version).dataset is None:
        return pointer.version
    # Naming version 0 names none; but what names a version is not taken for traffic.
    asked = {"user_id": np.array([user]), "item_ids": np.array([-2]), "version": np.array([0])}
    return int(off_wire(client.infer(RANKING, on_wire(asked), ["model_version"]))["model_version"][0])
