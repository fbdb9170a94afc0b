"""Put a version bundle in service, or take the served one out, without a moment in which no version answers.

A candidate is installed beside what is served, loaded next to it, asked the golden requests and then whole requests at
its explicit version, and only then pointed to. The pointer moves by one rename after everything that can fail, so a
process killed at any moment leaves the old or the new version in service, and running the same call again finishes the
work.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from freshrank.errors import ServerUnreachable, ServingError
from freshrank.serving.bundle import check_bundle
from freshrank.serving.client import TritonClient, off_wire, on_wire
from freshrank.serving.golden import Tensors, difference, enlarged, golden_cases
from freshrank.serving.protocol import MAX_CANDIDATES
from freshrank.serving.repository import RANKER, RANKING, ModelRepository, Pointer
from freshrank.serving.warm_up_requests import requests_from_nobody, warm_up_requests

TOLERANCE = 1e-5
RANKER_SIZES = (1, 50, 100, 500, MAX_CANDIDATES)
WARM_UP_ROUNDS = 2
KEPT_VERSIONS = 7

log = logging.getLogger(__name__)


def publish(
    bundle: Path, server_url: str, repository: ModelRepository, *, tolerance: float = TOLERANCE, force: bool = False
) -> Pointer:
    """Serve ``bundle`` from the Triton at ``server_url`` (gRPC) and return the new pointer.

    On ServingError the pointer is as before and the candidate is unloaded and removed; where the server died under it
    (ServerUnreachable) it stays installed, for the same call again. A bundle whose fingerprint is
    already served is verified again and changes nothing. The version the pointer was rolled back from stays out
    unless ``force``: somebody took it out, and running its day again must not undo that.
    """
    with repository.lock(), TritonClient.controlling(repository, server_url) as client:
        client.require_ready()
        before = repository.served()
        if before and not force and _was_rolled_back(before, bundle, repository):
            log.warning("version %d was rolled back and stays out of service, version %d serves; publish with --force "
                        "to serve it again", before.rolled_back_from, before.version)  # fmt: skip
            return before
        # A server that refuses control (a wrong token) must be found out before the candidate can be blamed for it.
        client.ready_versions()
        _ensure_ranking(client, repository)
        client.require_project(repository.project)
        requests = warm_up_requests(repository.root)
        _log_step("install", bundle)
        version = repository.install_version(bundle)
        try:
            _load_and_verify(client, repository, version, tolerance, requests)
        except ServerUnreachable:
            raise
        except ServingError as error:
            if version not in repository.live():
                repository.reject(version, str(error))
            raise
        pointer = _advanced(before, repository, version)
        _serve(client, repository, pointer)
        return pointer


def _was_rolled_back(before: Pointer, bundle: Path, repository: ModelRepository) -> bool:
    left = before.rolled_back_from
    return left in repository.versions() and repository.info(left).fingerprint == check_bundle(bundle).fingerprint


def _ensure_ranking(client: TritonClient, repository: ModelRepository) -> None:
    """Load ``ranking`` where a server was started without it; it must stand before a pointer sends requests its way."""
    if not client.is_model_ready(RANKING):
        repository.write_configs()
        client.load(RANKING)


def rollback(server_url: str, repository: ModelRepository, to: int | None = None) -> Pointer:
    """Serve the previous version again, or installed version ``to``, and return the new pointer.

    Rolling back twice goes back once: the second call finds its work done. To go further back, name ``to``.
    """
    with repository.lock(), TritonClient.controlling(repository, server_url) as client:
        client.require_ready()
        before = repository.served()
        if before is None:
            raise ServingError("nothing is served yet; publish a bundle first")
        target = _target(before, repository, to)
        if target == before.version:
            return before
        # Not the recorded requests: a way back must not depend on what else is in the repository.
        _load_and_verify(client, repository, target, TOLERANCE, requests_from_nobody())
        _log_step("switch", target)
        pointer = _pointer(repository, target, rolled_back_from=before.version)
        repository.point_to(pointer)
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


def _load_and_verify(
    client: TritonClient, repository: ModelRepository, version: int, tolerance: float, requests: Sequence[Tensors]
) -> None:
    before = repository.served()
    live = repository.live()
    try:
        _log_step("load", version)
        client.load(RANKER, repository.ranker_config_json({*live, version}))
        _log_step("verify", version)
        verify(client, repository, version, tolerance)
        _log_step("warm-up", version)
        warm_up(client, repository, version, requests)
    except ServingError as error:
        _withdraw(client, repository, live)
        still = f"version {before.version} is still served" if before else "nothing is served"
        raise type(error)(f"version {version} was not put in service: {error}; {still}") from error


def verify(client: TritonClient, repository: ModelRepository, version: int, tolerance: float = TOLERANCE) -> None:
    """Ask loaded ``version`` all its golden requests, more than once: the first answers warm it up. Then the same
    candidates again and again, in requests of every size; among the golden ones are those of an empty online store."""
    outputs = [spec.name for spec in repository.signature(version).outputs]
    cases = golden_cases(repository.version_directory(version))
    asked = [(f"golden case {number}", case) for number, case in enumerate(cases)] * WARM_UP_ROUNDS
    asked += [(f"golden case {number} enlarged to {size} candidates", larger) for size in RANKER_SIZES
              for number, case in enumerate(cases) if (larger := enlarged(case, size))]  # fmt: skip
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


def _withdraw(client: TritonClient, repository: ModelRepository, live: list[int]) -> None:
    # The caller must hear why the candidate failed, not that a broken server cannot be tidied either.
    with suppress(ServingError):
        if live:
            client.load(RANKER, repository.ranker_config_json(live))
        else:
            client.unload(RANKER)


def _advanced(before: Pointer | None, repository: ModelRepository, version: int) -> Pointer:
    if before and before.version == version:
        return before
    return _pointer(repository, version, previous=before.version if before else None)


def _pointer(repository: ModelRepository, version: int, **others: int | None) -> Pointer:
    info = repository.info(version)
    return Pointer(version=version, run_date=info.run_date, fingerprint=info.fingerprint, **others)


def _serve(client: TritonClient, repository: ModelRepository, pointer: Pointer) -> None:
    _log_step("switch", pointer.version)
    models = repository.point_to(pointer)
    _log_step("tidy", pointer.version)
    # The pointer has moved: what follows only tidies, and the next publication or start would do it as well.
    try:
        for model in models:
            # Triton skips a load whose config.pbtxt is older than the last override, so ranker is told outright.
            client.load(model, repository.ranker_config_json(repository.live()) if model == RANKER else None)
        repository.prune(KEPT_VERSIONS)
    except ServingError as error:
        log.warning("version %d is served; tidying up after it failed: %s", pointer.version, error)
