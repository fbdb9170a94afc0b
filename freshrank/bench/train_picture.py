"""The picture of `freshrank bench train`: examples per second by system, and memory by how many rows there are."""

from pathlib import Path
from typing import TYPE_CHECKING

from freshrank.figures import BLUE, GREY, STYLE, VERMILION
from freshrank.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from freshrank.bench.train import TrainBench


def write_picture(found: "TrainBench", path: Path) -> None:
    """A PNG at ``path``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(11, 4), layout="constrained")
        speed, memory = figure.subplots(1, 2, width_ratios=(3, 2))
        _speed(speed, found)
        _memory(memory, found)
        figure.savefig(temporary, format="png", dpi=130)


def _speed(axes: "Axes", found: "TrainBench") -> None:
    names = list(reversed(found.systems))
    systems = [found.systems[name] for name in names]
    middle = [each.examples_per_second for each in systems]
    spread = [[each.examples_per_second - each.lowest for each in systems],
              [each.highest - each.examples_per_second for each in systems]]  # fmt: skip
    colours = [BLUE if name.startswith("freshrank") else GREY for name in names]
    axes.barh(names, middle, xerr=spread, color=colours, ecolor=VERMILION)
    for place, each in enumerate(systems):
        axes.text(each.highest, place, f"  {each.examples_per_second:,.0f}/s, {each.peak_mib:,.0f} MiB", va="center")
    axes.set_xlim(right=1.35 * max(each.highest for each in systems))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="examples per second", title=f"Batches of {found.batch_size:,}, {found.threads} threads")


def _memory(axes: "Axes", found: "TrainBench") -> None:
    rows = [each.rows for each in found.memory]
    axes.plot(rows, [each.streamed_mib for each in found.memory], "o-", color=BLUE,
              label=f"streamed, windows of {found.window_rows:,}")  # fmt: skip
    axes.plot(rows, [each.whole_mib for each in found.memory], "s--", color=GREY, label="in memory")
    axes.set(xlabel="training rows", ylabel="peak resident MiB", title="Reading an epoch")
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
