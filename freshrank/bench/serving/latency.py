"""`freshrank bench serving`: what an answer costs, against its own floor, in one run.

All systems answer the same requests from the same Redis with the same model, in turn, in short slices, so that whatever
else the machine does hits all alike. The floor reads the stored bytes of the same keys and runs the model on inputs
that are ready: it decodes nothing, knows nothing of requests and has no server.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import numpy as np
import psutil
from pydantic import BaseModel
from rich.console import Console
from rich.progress import track

from freshrank.bench.measure import Ratio, ratio
from freshrank.bench.serving.load import Callers, Place, Slice
from freshrank.bench.serving.redis_server import RedisServer
from freshrank.pipeline import steps
from freshrank.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from freshrank.bench.measure import environment, free_ports, machine
from freshrank.config import RunConfig
from freshrank.datasets.dataset import Dataset
from freshrank.dates import midnight
from freshrank.errors import FreshrankError, ServingError
from freshrank.reports.report import library_versions
from freshrank.serving.deploy.local_server import LOOPBACK, TritonServer
from freshrank.serving.deploy.publish import publish
from freshrank.serving.repository import ModelRepository
from freshrank.settings import settings
from freshrank.storage.files import write_json
from freshrank.storage.workspace import Workspace

OURS, UNCACHED, RANKER, FASTAPI = "ranking", "ranking, nothing kept", "ranker alone", "FastAPI"
FLOORS = ("floor, 1 thread", "floor, all cores")
SYSTEMS = (OURS, UNCACHED, RANKER, *FLOORS, FASTAPI)
SIZE = 500
"""Candidates at which the ratios are taken."""
PROCESSES = 2
"""Processes that call, where at least two callers do."""


class ServingPlan(BaseModel):
    """What is measured."""

    sizes: tuple[int, ...] = (50, 100, SIZE, 2000)
    callers: tuple[int, ...] = (1, 2, 4, 8, 16)
    seconds: float = 2.0
    rounds: int = 5

    def cells(self) -> list[tuple[int, int]]:
        """Candidates and callers: every size with one caller, every number of callers at the middle size."""
        return [(size, 1) for size in self.sizes] + [(self.size, callers) for callers in self.callers if callers > 1]

    @property
    def size(self) -> int:
        return SIZE if SIZE in self.sizes else self.sizes[0]


class Cell(BaseModel):
    """One system at one size and number of callers; medians over the rounds."""

    system: str
    candidates: int
    callers: int
    requests: int
    p50_ms: float
    p99_ms: float
    per_second: float
    caller_cores: float
    """CPU seconds per second that the calling processes took from the two sides' common cores."""


class ServingBench(BaseModel):
    """The JSON file of a run, e.g. ``docs/bench/serving.json``."""

    dataset: str
    items: int
    parameters: dict[str, int]
    plan: ServingPlan
    machine: dict[str, str]
    versions: dict[str, str]
    wrong: int
    """Answers that were degraded, not finite, too short or another version's."""
    ratios: list[Ratio]
    cells: list[Cell]


class Round(BaseModel):
    """One slice."""

    requests: int
    p50_ms: float
    p99_ms: float
    per_second: float
    caller_cores: float


Rounds = dict[tuple[str, int, int], list[Round]]


def serving(data: Path, home: Path, plan: ServingPlan, out: Path, config: RunConfig, console: Console) -> ServingBench:
    """Measure every system and write ``out`` (JSON) and the picture beside it.

    Raises:
        ServingError: a system gave wrong answers.
    """
    with deployed(data, home, config, console) as place, Callers(place, list(plan.sizes), PROCESSES) as callers:
        rounds, wrong = _measured(callers, plan, console)
    dataset = Dataset.open(data)
    result = ServingBench(
        dataset=dataset.schema.name,
        items=len(dataset.items()),
        parameters={"ranking_instances": settings().ranking_instances or max(1, (os.cpu_count() or 1) // 2)},
        plan=plan,
        machine=machine(),
        versions=library_versions(),
        wrong=wrong,
        ratios=ratios(rounds, plan),
        cells=[_cell(*key, each) for key, each in rounds.items()],
    )
    write_json(out, result.model_dump())
    write_picture(result, out.with_suffix(".png"))
    if wrong:
        raise ServingError(f"bench serving: {wrong} answers were wrong or missing; {out} says how many were asked for")
    return result


def _measured(callers: Callers, plan: ServingPlan, console: Console) -> tuple[Rounds, int]:
    rounds: Rounds = {}
    wrong = 0
    work = [(system, *cell) for _ in range(plan.rounds) for cell in plan.cells() for system in SYSTEMS]
    for system in SYSTEMS:
        callers.call(system, plan.size, max(plan.callers), min(1.0, plan.seconds))  # thread pools
    for key in track(work, "serving", console=console, disable=not console.is_terminal):
        part = callers.call(*key, plan.seconds)
        wrong += part.wrong
        rounds.setdefault(key, []).append(_round(part))
    return rounds, wrong


def _round(part: Slice) -> Round:
    count, took = len(part.seconds), part.took
    p50, p99 = np.percentile(np.array(part.seconds) * 1e3, [50, 99]).tolist()
    return Round(requests=count, p50_ms=p50, p99_ms=p99, per_second=count / took, caller_cores=part.cpu / took)


def _cell(system: str, size: int, callers: int, rounds: list[Round]) -> Cell:
    medians = {
        name: median(getattr(each, name) for each in rounds)
        for name in ("p50_ms", "p99_ms", "per_second", "caller_cores")
    }
    requests = sum(each.requests for each in rounds)
    return Cell(system=system, candidates=size, callers=callers, requests=requests, **medians)


def ratios(rounds: Rounds, plan: ServingPlan) -> list[Ratio]:
    """What is held against a target, and what is only compared."""
    alone = {system: rounds[system, plan.size, 1] for system in SYSTEMS}
    p99 = {system: [each.p99_ms for each in cells] for system, cells in alone.items()}
    busiest = {system: _saturation(rounds, plan, system) for system in SYSTEMS}
    # The floor is whichever of its two ways is better, round by round.
    floor_p99 = [min(pair) for pair in zip(*(p99[name] for name in FLOORS), strict=True)]
    floor_rate = [max(pair) for pair in zip(*(busiest[name] for name in FLOORS), strict=True)]
    size = plan.size
    return [
        ratio(f"p99 of ranking / floor, {size} candidates, 1 caller", p99[OURS], floor_p99, at_most=2),
        ratio(f"p99 of ranking, nothing kept / floor, {size} candidates, 1 caller", p99[UNCACHED], floor_p99),
        ratio(f"p99 of ranking / ranker alone, {size} candidates, 1 caller", p99[OURS], p99[RANKER], at_most=3),
        ratio(f"throughput of ranking / floor, {size} candidates", busiest[OURS], floor_rate, at_least=0.6),
        ratio(f"throughput of ranking, nothing kept / floor, {size} candidates", busiest[UNCACHED], floor_rate),
        ratio(f"p99 of FastAPI / ranking, {size} candidates, 1 caller", p99[FASTAPI], p99[OURS]),
        ratio(f"throughput of ranking / FastAPI, {size} candidates", busiest[OURS], busiest[FASTAPI]),
    ]


def _saturation(rounds: Rounds, plan: ServingPlan, system: str) -> list[float]:
    """Per round the highest throughput over all numbers of callers."""
    throughput = [
        [each.per_second for each in rounds[system, plan.size, count]]
        for size, count in plan.cells()
        if size == plan.size
    ]
    return [max(each) for each in zip(*throughput, strict=True)]


@contextmanager
def deployed(data: Path, home: Path, config: RunConfig, console: Console) -> Iterator[Place]:
    """A workspace of its own under ``home`` with Redis, two Tritons and the FastAPI server, all on free ports."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(home / "redis"))
        stack.enter_context(environment(HOME=str(home.resolve()), ONLINE_STORE="redis", REDIS_URL=redis.url))
        dataset = Dataset.open(data)
        bundle = _bundle(dataset, home, config, console)
        console.print("starting the servers ...")
        ours = stack.enter_context(_triton(Workspace.of(dataset.schema.name).triton, bundle))
        with environment(ITEM_CACHE_SECONDS="0"):
            uncached = stack.enter_context(_triton(home / "uncached" / dataset.schema.name, bundle))
        fastapi = stack.enter_context(_fastapi(bundle, home))
        noon = midnight(dataset.days[-1], dataset.schema.utc_offset_hours) + timedelta(hours=12)
        served = ModelRepository(Workspace.of(dataset.schema.name).triton).served()
        assert served
        yield Place(data, bundle, served.version, ours, uncached, fastapi, int(noon.timestamp() * 1e6))


def _bundle(dataset: Dataset, home: Path, config: RunConfig, console: Console) -> Path:
    """A model of ``config`` trained for the log's last day; one that was trained before is found again."""
    console.print("features, training and calibration ...")
    day, windows = dataset.days[-1].isoformat(), config.windows
    steps.build_features(dataset.path, day, windows)
    steps.materialize(dataset.path, day)
    trained, bundle = home / "trained", home / "bundle"
    steps.train(dataset.path, day, windows, config.model, config.techniques, config.training, trained)
    steps.calibrate(dataset.path, day, windows, config.calibration, trained, bundle)
    return bundle


@contextmanager
def _triton(root: Path, bundle: Path) -> Iterator[str]:
    """A server of its own with ``bundle`` in service; its gRPC address."""
    server = TritonServer(ModelRepository(root), free_ports())
    try:
        server.start()
        url = f"{LOOPBACK}:{server.ports.grpc}"
        publish(bundle, url, server.repository)
        yield url
    finally:
        server.stop()


@contextmanager
def _fastapi(bundle: Path, home: Path) -> Iterator[str]:
    port = free_ports().http
    command = [
        sys.executable,
        "-m",
        "freshrank.bench.serving.fastapi_server",
        "--bundle",
        str(bundle.resolve()),
        "--home",
        str(home.resolve()),
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        _await(f"http://{LOOPBACK}:{port}/openapi.json", process)
        yield f"http://{LOOPBACK}:{port}"
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def _await(url: str, process: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    opener, deadline = build_opener(ProxyHandler({})), time.monotonic() + seconds
    while True:
        try:
            opener.open(url, timeout=5).read()
        except (URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise FreshrankError("bench serving: the FastAPI server did not start") from None
            time.sleep(0.2)
        else:
            return


STYLES = {
    "ranking": ("tab:blue", "o"),
    "ranking, nothing kept": ("tab:cyan", "s"),
    "ranker alone": ("tab:green", "^"),
    "floor, 1 thread": ("0.35", "D"),
    "floor, all cores": ("0.65", "D"),
    "FastAPI": ("tab:red", "v"),
}


def write_picture(result: "ServingBench", path: Path) -> None:
    """A PNG at ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    alone = [cell for cell in result.cells if cell.callers == 1]
    busy = [cell for cell in result.cells if cell.candidates == result.plan.size]
    for system, (colour, marker) in STYLES.items():
        _draw_latency(left, [cell for cell in alone if cell.system == system], colour, marker, system)
        _throughput(right, [cell for cell in busy if cell.system == system], colour, marker)
    _label(left, "candidates", "milliseconds", "One caller: p50 (line) to p99 (band)", result.plan.sizes)
    _label(right, "callers", "requests per second", f"{result.plan.size} candidates: throughput", result.plan.callers)
    left.set_yscale("log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _draw_latency(axes: "Axes", cells: "list[Cell]", colour: str, marker: str, label: str) -> None:
    cells = sorted(cells, key=lambda cell: cell.candidates)
    sizes = [cell.candidates for cell in cells]
    p50, p99 = [cell.p50_ms for cell in cells], [cell.p99_ms for cell in cells]
    axes.plot(sizes, p50, color=colour, marker=marker, label=label)
    axes.fill_between(sizes, p50, p99, color=colour, alpha=0.15, linewidth=0)


def _throughput(axes: "Axes", cells: "list[Cell]", colour: str, marker: str) -> None:
    cells = sorted(cells, key=lambda cell: cell.callers)
    axes.plot([cell.callers for cell in cells], [cell.per_second for cell in cells], color=colour, marker=marker)


def _label(axes: "Axes", x: str, y: str, title: str, ticks: tuple[int, ...]) -> None:
    axes.set(xlabel=x, ylabel=y, title=title, xscale="log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if y.startswith("requests"):
        axes.set_ylim(bottom=0)
