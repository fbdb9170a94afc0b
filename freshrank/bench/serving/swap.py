"""`freshrank bench swap`: swaps and roll-backs under a constant load, in a workspace and on ports of its own.

Two rankers take turns; each swap publishes a copy of one of them as a version nobody has seen. Between any two changes
the load goes on undisturbed for at least as long as the change took, so that quiet and changing seconds lie side by
side through the run.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal, Self

import polars as pl
import psutil
from pydantic import BaseModel, Field
from rich.console import Console
from rich.progress import track

from freshrank.bench.measure import machine
from freshrank.bench.serving.steady_load import LoadTarget, draw, scores, steady_load
from freshrank.reports.style import BLUE, GREY, INK, STYLE, VERMILION
from freshrank.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from freshrank.bench.serving.swap_world import SwapWorld, swap_world
from freshrank.reports.report import library_versions
from freshrank.serving.cpu import lower_priority
from freshrank.serving.deploy.local_server import SHARED_MEMORY
from freshrank.serving.deploy.publish import publish, rollback
from freshrank.serving.repository import RANKING, Pointer
from freshrank.serving.triton import TritonClient
from freshrank.storage.files import write_json

REQUESTS = 64
"""Different requests that the load goes through, again and again."""
SETTLING_SECONDS = 1.0
"""After a change its tidying goes on in the server: neither quiet nor part of the change."""
QUIET_SECONDS = 2.0
"""At least, between two changes."""
TARGET_RATIO = 1.5
NOTHING = "nothing"
QUARTERS = 4
PARTS = 5
_MIB = 2**20

Kind = Literal["swap", "roll-back"]
MOMENTS = ("steady", "swap", "roll-back", "settling", "between")


class SwapPlan(BaseModel):
    """What is done, while ``rate`` requests of ``candidates`` arrive each second."""

    swaps: int = Field(default=100, ge=1)
    rollbacks: int = Field(default=20, ge=0)
    rate: float = Field(default=40, gt=0)
    candidates: int = Field(default=100, ge=1, le=2000)

    def changes(self) -> list[Kind]:
        """Roll-backs are spread evenly, each after a swap."""
        kinds: list[Kind] = []
        for number in range(self.swaps):
            kinds.append("swap")
            if (number + 1) * self.rollbacks // self.swaps > number * self.rollbacks // self.swaps:
                kinds.append("roll-back")
        return kinds


class ResourceUsage(BaseModel):
    """Of tritonserver and its Python processes; shared memory counts in every process that maps it."""

    seconds: float
    """Since the start of the load."""
    processes: int
    threads: int
    open_files: int
    rss_mib: float
    server_rss_mib: float
    """tritonserver's own process alone."""
    ranking_rss_mib: float
    """The processes of `ranking`, which outlive every swap."""
    shared_memory: int
    """Files under /dev/shm."""
    shared_memory_mib: float


class Change(BaseModel):
    """A publication or a roll-back; seconds since the start of the load."""

    kind: Kind
    start: float
    end: float
    version: int
    """That serves afterwards."""

    @property
    def seconds(self) -> float:
        return self.end - self.start


class BareLoop(BaseModel):
    """A model that does nothing, of which one version after another is loaded in place of the one before, as often as
    the bench swapped: what Triton itself keeps."""

    loads: int
    server_rss_mib: list[float]
    """tritonserver's own process after each quarter, from before the first."""

    @property
    def per_load_kib(self) -> float:
        """Over the second half: at first Triton fills its own pools."""
        half = len(self.server_rss_mib) // 2
        return (self.server_rss_mib[-1] - self.server_rss_mib[half]) * 1024 / max(1, self.loads / 2)


class Latency(BaseModel):
    """Of requests that were due in the named moments, from when they were due."""

    requests: int
    p50_ms: float
    p99_ms: float
    highest_ms: float


class RunSegment(BaseModel):
    """One part of the run: the p99s whose ratio is judged."""

    steady_p99_ms: float
    changing_p99_ms: float
    ratio: float


class SwapBench(BaseModel):
    """The JSON file of a run, e.g. ``docs/bench/swap.json``."""

    dataset: str
    plan: SwapPlan
    machine: dict[str, str]
    versions: dict[str, str]
    sent: int
    failed: int
    errors: list[str]
    """The first few."""
    wrong: int
    """Answers whose scores are not those of the model that the version they name was copied from."""
    latency: dict[str, Latency]
    """steady; swap and roll-back, from their start to their return; settling, the second after it; between, while
    the bench itself writes a bundle or counts memory."""
    ratios: dict[str, float]
    """p99 of swap and of roll-back by that of steady."""
    parts: list[RunSegment]
    """The swaps of each fifth of the run."""
    seconds: dict[str, dict[str, float]]
    """Median and highest of a swap and of a roll-back."""
    before: ResourceUsage
    """After the first two swaps: from then on two versions are loaded."""
    after: ResourceUsage
    growth_kib_per_swap: float
    """Of tritonserver's own process, over the second half of the run."""
    bare_loop: BareLoop
    answered_by: dict[int, int]
    """Requests by version."""
    changes: list[Change]
    usage: list[ResourceUsage]

    @property
    def passed(self) -> bool:
        return self.failed == self.wrong == 0

    def sentences(self) -> list[str]:
        """What was found, for a person."""
        grown = self.after.rss_mib - self.before.rss_mib
        return [
            f"{self.sent:,} requests: {self.failed} failed, {self.wrong} wrong",
            *(
                f"{kind}: {self.seconds[kind]['median']:.2f} s (at most {self.seconds[kind]['highest']:.2f} s), p99 "
                f"{self.latency[kind].p99_ms:.1f} ms, {ratio:.2f} times the steady "
                f"{self.latency['steady'].p99_ms:.1f} ms (target: at most {TARGET_RATIO:g})"
                for kind, ratio in self.ratios.items()
            ),
            f"memory {self.before.rss_mib:.0f} -> {self.after.rss_mib:.0f} MiB ({grown:+.0f}), processes "
            f"{self.before.processes} -> {self.after.processes}, open files {self.before.open_files} -> "
            f"{self.after.open_files}, shared memory {self.before.shared_memory} -> {self.after.shared_memory} files",
            f"tritonserver itself: {self.growth_kib_per_swap:+.0f} KiB per swap; per bare load and unload of an empty "
            f"model {self.bare_loop.per_load_kib:+.0f} KiB",
        ]


def swap(data: Path, plan: SwapPlan, out: Path, console: Console) -> SwapBench:
    """Measure, write ``out`` (JSON) and the picture beside it."""
    with swap_world(data, console) as world:
        bench = _Bench(world, plan)
        rows = bench.run(console)
        bare = bench.bare_loop()
    result = bench.result(rows, bare)
    write_json(out, result.model_dump(mode="json"))
    write_picture(result, rows, out.with_suffix(".png"))
    return result


class _Bench:
    """One run; times are seconds since ``began``."""

    def __init__(self, world: SwapWorld, plan: SwapPlan) -> None:
        self.world = world
        self.plan = plan
        self.models: dict[int, str] = {}
        self.changes: list[Change] = []
        self.usage: list[ResourceUsage] = []
        self.began = 0.0

    def run(self, console: Console) -> pl.DataFrame:
        """What became of every request, with the ``moment`` it was due in."""
        target = self._target(console)
        with steady_load(target) as stop:
            # As `freshrank publish` does.
            lower_priority()
            self.began = time.perf_counter()
            time.sleep(SETTLING_SECONDS)
            for kind in track(self.plan.changes(), "swaps", console=console, disable=not console.is_terminal):
                change = self._change(kind)
                time.sleep(SETTLING_SECONDS + _quiet(change))
                self.usage.append(self._usage())
            rows = stop()
        rows = rows.with_columns(pl.col("due") - self.began).filter(pl.col("due") >= 0)
        return rows.with_columns(moment=moments(self.changes))

    def _target(self, console: Console) -> LoadTarget:
        """Both rankers have served once when the load begins, and what they answer is known."""
        console.print("the two rankers' own answers ...")
        world, expected = self.world, {}
        requests = draw(world.dataset, self.plan.candidates, REQUESTS)
        for name in world.bundles:
            self._publish(name)
            expected[name] = scores(world.url, world.dataset.path, world.at, requests)
        return LoadTarget(world.url, world.dataset.path, world.at, requests, expected, self.plan.rate)

    def _publish(self, name: str) -> Pointer:
        pointer = publish(self.world.unseen(name), self.world.url, self.world.server.repository)
        self.models[pointer.version] = name
        return pointer

    def _change(self, kind: Kind) -> Change:
        name = list(self.world.bundles)[len(self.models) % len(self.world.bundles)]
        bundle = self.world.unseen(name) if kind == "swap" else None
        start = time.perf_counter()
        if bundle:
            pointer = publish(bundle, self.world.url, self.world.server.repository)
            self.models[pointer.version] = name
        else:
            pointer = rollback(self.world.url, self.world.server.repository)
        end = time.perf_counter()
        self.changes.append(Change(kind=kind, start=start - self.began, end=end - self.began, version=pointer.version))
        return self.changes[-1]

    def _usage(self) -> ResourceUsage:
        pid = self.world.server.status().pid
        assert pid
        server = psutil.Process(pid)
        own = [process for each in [server, *server.children(recursive=True)] if (process := _Process.of(each))]
        shared = list(SHARED_MEMORY.glob(f"{self.world.server.shared_memory_prefix}*"))
        return ResourceUsage(
            seconds=time.perf_counter() - self.began,
            processes=len(own),
            threads=sum(each.threads for each in own),
            open_files=sum(each.files for each in own),
            rss_mib=sum(each.rss for each in own) / _MIB,
            server_rss_mib=own[0].rss / _MIB,
            ranking_rss_mib=sum(each.rss for each in own if each.is_ranking) / _MIB,
            shared_memory=len(shared),
            shared_memory_mib=sum(path.stat().st_blocks * 512 for path in shared) / _MIB,
        )

    def bare_loop(self) -> BareLoop:
        """On the same server, once nobody asks any more."""
        loads, repository = self.plan.swaps, self.world.server.repository
        used = [self._usage().server_rss_mib]
        with TritonClient.controlling(repository, self.world.url) as client:
            for number in range(1, loads + 1):
                _write_nothing(repository.models / NOTHING, number)
                client.load(NOTHING)
                if number * QUARTERS // loads > (number - 1) * QUARTERS // loads:
                    used.append(self._usage().server_rss_mib)
        return BareLoop(loads=loads, server_rss_mib=used)

    def _growth(self) -> float:
        later = self.usage[len(self.usage) // 2 :]
        swaps = sum(change.kind == "swap" for change in self.changes[len(self.usage) // 2 + 1 :])
        return (later[-1].server_rss_mib - later[0].server_rss_mib) * 1024 / max(1, swaps)

    def result(self, rows: pl.DataFrame, bare: BareLoop) -> SwapBench:
        failed = rows.filter(pl.col("error") != "")
        latency = {moment: _latency(rows.filter(pl.col("moment") == moment)) for moment in MOMENTS}
        kinds = [kind for kind in ("swap", "roll-back") if latency[kind].requests]
        return SwapBench(
            dataset=self.world.dataset.schema.name,
            plan=self.plan,
            machine=machine(),
            versions=library_versions(),
            sent=len(rows),
            failed=len(failed),
            errors=failed["error"].unique(maintain_order=True).head(5).to_list(),
            wrong=wrong_answers(rows, self.models),
            latency=latency,
            ratios={kind: latency[kind].p99_ms / latency["steady"].p99_ms for kind in kinds},
            parts=_parts(rows),
            seconds={kind: _seconds([c.seconds for c in self.changes if c.kind == kind]) for kind in kinds},
            before=self.usage[0],
            after=self.usage[-1],
            growth_kib_per_swap=self._growth(),
            bare_loop=bare,
            answered_by=dict(rows.filter(pl.col("version") > 0).group_by("version").len().sort("version").iter_rows()),
            changes=self.changes,
            usage=self.usage,
        )


def _write_nothing(model: Path, version: int) -> None:
    (model / str(version)).mkdir(parents=True)
    code = "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"
    (model / str(version) / "model.py").write_text(code)
    (model / "config.pbtxt").write_text(
        f'backend: "python"\nmax_batch_size: 0\nversion_policy {{ specific {{ versions: [ {version} ] }} }}\n'
        'input [ { name: "in" data_type: TYPE_INT64 dims: [ 1 ] } ]\n'
        'output [ { name: "out" data_type: TYPE_INT64 dims: [ 1 ] } ]\n'
    )


@dataclass(frozen=True)
class _Process:
    threads: int
    files: int
    rss: int
    is_ranking: bool

    @classmethod
    def of(cls, process: psutil.Process) -> Self | None:
        """None where it has ended."""
        try:
            is_ranking = any(f"/models/{RANKING}/" in argument for argument in process.cmdline())
            return cls(process.num_threads(), process.num_fds(), process.memory_info().rss, is_ranking)
        except psutil.NoSuchProcess:
            return None


def _quiet(change: Change) -> float:
    return max(change.seconds, QUIET_SECONDS)


def moments(changes: list[Change]) -> pl.Expr:
    """Which of MOMENTS each ``due`` falls into."""
    moment = pl.lit("between")
    for change in changes:
        settled = change.end + SETTLING_SECONDS
        bounds = {
            change.kind: (change.start, change.end),
            "settling": (change.end, settled),
            "steady": (settled, settled + _quiet(change)),
        }
        for name, (start, end) in bounds.items():
            moment = pl.when(pl.col("due").is_between(start, end, "left")).then(pl.lit(name)).otherwise(moment)
    return moment


def _latency(rows: pl.DataFrame) -> Latency:
    milliseconds = rows["latency"] * 1e3
    if milliseconds.is_empty():
        return Latency(requests=0, p50_ms=0, p99_ms=0, highest_ms=0)
    p50, p99, highest = (float(milliseconds.quantile(q, "linear") or 0) for q in (0.5, 0.99, 1))
    return Latency(requests=len(milliseconds), p50_ms=p50, p99_ms=p99, highest_ms=highest)


def _parts(rows: pl.DataFrame) -> list[RunSegment]:
    parts = []
    for part in rows.with_columns(part=pl.int_range(pl.len()) * PARTS // pl.len()).partition_by("part"):
        steady, changing = (_latency(part.filter(pl.col("moment") == moment)).p99_ms for moment in ("steady", "swap"))
        if steady and changing:
            parts.append(RunSegment(steady_p99_ms=steady, changing_p99_ms=changing, ratio=changing / steady))
    return parts


def wrong_answers(rows: pl.DataFrame, models: dict[int, str]) -> int:
    answered = rows.filter(pl.col("error") == "")
    right = answered["version"].replace_strict(models, default="?", return_dtype=pl.String)
    return int((answered["model"] != right).sum())


def _seconds(durations: list[float]) -> dict[str, float]:
    return {"median": median(durations), "highest": max(durations)}


COLOURS = {"swap": VERMILION, "roll-back": "#009e73"}


def write_picture(result: "SwapBench", rows: pl.DataFrame, path: Path) -> None:
    """A PNG at ``path``; ``rows`` as steady_load gives them, ``due`` since the start, with their ``moment``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        latency, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_latency(latency, result, rows)
        _draw_memory(memory, result)
        figure.savefig(temporary, format="png", dpi=130)


def _draw_latency(axes: "Axes", result: "SwapBench", rows: pl.DataFrame) -> None:
    for kind, colour in COLOURS.items():
        spans = [(change.start, change.end) for change in result.changes if change.kind == kind]
        for number, (start, end) in enumerate(spans):
            axes.axvspan(start, end, color=colour, alpha=0.25, linewidth=0, label=None if number else kind)
    answered, failed = rows.filter(pl.col("error") == ""), rows.filter(pl.col("error") != "")
    axes.plot(answered["due"], answered["latency"] * 1e3, ".", color=INK, markersize=2, label="request")
    if len(failed):
        axes.plot(failed["due"], failed["latency"] * 1e3, "x", color=VERMILION, label="failed request")
    for name, style in (("steady", "-"), ("swap", "--")):
        p99 = result.latency[name].p99_ms
        axes.axhline(p99, color=BLUE, linestyle=style, linewidth=1, label=f"p99 {name}: {p99:.1f} ms")
    axes.set(
        yscale="log",
        ylabel="milliseconds since it was due",
        title=f"{result.sent:,} requests, {result.failed} failed, {result.wrong} wrong",
    )
    axes.legend(loc="upper right", ncols=5)


def _draw_memory(axes: "Axes", result: "SwapBench") -> None:
    seconds = [each.seconds for each in result.usage]
    axes.plot(seconds, [each.rss_mib for each in result.usage], color=BLUE, label="tritonserver and its models")
    axes.plot(seconds, [each.ranking_rss_mib for each in result.usage], color=VERMILION, label="ranking alone")
    axes.plot(seconds, [each.server_rss_mib for each in result.usage], color=GREY, label="tritonserver alone")
    axes.set(xlabel="seconds", ylabel="resident MiB", title="Memory, two versions loaded")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")
