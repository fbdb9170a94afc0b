"""What measurements of serving have in common: the machine they ran on, settings and ports of their own."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from freshrank.serving.server import LOOPBACK, Ports
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
