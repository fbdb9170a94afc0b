"""What measurements of serving have in common: the machine they ran on, settings and ports of their own."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import psutil
from pydantic import BaseModel

from freshrank.serving.deploy.local_server import LOOPBACK, Ports
from freshrank.settings import settings


def machine() -> dict[str, str]:
    """Cores, processor and memory; nothing that names the machine."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = f"{psutil.virtual_memory().total / 2**30:.0f}"
    return {"cores": str(os.cpu_count()), "processor": model, "memory_gib": memory}


def free_ports() -> Ports:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in Ports.model_fields]
    for each in sockets:
        each.bind((LOOPBACK, 0))
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return Ports(**dict(zip(Ports.model_fields, numbers, strict=True)))


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Settings FRESHRANK_<name> of this process and of those it starts."""
    names = {f"FRESHRANK_{name}": value for name, value in variables.items()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    settings.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        settings.cache_clear()


T = TypeVar("T")


def peak_mib() -> float:
    """Highest resident memory of this process so far; getrusage would count what its parent had when it was started."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """``function`` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Ratio(BaseModel):
    """Taken within each round, then the median over rounds and the range."""

    name: str
    value: float
    lowest: float
    highest: float
    target: str
    met: bool | None


def ratio(
    name: str,
    upper: Sequence[float],
    lower: Sequence[float],
    at_most: float | None = None,
    at_least: float | None = None,
) -> Ratio:
    """``upper`` by ``lower``, one of each per round; without a bound nothing is held against it."""
    values = [a / b for a, b in zip(upper, lower, strict=True)]
    value = median(values)
    if at_most is not None:
        target, met = f"at most {at_most:g}", value <= at_most
    elif at_least is not None:
        target, met = f"at least {at_least:g}", value >= at_least
    else:
        target, met = "", None
    return Ratio(name=name, value=value, lowest=min(values), highest=max(values), target=target, met=met)
