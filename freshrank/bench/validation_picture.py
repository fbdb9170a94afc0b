"""The picture of `freshrank bench validation`: seconds by engine, and what each engine finds."""

from pathlib import Path
from typing import TYPE_CHECKING

from freshrank.figures import BLUE, GREY, INK, STYLE, VERMILION
from freshrank.storage import atomic_write

if TYPE_CHECKING:
    from freshrank.bench.validation import ValidationBench


def write_picture(found: "ValidationBench", path: Path) -> None:
    """A PNG at ``path``: a bar per engine to its median, a dot per run, ours first."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from freshrank.bench.validation import OURS, TARGET_SECONDS

    names = sorted(found.engines, key=lambda name: (name != OURS, found.engines[name].median))
    with rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(10, 1.6 + 0.55 * len(names)), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(names):
            one = found.engines[name]
            axes.barh(place, one.median, color=BLUE if name == OURS else GREY, height=0.6)
            axes.plot(one.seconds, [place] * len(one.seconds), "o", color=INK, markersize=3)
            text = f"{one.median:.1f} s, {one.agreeing}/{found.expectations} verdicts as ours, {one.errors} errors"
            axes.text(max(one.seconds) * 1.02, place, f"  {text}", va="center", fontsize=8)
        axes.axvline(TARGET_SECONDS, color=VERMILION, linestyle="--", linewidth=1, label=f"target {TARGET_SECONDS:g} s")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(right=1.7 * max(max(one.seconds) for one in found.engines.values()))
        axes.set_xlabel("seconds, loading included")
        axes.set_title(f"{found.plan.rows:,} rows, {found.expectations} expectations of {len(found.tables)} tables")
        axes.legend(loc="lower right")
        figure.savefig(temporary, format="png", dpi=130)
