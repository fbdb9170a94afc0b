"""Clients: :class:`Client` and its asyncio twin :class:`AsyncClient` ask for rankings.

Both speak gRPC, and every refusal of the server becomes a ServingError.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from freshrank.datasets.layout import MAPPINGS, schema_of
from freshrank.schema import Schema
from freshrank.serving.client.ids import Id

if TYPE_CHECKING:
    import numpy as np

    from freshrank.bundle.golden import Tensors

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Answer:
    """What the server said of each candidate, in the order they were given."""

    items: list[Id]
    actions: list[str]
    probabilities: "np.ndarray[Any, Any]"
    """float32 [N, A], calibrated."""
    score: "np.ndarray[Any, Any]"
    """float32 [N]: probabilities weighted by the utilities of the schema."""
    cold: "np.ndarray[Any, Any]"
    """bool [N]: younger than the schema's ``fresh_days``, or not known."""
    known: "np.ndarray[Any, Any]"
    """bool [N]: whether the online store holds the item."""
    model_version: int
    arm: int
    """Of the running experiment: 0 the champion, also without an experiment; 1, ... the challengers in their order."""
    degraded: bool
    """The online store could not be read, and every feature counted as missing."""

    def rows(self) -> list[dict[str, Any]]:
        """One dict per candidate, best first: rank, item, score, p_<action>, ..., cold, known."""
        order = (-self.score).argsort(kind="stable").tolist()
        return [{"rank": rank} | self._row(place) for rank, place in enumerate(order, start=1)]

    def _row(self, place: int) -> dict[str, Any]:
        names = [f"p_{action}" for action in self.actions]
        probabilities = dict(zip(names, self.probabilities[place].tolist(), strict=True))
        flags = {"cold": bool(self.cold[place]), "known": bool(self.known[place])}
        return {"item": self.items[place], "score": float(self.score[place])} | probabilities | flags

    @classmethod
    def of(cls, items: Sequence[Id], schema: Schema, answer: "Tensors") -> Self:
        return cls(
            items=list(items),
            actions=schema.actions,
            probabilities=answer["probabilities"],
            score=answer["score"],
            cold=answer["cold"],
            known=answer["known"],
            model_version=int(answer["model_version"][0]),
            arm=int(answer["arm"][0]),
            degraded=bool(answer["degraded"][0]),
        )


class _BaseClient(ABC, Generic[Asked]):
    """Shared by both clients: converts ids, times and values as in the log to tensors, and answers back."""

    def __init__(self, url: str, schema: Schema, mappings: Path, timeout: float = 30.0) -> None:
        """``mappings`` holds ``<column>.parquet`` for every column whose values were text at the import."""
        # numpy and gRPC cost more than all that is imported above. A server that forks pays them once, before it does.
        from freshrank.serving.client.session import Session

        self.url = url
        self.schema = schema
        self._session = Session(url, schema, mappings, timeout)

    @classmethod
    def for_dataset(cls, data: Path | str, timeout: float = 30.0) -> Self:
        """For the imported dataset at ``data`` and the server that the settings name; ``timeout`` seconds a request."""
        from freshrank.settings import settings

        return cls(settings().triton_grpc_url, schema_of(Path(data)), Path(data) / MAPPINGS, timeout)

    def rank(
        self,
        user: Id,
        candidates: Sequence[Id],
        at: str | datetime | None = None,
        context: Sequence[str] | Mapping[str, Any] | None = None,
        query: Id | None = None,
        *,
        version: int | None = None,
        request_id: str = "",
    ) -> Asked:
        """Rank ``candidates`` for ``user``; ids as in the log, unknown ones included.

        Args:
            at: time of the request: ISO 8601 with a zone, or an aware datetime; now by default.
            context: values of context columns, by name or as ``name=value``; one not named, or None, is missing.
            query: the item the request starts from, where the schema has ``query_item_id``.
            version: a loaded version that is to answer, whatever serves and whatever experiment runs.
            request_id: what the request log calls it; outcomes are joined on it.

        Raises:
            ConfigError: a time without a zone, candidates that are no list, or an id or context value that cannot be.
            ServingError: no server, one of another dataset, nothing published, or the server refused.
        """
        request = partial(self._session.request, user, candidates, at, context, query, version)
        return self._ask(candidates, request, request_id)

    def rank_ids(
        self,
        user_id: int,
        item_ids: Sequence[int],
        at: datetime | None = None,
        *,
        version: int | None = None,
        request_id: str = "",
    ) -> Asked:
        """Rank by the int64 ids of the imported dataset."""
        request = partial(self._session.request_of_ids, user_id, item_ids, at, version)
        return self._ask(item_ids, request, request_id)

    @abstractmethod
    def _ask(self, items: Sequence[Id], request: "Callable[[], Tensors]", request_id: str) -> Asked: ...


class Client(_BaseClient[Answer]):
    """Ranks candidates for users of one dataset; close it, or use it in a ``with``.

    Threads may share one, and so may the processes of a server that forks: each opens a connection of its own.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._session.close()

    def _ask(self, items: Sequence[Id], request: "Callable[[], Tensors]", request_id: str) -> Answer:
        return Answer.of(items, self.schema, self._session.ask(request(), request_id))


class AsyncClient(_BaseClient[Coroutine[Any, Any, Answer]]):
    """The asyncio twin of :class:`Client`, for services that hold many requests at once; ``async with``.

    It belongs to no event loop: several may share one.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self._session.close()

    async def _ask(self, items: Sequence[Id], request: "Callable[[], Tensors]", request_id: str) -> Answer:
        return Answer.of(items, self.schema, await self._session.ask_async(request(), request_id))
