"""The table as a forest plot: lifts and gaps closed with their intervals."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freshrank.bench.paper.lifts import Estimate
from freshrank.bench.paper.rows import BASELINE, BOOST, BOOSTED, ORACLE
from freshrank.bench.paper.table import GAPS, PaperTable, TableRow
from freshrank.evaluation.results import ALL, FRESH, MetricName
from freshrank.reports.style import BLUE, GREY, INK, STYLE, VERMILION
from freshrank.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    f"{MetricName.HITS}/{FRESH}": "fresh Hits@3",
    f"{MetricName.MATCHED_HITS}/{FRESH}": "fresh Hits@3\nat equal exposure",
    f"{MetricName.LOG_LOSS}/{FRESH}": "fresh log loss",
    f"{MetricName.HITS}/{ALL}": "all Hits@3",
}
_LIFTED = (f"{MetricName.HITS}/{FRESH}", f"{MetricName.MATCHED_HITS}/{FRESH}", f"{MetricName.HITS}/{ALL}")
_MARKS = (("o", BLUE), ("s", VERMILION), ("^", "#009e73"), ("D", "#cc79a7"))
"""Okabe and Ito's colours by action, with a marker of its own each."""


def write_picture(table: PaperTable, path: Path) -> None:
    """A PNG of two bands: lifts in %, and where there is an oracle the cold gap closed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [row for row in table.rows if row.name not in (BASELINE, ORACLE)]
    if not shown:
        return
    bands = [("lift", _LIFTED)] + ([("gap", GAPS)] if any(row.gap for row in shown) else [])
    with rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(10.5, len(bands) * (1.5 + 0.36 * len(shown))), layout="constrained")
        grid = figure.subplots(len(bands), 3, squeeze=False, sharey=True)
        for axes, (kind, measures) in zip(grid, bands, strict=True):
            for one, measure in zip(axes, measures, strict=True):
                _panel(one, table, shown, kind, measure)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(
            f"Table 1, {table.protocol}: {table.seeds} paired seeds, {table.confidence:.0%} intervals over "
            "seeds and lists; filled: significant after Holm's correction",
            fontsize=9.5,
        )
        figure.savefig(temporary, format="png", dpi=140, metadata={"Software": None})


def _panel(axes: "Axes", table: PaperTable, shown: list[TableRow], kind: str, measure: str) -> None:
    title = TITLES[measure]
    axes.set_title(title)
    axes.axvline(0, color=INK, linewidth=1)
    if kind == "gap":
        axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
    for place, action in enumerate(table.actions):
        marker, colour = _MARKS[place % len(_MARKS)]
        offset = 0.32 * (place - (len(table.actions) - 1) / 2)
        label = action
        for number, row in enumerate(shown):
            estimate: Estimate | None = getattr(row, kind).get(f"{measure}/{action}")
            if estimate is not None:
                tested = row.lift.get(f"{measure}/{action}")
                filled = tested is not None and tested.significant
                _interval(axes, estimate, number + offset, marker, colour, filled, label)
                label = ""
    axes.set_yticks(range(len(shown)), [row.label for row in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("lift over the baseline, %" if kind == "lift" else "cold gap closed (1 = oracle)")
    if not axes.lines[1 + (kind == "gap") :]:
        axes.text(
            0.5,
            0.5,
            "no gap: the oracle is not surely\nbetter than the baseline",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=GREY,
        )
    _within_reach(
        axes,
        [
            e
            for row in shown
            if row.name not in BOOSTED.values() or len(shown) == 1
            for key, e in getattr(row, kind).items()
            if key.startswith(measure + "/")
        ],
    )
    _beyond(axes)
    _separate(axes, shown)


def _beyond(axes: "Axes") -> None:
    """A point that lies outside the panel (the boost may) is written at its edge."""
    low, high = axes.get_xlim()
    for line in list(axes.lines):
        x, y = float(np.ravel(line.get_xdata())[0]), float(np.ravel(line.get_ydata())[0])
        if line.get_marker() != "None" and not low <= x <= high:
            edge, side, text = (high, "right", f"{x:+.3g} ▸") if x > high else (low, "left", f"◂ {x:+.3g}")
            axes.text(
                edge,
                y,
                text,
                ha=side,
                va="center",
                fontsize=7,
                color=line.get_markeredgecolor(),
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )


def _interval(
    axes: "Axes", estimate: Estimate, place: float, marker: str, colour: str, filled: bool, label: str
) -> None:
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [place, place], color=colour, linewidth=1.4)
    style: dict[str, Any] = {"markerfacecolor": colour if filled else "white", "markeredgecolor": colour}
    axes.plot(estimate.value, place, marker, markersize=5, label=label or None, **style)


def _within_reach(axes: "Axes", estimates: list[Estimate]) -> None:
    """An interval many times as wide as the others leaves the panel rather than flatten them."""
    if not estimates:
        return
    values = sorted(abs(e.value) for e in estimates)
    ends = [abs(end) for e in estimates for end in (e.low, e.high) if end is not None]
    reach = max(values[-1] * 1.15, min(max(ends, default=0) * 1.05, 3 * values[-1] + 0.5))
    low = min([0.0, *(max(-reach, e.low if e.low is not None else e.value) for e in estimates)])
    high = max([0.0, *(min(reach, e.high if e.high is not None else e.value) for e in estimates)])
    margin = 0.06 * (high - low or 1)
    axes.set_xlim(low - margin, high + margin)


def _separate(axes: "Axes", shown: list[TableRow]) -> None:
    """A line under the row that learns nothing."""
    if shown[0].name == BOOST and len(shown) > 1:
        axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
