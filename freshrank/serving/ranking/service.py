"""Ids in, calibrated scores out: what the Triton model ``ranking`` does, without Triton.

A request is answered by the version the pointer names when it arrives; where the pointer cannot be read, by the one it
named last. Whatever the online store does not know, or
cannot say in time, is a missing feature: the answer is finite and says that it is cold or degraded.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

from freshrank.bundle.golden import Tensors
from freshrank.datasets.dataset import Dataset
from freshrank.errors import ServingError
from freshrank.features.columns import Columns, Int
from freshrank.features.encoder import Blocks, CandidatePairs, Catalog, Encoder
from freshrank.features.hourly import only_standing
from freshrank.features.store import FeatureStore
from freshrank.schema import ITEM_AGE, QUERY_ITEM_ID, Entity, Schema
from freshrank.serving.experiment import CHAMPION, Assignment
from freshrank.serving.ranking.feast_import import import_feast
from freshrank.serving.ranking.features import Known, OnlineFeatures
from freshrank.serving.ranking.latest import Latest
from freshrank.serving.ranking.online_store import Online, online_rows
from freshrank.serving.ranking.query import BadRequest, Query, check_tensors, without_batch_axis
from freshrank.serving.ranking.ranked import Ranked
from freshrank.serving.ranking.served import NothingPublished, PointerWatch, ServedModels
from freshrank.serving.repository import ModelRepository
from freshrank.settings import settings
from freshrank.storage.workspace import Workspace

CallRanker = Callable[[int, Blocks], Blocks]
MAX_TOGETHER = 4000
"""Candidates of one call of the ranker, as far as whole requests allow: more would take memory and save nothing."""
KEPT_ENCODERS = 8
"""Versions that were named by requests and are ready to answer, beyond those the pointer holds."""
_USER_BLOCKS = ("user_categorical", "user_multi", "user_numeric", "user_embedding", "sequence_")
_MICROSECONDS = 1_000_000
_DAY_SECONDS = timedelta(days=1).total_seconds()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestBatch:
    """Requests that one version answers together."""

    queries: Sequence[Query]

    @property
    def user_ids(self) -> Int:
        return np.array([query.user_id for query in self.queries], np.int64)

    @property
    def item_ids(self) -> Int:
        return np.concatenate([query.item_ids for query in self.queries])

    @property
    def lookups(self) -> Int:
        return np.array([number for query in self.queries for number in query.lookups], np.int64)

    @property
    def slices(self) -> list[slice]:
        """Where the candidates of each request lie."""
        ends = np.cumsum([len(query.item_ids) for query in self.queries]).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def blocks(self, known: Known, encoder: Encoder) -> tuple[Blocks, npt.NDArray[np.bool_]]:
        """The ranker's inputs, and which candidates are cold."""
        counts = [len(query.item_ids) for query in self.queries]
        item_ids = self.item_ids
        at_us = np.repeat(np.array([query.at_us for query in self.queries], np.int64), counts)
        # To the platform an item that is not known is brand new.
        days = (at_us - known.items.created_us) / _DAY_SECONDS / _MICROSECONDS
        ages = np.where(known.items.known, days.clip(min=0), 0).astype(np.float32)
        rows = CandidatePairs(
            users=known.users,
            items=only_standing(known.items.columns, known.items.counted_us, at_us, encoder.schema),
            rows=self._rows(encoder, ages),
            user_row=np.repeat(np.arange(len(counts)), counts),
            item_row=np.arange(len(item_ids)),
            query=self._query(encoder.schema, len(item_ids)),
        )
        # As in training, an item of a sequence that the items table does not hold is new, not empty.
        catalog = Catalog.of(known.looked_up_ids, known.looked_up.columns, encoder)
        return encoder.encode(rows, item_ids, catalog), ages < encoder.schema.fresh_days

    def _rows(self, encoder: Encoder, ages: npt.NDArray[np.float32]) -> Columns:
        rows = Columns.missing(encoder.layouts[Entity.ROW], len(ages))
        rows.put(ITEM_AGE, slice(None), ages)
        for query, place in zip(self.queries, self.slices, strict=True):
            for name, value in query.context.items():
                if name != QUERY_ITEM_ID:
                    rows.put(name, place, value)
        return rows

    def _query(self, schema: Schema, count: int) -> tuple[Int, npt.NDArray[np.bool_]] | None:
        if not schema.has_query:
            return None
        values, present = np.zeros(count, np.int64), np.zeros(count, np.bool_)
        for query, place in zip(self.queries, self.slices, strict=True):
            for number in query.lookups:
                values[place], present[place] = number, True
        return values, present


class ServiceObserver:
    """Observer of what happens to requests beside their answers; this base class only logs failures."""

    def stages(self, version: int, seconds: dict[str, float]) -> None:
        """How long the stages of a batch took."""

    def shadowed(self, version: int, outcome: str, error: Exception | None = None) -> None:
        """A shadow scored a batch, or failed to."""
        if error:
            log.warning("shadow version %d failed: %s", version, str(error).partition("\n")[0])

    def fell_back(self, version: int, error: Exception) -> None:
        """A challenger could not answer, and the champion answers for it."""
        log.warning("version %d cannot answer, the champion does: %s", version, str(error).partition("\n")[0])

    def pointer_lost(self, error: Exception) -> None:
        """Requests are answered by what the pointer said last, as it cannot be read; whoever reads it logs that."""


@dataclass(frozen=True)
class _Version:
    number: int
    encoder: Encoder
    features: OnlineFeatures


@dataclass(frozen=True)
class _Assigned:
    """Who answers a request."""

    version: _Version
    query: Query
    assignment: Assignment


class RankingService:
    """Answers requests with the served version of ``repository``; features come from the online store of ``home``.

    ``call_ranker(version, blocks)`` gives that version's outputs by name; ``watch`` hears of what happened on the way.
    Not for use by several threads.
    """

    def __init__(
        self,
        repository: ModelRepository,
        home: Path,
        call_ranker: CallRanker,
        watch: ServiceObserver | None = None,
    ) -> None:
        self._repository = repository
        self._home = home
        self._call_ranker = call_ranker
        self._watch = watch or ServiceObserver()
        self._look = PointerWatch(repository, self._known)
        self._latest = Latest(self._look, f"the pointer in {repository.root}")
        self._served_now: ServedModels | Exception = NothingPublished()
        self._versions: dict[int, _Version] = {}
        self._readable = True

    def warm_up(self) -> None:
        """Import Feast, and where a version is served load it and open its store, so that no request waits for it."""
        import_feast()
        try:
            self._look_again()
            nobody = np.zeros(1, np.int64)
            self._note(self._version(self._served().pointer.version).features.read(nobody, nobody, nobody).problem)
        except NothingPublished as error:
            log.info("%s", error)
        except Exception as error:
            self._note(error)

    def rank(self, requests: Sequence[Tensors], request_ids: Sequence[str] = ()) -> list[Ranked | Exception]:
        """Answer tensors of ``protocol.INPUTS`` as they are on the wire: what was ranked or why it was not, in order.

        A request that is not what the protocol says gets BadRequest, one that no version can answer
        NothingPublished, one whose version fails whatever it raised; the others are answered all the same.
        """
        self._look_again()
        names = request_ids or [""] * len(requests)
        assignments = [self._assigned(*request) for request in zip(requests, names, strict=True)]
        answers: dict[int, Ranked | Exception] = {i: a for i, a in enumerate(assignments) if isinstance(a, Exception)}
        for group in _groups([(i, a) for i, a in enumerate(assignments) if isinstance(a, _Assigned)]):
            places, assigned = zip(*group, strict=True)
            answers |= zip(places, self._together(assigned), strict=True)
        return [answers[place] for place in range(len(assignments))]

    def _assigned(self, tensors: Tensors, request_id: str) -> _Assigned | Exception:
        try:
            request = {name: without_batch_axis(name, value) for name, value in tensors.items()}
            check_tensors(request)
            version, assignment = self._chosen(request)
            return _Assigned(version, Query.of(request, version.encoder.schema, request_id), assignment)
        except Exception as error:
            return error

    def _chosen(self, request: Tensors) -> tuple[_Version, Assignment]:
        """The version the request names, else the one of the user's arm, else the served one."""
        if "version" in request and (named := int(request["version"][0])):
            return self._named(named), Assignment()
        state = self._served()
        served = state.pointer.version
        if state.experiment is None:
            return self._version(served), Assignment()
        assignment = state.experiment.assign(int(request["user_id"][0]))
        try:
            return self._version(assignment.version or served), assignment
        except Exception as error:
            if assignment.arm == CHAMPION:
                raise
            self._watch.fell_back(assignment.version or served, error)
            return self._version(served), replace(assignment, arm=CHAMPION)

    def _named(self, number: int) -> _Version:
        if number not in self._versions and number not in (installed := self._repository.versions()):
            raise BadRequest(f"version: received {number}, expected one of the installed versions {installed}, or 0")
        return self._version(number)

    def _together(self, assigned: Sequence[_Assigned]) -> Sequence[Ranked | Exception]:
        try:
            return self._answered(assigned[0].version, assigned)
        except Exception as error:
            if all(each.assignment.arm == CHAMPION for each in assigned):
                return [error] * len(assigned)
            # A challenger that cannot answer must not cost its users an answer.
            self._watch.fell_back(assigned[0].version.number, error)
            champion = self._version(self._served().pointer.version)
            return self._together(
                [
                    replace(each, version=champion, assignment=replace(each.assignment, arm=CHAMPION))
                    for each in assigned
                ]
            )

    def _answered(self, version: _Version, assigned: Sequence[_Assigned]) -> list[Ranked]:
        batch = RequestBatch([each.query for each in assigned])
        clock = [time.perf_counter()]
        known = version.features.read(batch.user_ids, batch.item_ids, batch.lookups)
        self._note(known.problem)
        clock.append(time.perf_counter())
        blocks, cold = batch.blocks(known, version.encoder)
        clock.append(time.perf_counter())
        answer = self._call_ranker(version.number, blocks)
        clock.append(time.perf_counter())
        self._watch.stages(version.number, dict(zip(("features", "encode", "ranker"), np.diff(clock), strict=True)))
        flags = {"cold": cold, "known": known.items.known}
        alike = {"model_version": np.array([version.number]), "degraded": np.array([known.problem is not None])}
        shadows = self._shadowed(assigned, batch, known)
        per_candidate = {name: answer[name] for name in ("probabilities", "score")} | flags
        return [
            Ranked(
                request_id=query.request_id,
                user_id=query.user_id,
                item_ids=query.item_ids,
                at=query.at,
                context=query.context,
                answer=_part(per_candidate, place) | alike | {"arm": np.array([assigned[number].assignment.arm])},
                inputs=_own(blocks, number, place, len(batch.queries)),
                experiment=assigned[number].assignment.experiment,
                shadows={
                    version: _part(said, place)
                    for version, said in shadows.items()
                    if version in assigned[number].assignment.shadows
                },
            )
            for number, (query, place) in enumerate(zip(batch.queries, batch.slices, strict=True))
        ]

    def _shadowed(self, assigned: Sequence[_Assigned], batch: RequestBatch, known: Known) -> dict[int, Tensors]:
        """What the shadows of these users say; one that fails is counted and harms nobody."""
        answers = {}
        for number in sorted({version for each in assigned for version in each.assignment.shadows}):
            started = time.perf_counter()
            try:
                shadow = self._version(number)
                if shadow.encoder.schema != assigned[0].version.encoder.schema:
                    raise ServingError("it reads other features than the version it shadows")
                answer = self._call_ranker(number, batch.blocks(known, shadow.encoder)[0])
                answers[number] = {name: answer[name] for name in ("probabilities", "score")}
                self._watch.shadowed(number, "ok")
            except Exception as error:
                self._watch.shadowed(number, "failed", error)
            self._watch.stages(number, {"shadow": time.perf_counter() - started})
        return answers

    def _note(self, error: Exception | None) -> None:
        """Log when the store breaks and when it is back, not at every request between."""
        if self._readable and error:
            problem = str(error).partition("\n")[0]
            log.warning(
                "the online store cannot be read, requests are answered without features: %s: %s",
                type(error).__name__,
                problem,
            )
        elif error is None and not self._readable:
            log.warning("the online store can be read again")
        self._readable = error is None

    def _look_again(self) -> None:
        """Once for all requests that are answered together."""
        try:
            self._served_now, problem = self._latest.value()
        except Exception as error:
            self._served_now = error
        else:
            if problem:
                self._watch.pointer_lost(problem)

    def _served(self) -> ServedModels:
        if isinstance(self._served_now, Exception):
            raise self._served_now
        return self._served_now

    def _version(self, number: int) -> _Version:
        if number not in self._versions:
            encoder = self._look.encoder(number)
            spare = [each for each in self._versions if each not in self._live()][:-KEPT_ENCODERS]
            self._versions = {n: version for n, version in self._versions.items() if n not in spare}
            self._versions[number] = _Version(number, encoder, self._features(encoder.schema))
        return self._versions[number]

    def _known(self, number: int) -> Encoder | None:
        version = self._versions.get(number)
        return version.encoder if version else None

    def _live(self) -> list[int]:
        if isinstance(state := self._served_now, Exception):
            return []
        return [*state.pointer.live, *(state.experiment.versions if state.experiment else [])]

    def encoder(self, number: int) -> Encoder:
        """That of a version that has answered."""
        return self._version(number).encoder

    def _features(self, schema: Schema) -> OnlineFeatures:
        """Those of a version of the same schema, where there is one: a new version then finds its items in memory."""
        opened = [version.features for version in self._versions.values() if version.encoder.schema == schema]
        return opened[0] if opened else online_features(schema, Workspace.of(schema.name, self._home))


def _groups(assigned: list[tuple[int, _Assigned]]) -> list[list[tuple[int, _Assigned]]]:
    """What is answered in one call: requests of one version, as many as have at most MAX_TOGETHER candidates."""
    groups: dict[tuple[int, int], list[tuple[int, _Assigned]]] = {}
    sizes: Counter[int] = Counter()
    for place, each in assigned:
        number, count = each.version.number, len(each.query.item_ids)
        sizes[number] += count
        groups.setdefault((number, (sizes[number] - 1) // MAX_TOGETHER), []).append((place, each))
    return list(groups.values())


def _part(tensors: Tensors, place: slice) -> Tensors:
    return {name: value[place] for name, value in tensors.items()}


def _own(blocks: Blocks, number: int, place: slice, count: int) -> Blocks:
    """One request's part of a batch of ``count``."""
    if count == 1:
        return blocks
    user = slice(number, number + 1)
    own = {name: block[user if name.startswith(_USER_BLOCKS) else place] for name, block in blocks.items()}
    return own | {"user_index": np.zeros_like(own["user_index"])}


def online_features(schema: Schema, workspace: Workspace) -> OnlineFeatures:
    """Features of a dataset whose log need not be where the server is: reading online takes its schema alone."""
    registry = FeatureStore(Dataset(Path(), schema, {}), workspace)

    def connect() -> Online:
        return Online(schema, online_rows(schema, workspace))

    return OnlineFeatures(connect, registry.held_seconds, settings().item_cache_seconds)
