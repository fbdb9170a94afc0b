"""The figures as PNG, each drawn from its table alone: baseline grey and dashed, the technique blue and solid."""

from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from freshrank.evaluation.results import ALL
from freshrank.reports.style import BLUE, GREY, INK, STYLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Paint = Callable[[list["Axes"], pl.DataFrame], None]
DPI = 150
LINES: dict[str, dict[str, Any]] = {
    "baseline": {"color": GREY, "linestyle": "--", "label": "baseline"},
    "residual": {"color": BLUE, "linestyle": "-", "label": "Residual"},
    "score_reg": {"color": BLUE, "linestyle": "-", "label": "ScoreReg"},
    "mixup": {"color": BLUE, "linestyle": "-", "label": "Mixup"},
}
_SHOWN_FEATURES = 14
_SHOWN_COMPONENTS = 20
_INTERVALS = "mean and 95% interval over seeds"


def png(name: str, table: pl.DataFrame) -> bytes:
    """Figure ``name`` (``2a`` .. ``7b``) of its table, 150 dpi."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns, size, paint = _FIGURES[name]
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(list(figure.subplots(1, columns, squeeze=False).flat), table)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _errors(table: pl.DataFrame, scale: float = 1) -> np.ndarray:
    """[2, rows] distances from the mean down and up; 0 without an interval (one seed)."""
    mean = table["mean"].to_numpy()
    ends = [table[end].fill_null(table["mean"]).to_numpy() for end in ("low", "high")]
    distances: np.ndarray = scale * np.abs(np.stack([mean - ends[0], ends[1] - mean]))
    return distances


def _bars(axes: "Axes", table: pl.DataFrame, offset: float, width: float, scale: float, **style: Any) -> None:
    places = np.arange(len(table)) + offset
    axes.bar(
        places,
        scale * table["mean"].to_numpy(),
        width,
        yerr=_errors(table, scale),
        capsize=3,
        error_kw={"ecolor": INK, "elinewidth": 1},
        **style,
    )


def _band(axes: "Axes", x: str, table: pl.DataFrame, scale: float = 1, **style: Any) -> None:
    at, mean = table[x].to_numpy(), table["mean"].to_numpy()
    axes.plot(at, scale * mean, linewidth=1.6, **style)
    down, up = _errors(table, scale)
    axes.fill_between(at, scale * mean - down, scale * mean + up, color=style["color"], alpha=0.22, linewidth=0)


def _known(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("mean").is_not_null())


def _figure_2a(axes: list["Axes"], table: pl.DataFrame) -> None:
    cells = table.select("slice", "action").unique(maintain_order=True)
    labels = [f"{action}\n{slice} items" for slice, action in cells.rows()]
    sides = (("historical removed", VERMILION, ""), ("non_historical removed", BLUE, "///"))
    for number, (quantity, colour, hatch) in enumerate(sides):
        part = cells.join(table.filter(pl.col("quantity") == quantity), on=["slice", "action"], maintain_order="left")
        label = quantity.replace("_", "-")
        _bars(axes[0], part, 0.38 * number - 0.19, 0.36, 1, color=colour, hatch=hatch, edgecolor="white", label=label)
    ratio = cells.join(table.filter(pl.col("quantity") == "ratio"), on=["slice", "action"], maintain_order="left")
    _bars(axes[1], ratio, 0, 0.5, 100, color=GREY)
    axes[1].axhline(100, color=INK, linewidth=1, linestyle=":")
    axes[0].axhline(0, color=INK, linewidth=1)
    axes[0].set_ylabel("Δ PR-AUC (after minus before)")
    axes[1].set_ylabel("Δ non-historical / Δ historical, %")
    axes[0].legend()
    axes[0].set_title("PR-AUC lost")
    axes[1].set_title("ratio (dotted: 100%)")
    for one in axes:
        one.set_xticks(range(len(labels)), labels, fontsize=8)


def _gradient_ratio(axes: list["Axes"], table: pl.DataFrame) -> None:
    ratio = table.filter(pl.col("quantity") == "ratio")
    for recipe in ratio["recipe"].unique(maintain_order=True):
        _band(axes[0], "step", ratio.filter(pl.col("recipe") == recipe), **LINES[recipe])
    axes[0].axhline(1, color=INK, linewidth=1, linestyle=":")
    axes[0].set_ylim(bottom=0)
    axes[0].set_xlabel("training step")
    axes[0].set_ylabel(r"$\|\partial L/\partial x_{nh}\|\;/\;\|\partial L/\partial x_h\|$")
    axes[0].set_title(f"non-historical to historical gradient norm ({_INTERVALS})", fontsize=9)
    axes[0].legend()


def _figure_2c(axes: list["Axes"], table: pl.DataFrame) -> None:
    for one, action in zip(axes, table["action"].unique(maintain_order=True), strict=False):
        groups = [(label, items) for label in (1, 0) for items in ("warm", "cold")]
        names = []
        for place, (label, items) in enumerate(groups):
            part = table.filter(action=action, label=label, items=items)
            names.append(f"{items}\n{'positive' if label else 'negative'}")
            if len(part):
                _scores(one, place, part, BLUE if items == "warm" else VERMILION)
        one.set_xticks(range(len(groups)), names, fontsize=8)
        one.set_title(action)
        one.set_xlim(-0.5, len(groups) - 0.1)
        one.set_ylim(0, 1)
        one.set_xlabel("box: middle half, line: 5-95%, dot: mean with 95% interval over seeds", fontsize=7.5)
    axes[0].set_ylabel("predicted probability")


def _scores(axes: "Axes", place: int, part: pl.DataFrame, colour: str) -> None:
    at = {row["quantity"]: row["mean"] for row in part.iter_rows(named=True)}
    axes.plot([place, place], [at["q05"], at["q95"]], color=colour, linewidth=1.2)
    axes.plot([place, place], [at["q25"], at["q75"]], color=colour, linewidth=9, alpha=0.45, solid_capstyle="butt")
    axes.plot(place, at["q50"], "_", color=colour, markersize=16, markeredgewidth=1.6)
    mean = part.filter(quantity="mean")
    axes.errorbar(
        place + 0.22, at["mean"], yerr=_errors(mean), fmt="o", color=INK, markersize=3.5, capsize=3, elinewidth=1
    )
    axes.text(place + 0.29, at["mean"], f"{at['mean']:.3f}", fontsize=7.5, va="center")


def _figure_6a(axes: list["Axes"], table: pl.DataFrame) -> None:
    first = table["action"][0]
    chosen = _known(table.filter(slice=ALL, action=first))
    for recipe in ("baseline", "residual"):
        for group, linestyle in (("non_historical", "-"), ("historical", ":")):
            part = chosen.filter(recipe=recipe, group=group).sort("mean")
            share = 100 * np.arange(1, len(part) + 1) / max(1, len(part))
            label = f"{LINES[recipe]['label']}, {group.replace('_', '-')}"
            axes[0].step(
                part["mean"].to_numpy(),
                share,
                where="post",
                color=LINES[recipe]["color"],
                linestyle=linestyle,
                linewidth=1.5,
                label=label,
            )
    axes[0].set_xscale("symlog", linthresh=1e-3)
    axes[0].set_xlabel(f"Δ PR-AUC ({first}) without one feature")
    axes[0].set_ylabel("features with at most this Δ, %")
    axes[0].set_title("distribution over single features (means over seeds)", fontsize=9)
    axes[0].legend(fontsize=7.5, loc="upper left")
    _strongest(axes[1], chosen.filter(group="non_historical"))


def _strongest(axes: "Axes", table: pl.DataFrame) -> None:
    order = table.group_by("feature").agg(pl.col("mean").min()).sort("mean").head(_SHOWN_FEATURES)
    places = {name: -number for number, name in enumerate(order["feature"])}
    for recipe, marker, shift in (("baseline", "s", 0.16), ("residual", "o", -0.16)):
        part = table.filter(pl.col("recipe") == recipe, pl.col("feature").is_in(order["feature"].implode()))
        at = [places[name] + shift for name in part["feature"]]
        axes.errorbar(
            part["mean"].to_numpy(),
            at,
            xerr=_errors(part),
            fmt=marker,
            color=LINES[recipe]["color"],
            markersize=4,
            capsize=2,
            elinewidth=1,
            label=LINES[recipe]["label"],
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(list(places.values()), list(places), fontsize=7.5)
    axes.set_xscale("symlog", linthresh=3e-4)
    axes.set_xlabel("Δ PR-AUC (left: more important)")
    axes.set_title("strongest non-historical features (95% intervals)", fontsize=9)
    axes.legend(loc="lower left")


def _figure_6c(axes: list["Axes"], table: pl.DataFrame) -> None:
    cells = table.select("action", "label").unique(maintain_order=True)
    for recipe, offset, style in (
        ("baseline", -0.19, {"color": "#c9c9c9", "edgecolor": GREY, "hatch": "///"}),
        ("score_reg", 0.19, {"color": BLUE}),
    ):
        part = cells.join(table.filter(recipe=recipe), on=["action", "label"], maintain_order="left")
        _bars(axes[0], part, offset, 0.36, 100, label=LINES[recipe]["label"], **style)
    axes[0].axhline(0, color=INK, linewidth=1)
    names = [f"{action}\n{'positives' if label else 'negatives'}" for action, label in cells.rows()]
    axes[0].set_xticks(range(len(names)), names)
    axes[0].set_ylabel("score gap, % of the warm mean")
    axes[0].set_title(f"above 0: cold items are scored lower ({_INTERVALS})", fontsize=9)
    axes[0].legend()


def _variance(log: bool) -> Paint:
    def paint(axes: list["Axes"], table: pl.DataFrame) -> None:
        shown = table.filter(pl.col("component") <= _SHOWN_COMPONENTS)
        for one, slice in zip(axes, ("all", "fresh"), strict=True):
            for recipe in ("baseline", "mixup"):
                part = shown.filter(recipe=recipe, slice=slice)
                if len(part):
                    _band(one, "component", part, 100, **LINES[recipe])
            one.set_title(f"{slice} items")
            one.set_xlabel("principal component of z" if log else "leading components of z")
            one.set_xticks(range(0, _SHOWN_COMPONENTS + 1, 5))
            if log:
                # Intervals of tiny shares reach 0, which a log axis cannot show: they run out of the picture instead.
                one.set_yscale("log")
                one.set_ylim(bottom=50 * float(shown["mean"].to_numpy().clip(min=1e-7).min()), top=130)
        axes[0].set_ylabel("explained variance, %" if log else "cumulative explained variance, %")
        axes[0].legend()

    return paint


_FIGURES: dict[str, tuple[int, tuple[float, float], Paint]] = {
    "2a": (2, (8.6, 3.2), _figure_2a),
    "2b": (1, (6.4, 3.0), _gradient_ratio),
    "2c": (2, (8.6, 3.2), _figure_2c),
    "6a": (2, (9.2, 3.8), _figure_6a),
    "6b": (1, (6.4, 3.0), _gradient_ratio),
    "6c": (1, (6.4, 3.2), _figure_6c),
    "7a": (2, (8.6, 3.0), _variance(log=True)),
    "7b": (2, (8.6, 3.0), _variance(log=False)),
}
