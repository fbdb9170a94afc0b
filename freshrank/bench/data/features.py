"""`freshrank bench features`: what one day's features and frame cost, from 1 to 100 million rows.

Every size is a simulated world of its own, written day by day. Each step runs in a process of its own, whose peak
memory is its own. The floor is DuckDB on the same files: one GROUP BY per entity that counts the same windows,
and one statement per entity that gives the very features.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field
from rich.console import Console

from freshrank.reports.style import BLUE, GREY, INK, STYLE, VERMILION
from freshrank.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


from freshrank.bench.data.features_step import measured
from freshrank.bench.measure import alone, environment, machine
from freshrank.datasets.dataset import Dataset
from freshrank.datasets.simulator import WorldConfig
from freshrank.reports.report import library_versions
from freshrank.storage.files import read_json, write_json

LOOKBACK = 28
STEPS = ("simulate", "scratch", "day", "frame", "plain_counts", "plain_features")
TARGET_RATIO = 2.0
TARGET_GIB = 8.0


class FeaturesPlan(BaseModel):
    """What is measured."""

    millions: tuple[float, ...] = (1, 10, 100)
    """Impressions of the 28 days that the day's features see."""
    rounds: int = Field(default=3, ge=1)
    """How often each step but the simulation runs, in turn; the middle one counts."""
    memory_gib: float = Field(default=5.0, gt=0)
    """What DuckDB may hold."""

    def world(self, millions: float) -> WorldConfig:
        """28 days to sum over and the day that is trained on; users and items in proportion to the log."""
        rows = int(millions * 1e6)
        return WorldConfig.of(
            days=LOOKBACK + 1,
            impressions_per_day=rows // LOOKBACK,
            users=max(100, rows // 100),
            items_at_start=max(100, rows // 500),
            new_items_per_day=max(10, rows // 12_500),
        )


class StepCost(BaseModel):
    """One step at one size."""

    seconds: float
    """The middle of the rounds, the start of Python not counted."""
    lowest: float
    highest: float
    peak_gib: float
    """The highest resident memory of its process over the rounds."""


class Size(BaseModel):
    """All steps at one size."""

    rows: int
    """Impressions of the 28 days."""
    users: int
    items: int
    steps: dict[str, StepCost]

    def ratio(self, step: str, floor: str) -> float:
        return self.steps[step].seconds / self.steps[floor].seconds


class FeaturesBench(BaseModel):
    """The JSON file of a run, e.g. ``docs/bench/features.json``.

    scratch: the snapshots of a day with nothing there but the log of the 28 days. day: the snapshots of the next day,
    which read one day of log and the parts. frame: that day's training frame. plain_counts, plain_features: see above.
    """

    plan: FeaturesPlan
    machine: dict[str, str]
    versions: dict[str, str]
    sizes: list[Size]
    ratios: dict[str, float]
    """At the largest size: ``<step>/<floor>``, and how the time per row grew from the smallest."""
    peak_gib: float
    """Of every step that builds features or the frame, at any size."""

    def sentences(self) -> Iterator[str]:
        """What was found, for a person."""
        for size in self.sizes:
            steps = ", ".join(
                f"{name} {step.seconds:.1f} s ({step.peak_gib:.1f} GiB)" for name, step in size.steps.items()
            )
            yield f"{size.rows / 1e6:g} million impressions: {steps}"
        for name, ratio in self.ratios.items():
            yield f"{name}: {ratio:.2f}"
        met = "met" if self.peak_gib <= TARGET_GIB else "NOT met"
        yield f"peak memory {self.peak_gib:.1f} GiB (target: at most {TARGET_GIB:g}) {met}"


def features(plan: FeaturesPlan, work: Path, out: Path, console: Console) -> FeaturesBench:
    """Measure in ``work``, write ``out`` (JSON) and the picture beside it.

    What a size leaves in ``work`` is removed when it is done, but for the simulated worlds, which are used again.
    """
    with environment(FEATURES_MEMORY_GIB=str(plan.memory_gib)):
        sizes = [_size(plan, millions, work, console) for millions in plan.millions]
    result = FeaturesBench(
        plan=plan,
        machine=machine(),
        versions=library_versions(),
        sizes=sizes,
        ratios=_ratios(sizes),
        peak_gib=_peak(sizes),
    )
    write_json(out, result.model_dump(mode="json"))
    write_picture(result, out.with_suffix(".png"))
    return result


def _size(plan: FeaturesPlan, millions: float, work: Path, console: Console) -> Size:
    world, place = plan.world(millions), work / f"{millions:g}m"
    taken: dict[str, list[tuple[float, float]]] = {}
    console.print(f"{millions:g} million impressions ...")
    data = place / "data"
    if not _is_simulated(data, world):
        write_json(place / "world.json", world.model_dump(mode="json"))
        taken["simulate"] = [alone(measured, "simulate", place)]
    for number in range(plan.rounds):
        for step in STEPS[1:]:
            console.print(f"  round {number + 1}: {step} ...")
            taken.setdefault(step, []).append(alone(measured, step, place))
    shutil.rmtree(place / "home", ignore_errors=True)
    rows = sum(Dataset.open(data).rows(day) for day in Dataset.open(data).days[:LOOKBACK])
    items = world.items_at_start + world.days * world.new_items_per_day
    return Size(rows=rows, users=world.users, items=items, steps={name: _step(runs) for name, runs in taken.items()})


def _is_simulated(data: Path, world: WorldConfig) -> bool:
    manifest = data / "manifest.json"
    return manifest.exists() and read_json(manifest)["source"].get("world") == world.model_dump(mode="json")


def _step(runs: list[tuple[float, float]]) -> StepCost:
    seconds = sorted(taken for taken, _ in runs)
    return StepCost(
        seconds=seconds[len(seconds) // 2],
        lowest=seconds[0],
        highest=seconds[-1],
        peak_gib=max(peak for _, peak in runs),
    )


def _ratios(sizes: list[Size]) -> dict[str, float]:
    first, last = sizes[0], sizes[-1]
    ratios = {
        f"{step}/{floor}": last.ratio(step, floor)
        for step, floor in (("day", "plain_counts"), ("scratch", "plain_features"), ("scratch", "plain_counts"))
    }
    for step in ("scratch", "day", "frame"):
        per_row = [size.steps[step].seconds / size.rows for size in (first, last)]
        ratios[f"{step}: time per row, largest / smallest"] = per_row[1] / per_row[0]
    return ratios


def _peak(sizes: list[Size]) -> float:
    return max(size.steps[step].peak_gib for size in sizes for step in ("scratch", "day", "frame"))


STEP_STYLES = {
    "scratch": ("28 days from nothing", VERMILION),
    "day": ("one day more", BLUE),
    "frame": ("the day's training frame", "#009e73"),
    "plain_counts": ("plain GROUP BY, counts only", GREY),
    "plain_features": ("plain SQL, the same features", INK),
}


def write_picture(result: "FeaturesBench", path: Path) -> None:
    """A PNG at ``path``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        seconds, memory = figure.subplots(1, 2)
        _draw_lines(seconds, result, lambda step, rows: step.seconds / rows * 1e6)
        seconds.set(yscale="log", ylabel="seconds per million impressions of the 28 days", title="Time")
        _draw_lines(memory, result, lambda step, rows: step.peak_gib)
        memory.axhline(8, color=GREY, linestyle=":", linewidth=1)
        memory.set(ylabel="GiB", title="Peak memory of the process")
        memory.set_ylim(bottom=0)
        seconds.legend()
        figure.savefig(temporary, format="png", dpi=130)


def _draw_lines(axes: "Axes", result: "FeaturesBench", value: Callable[["StepCost", int], float]) -> None:
    rows = [size.rows for size in result.sizes]
    for name, (label, colour) in STEP_STYLES.items():
        values = [value(size.steps[name], size.rows) for size in result.sizes]
        axes.plot(rows, values, "o-", color=colour, label=label)
    axes.set(xscale="log", xlabel="impressions")
