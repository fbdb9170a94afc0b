"""The picture of `freshrank bench swap`: latency over time with the changes marked, and memory over time."""

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from freshrank.figures import BLUE, GREY, INK, STYLE, VERMILION
from freshrank.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from freshrank.bench.swap import SwapBench

COLOURS = {"swap": VERMILION, "roll-back": "#009e73"}


def write_picture(found: "SwapBench", rows: pl.DataFrame, path: Path) -> None:
    """A PNG at ``path``; ``rows`` as steady_load gives them, ``due`` since the start, with their ``moment``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        latency, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _latency(latency, found, rows)
        _memory(memory, found)
        figure.savefig(temporary, format="png", dpi=130)


def _latency(axes: "Axes", found: "SwapBench", rows: pl.DataFrame) -> None:
    for kind, colour in COLOURS.items():
        spans = [(change.start, change.end) for change in found.changes if change.kind == kind]
        for number, (start, end) in enumerate(spans):
            axes.axvspan(start, end, color=colour, alpha=0.25, linewidth=0, label=None if number else kind)
    answered, failed = rows.filter(pl.col("error") == ""), rows.filter(pl.col("error") != "")
    axes.plot(answered["due"], answered["latency"] * 1e3, ".", color=INK, markersize=2, label="request")
    if len(failed):
        axes.plot(failed["due"], failed["latency"] * 1e3, "x", color=VERMILION, label="failed request")
    for name, style in (("steady", "-"), ("swap", "--")):
        p99 = found.latency[name].p99_ms
        axes.axhline(p99, color=BLUE, linestyle=style, linewidth=1, label=f"p99 {name}: {p99:.1f} ms")
    axes.set(yscale="log", ylabel="milliseconds since it was due",
             title=f"{found.sent:,} requests, {found.failed} failed, {found.wrong} wrong")  # fmt: skip
    axes.legend(loc="upper right", ncols=5)


def _memory(axes: "Axes", found: "SwapBench") -> None:
    seconds = [each.seconds for each in found.usage]
    axes.plot(seconds, [each.rss_mib for each in found.usage], color=BLUE, label="tritonserver and its models")
    axes.plot(seconds, [each.ranking_rss_mib for each in found.usage], color=VERMILION, label="ranking alone")
    axes.plot(seconds, [each.server_rss_mib for each in found.usage], color=GREY, label="tritonserver alone")
    axes.set(xlabel="seconds", ylabel="resident MiB", title="Memory, two versions loaded")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")
