"""The picture of `freshrank bench features`: time per million rows and peak memory, by size and step."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from freshrank.figures import BLUE, GREY, INK, STYLE, VERMILION
from freshrank.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from freshrank.bench.features import FeaturesBench, Step

STEPS = {
    "scratch": ("28 days from nothing", VERMILION),
    "day": ("one day more", BLUE),
    "frame": ("the day's training frame", "#009e73"),
    "plain_counts": ("plain GROUP BY, counts only", GREY),
    "plain_features": ("plain SQL, the same features", INK),
}


def write_picture(found: "FeaturesBench", path: Path) -> None:
    """A PNG at ``path``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        seconds, memory = figure.subplots(1, 2)
        _lines(seconds, found, lambda step, rows: step.seconds / rows * 1e6)
        seconds.set(yscale="log", ylabel="seconds per million impressions of the 28 days", title="Time")
        _lines(memory, found, lambda step, rows: step.peak_gib)
        memory.axhline(8, color=GREY, linestyle=":", linewidth=1)
        memory.set(ylabel="GiB", title="Peak memory of the process")
        memory.set_ylim(bottom=0)
        seconds.legend()
        figure.savefig(temporary, format="png", dpi=130)


def _lines(axes: "Axes", found: "FeaturesBench", value: Callable[["Step", int], float]) -> None:
    rows = [size.rows for size in found.sizes]
    for name, (label, colour) in STEPS.items():
        values = [value(size.steps[name], size.rows) for size in found.sizes]
        axes.plot(rows, values, "o-", color=colour, label=label)
    axes.set(xscale="log", xlabel="impressions")
