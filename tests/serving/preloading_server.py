"""A web server that loads its application and then forks its workers, as gunicorn does with --preload.

python preloading_server.py DATA MAPPINGS TIME (quiet | threads | asyncio): the parent asks first; then every worker
maps ids that nobody has mapped yet and asks as well, and at last the parent once more. Prints what it and its workers
were answered, and which libraries that a web server should not carry are loaded.
"""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from freshrank.datasets.layout import schema_of
from freshrank.serving.client import Answer, AsyncClient, Client
from freshrank.settings import settings

WORKERS = 6
ITEMS = ["i1", "i2", "i3"]
HEAVY = {"polars", "torch", "pandas", "jinja2", "safetensors"}

Rank = Callable[[list[int] | list[str]], Answer]


def scores(answer: Answer) -> list[float]:
    return [round(score, 5) for score in answer.score.tolist()]


def fork(rank: Rank) -> tuple[int, int]:
    """Fork a worker that asks; its process and the pipe on which it answers."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        os.write(writing, json.dumps(scores(rank(ITEMS))).encode())
    finally:
        os._exit(0)


def answered(pid: int, pipe: int) -> list[float] | None:
    """None of a worker that died without an answer."""
    with os.fdopen(pipe) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else None


@contextmanager
def asking(rank: Rank, threads: int) -> Iterator[None]:
    """``threads`` of them ask all the while."""
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            rank([1, 2, 3])

    running = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in running:
        thread.start()
    yield
    done.set()
    for thread in running:
        thread.join()


def main(data: Path, mappings: Path, at: str, how: str) -> None:
    kind = AsyncClient if how == "asyncio" else Client
    client = kind(settings().triton_grpc_url, schema_of(data), mappings)

    def rank(items: list[int] | list[str]) -> Answer:
        answer = client.rank("u1", items, at=at)
        return answer if isinstance(answer, Answer) else asyncio.run(answer)

    before = scores(rank([1, 2, 3]))
    with asking(rank, 4 if how == "threads" else 0):
        workers = [answered(*fork(rank)) for _ in range(WORKERS)]
    after = scores(rank(ITEMS))
    print(json.dumps({"parent": [before, after], "workers": workers, "heavy": sorted(HEAVY & set(sys.modules))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
