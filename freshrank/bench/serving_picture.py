"""The picture of `freshrank bench serving`: latency by candidates, throughput by callers, all systems."""

from pathlib import Path
from typing import TYPE_CHECKING

from freshrank.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from freshrank.bench.serving import Cell, ServingBench

STYLES = {
    "ranking": ("tab:blue", "o"),
    "ranking, nothing kept": ("tab:cyan", "s"),
    "ranker alone": ("tab:green", "^"),
    "floor, 1 thread": ("0.35", "D"),
    "floor, all cores": ("0.65", "D"),
    "FastAPI": ("tab:red", "v"),
}


def write_picture(found: "ServingBench", path: Path) -> None:
    """A PNG at ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    alone = [cell for cell in found.cells if cell.callers == 1]
    busy = [cell for cell in found.cells if cell.candidates == found.plan.size]
    for system, (colour, marker) in STYLES.items():
        _latency(left, [cell for cell in alone if cell.system == system], colour, marker, system)
        _throughput(right, [cell for cell in busy if cell.system == system], colour, marker)
    _label(left, "candidates", "milliseconds", "One caller: p50 (line) to p99 (band)", found.plan.sizes)
    _label(right, "callers", "requests per second", f"{found.plan.size} candidates: throughput", found.plan.callers)
    left.set_yscale("log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _latency(axes: "Axes", cells: "list[Cell]", colour: str, marker: str, label: str) -> None:
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
