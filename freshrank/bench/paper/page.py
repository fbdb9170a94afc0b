"""`docs/evidence.md`: written whole from the tables that are there; every sentence in it follows from a number."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from freshrank.bench.paper.lifts import Estimate
from freshrank.bench.paper.rows import BASELINE, BOOST, BOOSTED, ORACLE
from freshrank.bench.paper.table import GAPS, PaperTable, TableRow, better
from freshrank.datasets.kuairand import PROTOCOLS
from freshrank.evaluation.results import ALL, FRESH, WARM, MetricName
from freshrank.storage.files import read_json, write_text

FINDINGS, FIGURES = "findings.md", "figures.md"
NAMES = {
    f"{MetricName.HITS}/{FRESH}": "fresh Hits@3",
    f"{MetricName.MATCHED_HITS}/{FRESH}": "fresh Hits@3 at equal exposure",
    f"{MetricName.LOG_LOSS}/{FRESH}": "fresh log loss",
    f"{MetricName.LOG_LOSS}/{WARM}": "warm log loss",
    f"{MetricName.HITS}/{ALL}": "all Hits@3",
}
_LIFTS = (
    f"{MetricName.HITS}/{FRESH}",
    f"{MetricName.HITS}/{ALL}",
    f"{MetricName.MATCHED_HITS}/{FRESH}",
    f"{MetricName.LOG_LOSS}/{FRESH}",
)
_HEAD = """# Evidence

Written by `freshrank bench table1`; do not edit. What people concluded stands in `{folder}/findings.md`, which is
copied to the end of this page. Seed-level numbers: `{folder}/table1-PROTOCOL.csv`.
"""
_DEFINITIONS = """## What the numbers mean

- **Lift**: difference to the baseline in % of the baseline's value, mean over seeds, with a {confidence:.0%} interval.
  Rows are paired: the same seeds, the same evaluation rows. The interval comes from {draws:,} bootstrap draws of seeds
  and of lists together, the same lists for both models. **Bold**: p < 0.05 after Holm's correction for the number of
  rows, column by column (p from the bootstrap's standard error and Student's t with seeds - 1 degrees of freedom).
- **Hits@3** of an action on fresh items: over the lists of at least 4 candidates that hold a fresh item with that
  action, the share that have such an item among their top 3. On all items: likewise without "fresh". A list is
  what one user saw on the evaluation days, unless said otherwise.
- **At equal exposure**: one constant on all fresh logits gives fresh items the share of top-3 slots that they have of
  the candidates; only telling fresh items apart is left.
- **Cold gap closed**: (row - baseline) / (oracle - baseline); the oracle is the baseline trained where nothing was
  dropped, judged on the same rows. 1 means that new items are ranked as well as if they were old. No value: the
  oracle is not surely better than the baseline, so there is no gap to close on that figure.
- **Constant boost** learns nothing: one constant is added to all fresh logits of the baseline, the one with the highest
  fresh Hits@3 on the calibration days that costs at most 0.5% of overall Hits@3 there; 0 where those days show no
  fresh item.
- **Cost**: parameters exactly; training as CPU time over the same rows, baseline and row in turn in one process;
  latency as the exported ONNX model answering one user with 500 candidates, likewise in turn. Both are ratios of
  medians.
- **PR-AUC, ECE, score gap**: means over seeds; bold by a paired t-test over seeds, so for these very evaluation rows.
  The score gap is (mean warm - mean fresh prediction) / mean warm, among rows with or without the action.
"""


def write_page(folder: Path) -> Path:
    """``<folder>.md`` from every ``table1-PROTOCOL.json`` in ``folder``; findings.md follows as it is."""
    paths = {path.stem.removeprefix("table1-"): path for path in folder.glob("table1-*.json")}
    ordered = sorted(paths, key=lambda name: (_order(name), name))
    tables = [PaperTable.model_validate(read_json(paths[name])) for name in ordered]
    parts = [_HEAD.format(folder=folder.name)]
    if (folder / FIGURES).exists():
        parts.append(f"The paper's figures on the same ranker: [figures]({folder.name}/{FIGURES}).\n")
    parts += [_section(table, folder.name) for table in tables]
    if tables:
        parts.append(_DEFINITIONS.format(confidence=tables[0].confidence, draws=tables[0].draws))
    if (folder / FINDINGS).exists():
        parts.append((folder / FINDINGS).read_text())
    page = folder.with_suffix(".md")
    write_text(page, "\n".join(parts))
    return page


def _order(protocol: str) -> int:
    """The main protocol first, then the others as the importer lists them."""
    names = ("sparse", *PROTOCOLS)
    return names.index(protocol) if protocol in names else len(names)


def _section(table: PaperTable, folder: str) -> str:
    tuned = f"settings tuned under `{table.tuned}` (`freshrank bench tune`)"
    settings = tuned if table.tuned else "the papers' settings"
    days = table.days
    return "\n".join(
        [
            f"## Protocol {table.protocol}\n",
            f"{table.seeds} seeds, {settings}. Trained on {days['train']}, calibrated on {days['calibration']}, judged "
            f"on {days['evaluation']}: {table.judged_rows:,} impressions, {table.lists:,} lists with an action.\n",
            "Rows by the name that `--rows` takes: "
            + ", ".join(f"{row.label} = `{row.name}`" for row in table.rows)
            + ".\n",
            f"![Lifts and cold gap closed, with intervals]({folder}/table1-{table.protocol}.png)\n",
            *_failures(table),
            *(_lifts(table, action) for action in table.actions),
            *([_gaps(table)] if any(row.gap for row in table.rows) else []),
            _costs(table),
            _levels(table),
            *(_others(table, action) for action in table.actions),
            "### Reading\n",
            *(f"- {sentence}" for sentence in reading(table)),
            "",
        ]
    )


def _failures(table: PaperTable) -> list[str]:
    return [f"**Missing**: {name}, {why}.\n" for name, why in table.failed.items()]


def _table(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    ruled = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in lines)]
    return "\n".join([f"### {title}\n", *ruled, ""])


def percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def shown(estimate: Estimate | None, form: Callable[[float], str]) -> str:
    """Value and interval; bold where significant."""
    if estimate is None:
        return "–"
    value = f"**{form(estimate.value)}**" if estimate.significant else form(estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({form(estimate.low)} to {form(estimate.high)})"


def _compared(table: PaperTable) -> list[TableRow]:
    return [row for row in table.rows if row.name != BASELINE]


def _lifts(table: PaperTable, action: str) -> str:
    head = ["model", *(f"{NAMES[key]}, %" for key in _LIFTS)]
    lines = [
        [row.label, *(shown(row.lift.get(f"{key}/{action}"), percent) for key in _LIFTS)] for row in _compared(table)
    ]
    return _table(f"Lift over the baseline, {action}", head, lines)


def _gaps(table: PaperTable) -> str:
    columns = [(key, action) for action in table.actions for key in GAPS]
    head = ["model", *(f"{action}: {NAMES[key]}" for key, action in columns)]
    lines = [
        [row.label, *(shown(row.gap.get(f"{key}/{action}"), percent) for key, action in columns)]
        for row in _compared(table)
        if row.name != ORACLE
    ]
    return _table("Cold gap closed (1 = as if the items were old)", head, lines)


def _costs(table: PaperTable) -> str:
    lines = [
        [
            row.label,
            f"{row.parameters:,}",
            percent(row.parameters_percent),
            percent(row.cost.training, 1) if row.cost else "–",
            percent(row.cost.latency, 1) if row.cost else "–",
        ]
        for row in table.rows
        if row.name not in (*BOOSTED.values(), ORACLE)
    ]
    text = _table("Cost", ["model", "parameters", "parameters, %", "training time, %", "served latency, %"], lines)
    if table.noise is None:
        return text
    return (
        text + "\nThe baseline's line is the baseline measured against itself: how far a measurement can be trusted.\n"
    )


def _levels(table: PaperTable) -> str:
    columns = [(key, action) for action in table.actions for key in NAMES]
    head = ["model", "fresh share of top 3", *(f"{action}: {NAMES[key]}" for key, action in columns)]
    lines = [
        [
            row.label + (f" ({row.boost:+.2f})" if row.boost is not None else ""),
            *(_level(row.values.get(key)) for key in ("fresh_share", *(f"{k}/{a}" for k, a in columns))),
        ]
        for row in table.rows
    ]
    return _table("Levels (means over seeds)", head, lines)


def _level(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _others(table: PaperTable, action: str) -> str:
    columns = {
        f"{MetricName.PR_AUC}/{FRESH}": "PR-AUC fresh",
        f"{MetricName.PR_AUC}/{WARM}": "PR-AUC warm",
        f"{MetricName.ECE}/{FRESH}": "ECE fresh",
        f"{MetricName.ECE}/{WARM}": "ECE warm",
        f"{MetricName.SCORE_GAP_POSITIVE}/{FRESH}": "score gap, positives",
        f"{MetricName.SCORE_GAP_NEGATIVE}/{FRESH}": "score gap, negatives",
    }
    lines = [[row.label, *(_other(row.others.get(f"{key}/{action}")) for key in columns)] for row in table.rows]
    return _table(f"Ranking within classes, calibration and score gap, {action}", ["model", *columns.values()], lines)


def _other(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    half = "" if estimate.high is None else f" ± {estimate.high - estimate.value:.3f}"
    value = f"{estimate.value:.3f}".replace("-", "−")
    return (f"**{value}**" if estimate.significant else value) + half


# ---------------------------------------------------------------- sentences


def reading(table: PaperTable) -> list[str]:
    """What the table says, by significance after correction; nothing that is not in it."""
    tested = [row for row in table.rows if row.name not in (BASELINE, ORACLE)]
    if table.seeds < 2:
        return ["One seed proves nothing: no significance is given."]
    return [*_by_measure(table, tested), *_on_the_gap(table, tested), *_on_the_boost(table)]


def _by_measure(table: PaperTable, tested: list[TableRow]) -> Iterable[str]:
    for key in _LIFTS:
        for action in table.actions:
            good, bad = _significant(tested, f"{key}/{action}")
            neutral = len(tested) - len(good) - len(bad)
            parts = [
                f"significantly {word}: {', '.join(names)}"
                for word, names in (("better", good), ("worse", bad))
                if names
            ]
            rest = f"{neutral} of {len(tested)} rows cannot be told from the baseline"
            yield f"{NAMES[key]}, {action}: {'; '.join([*parts, rest])}."


def _significant(tested: list[TableRow], key: str) -> tuple[list[str], list[str]]:
    lifts = [(row, row.lift.get(key)) for row in tested]
    sure = [(row, better(key) * e.value > 0) for row, e in lifts if e is not None and e.significant]
    return [row.label for row, good in sure if good], [row.label for row, good in sure if not good]


def _on_the_gap(table: PaperTable, tested: list[TableRow]) -> Iterable[str]:
    for key in GAPS:
        for action in table.actions:
            gaps = [(row, row.gap.get(f"{key}/{action}")) for row in tested]
            known = [(row, e) for row, e in gaps if e is not None]
            if known:
                best, e = max(known, key=lambda pair: pair[1].value)
                yield (
                    f"Cold gap on {NAMES[key]}, {action}: most is closed by {best.label}, "
                    f"{shown(e, percent)} of the distance to the oracle."
                )


def _on_the_boost(table: PaperTable) -> Iterable[str]:
    row = table.row(BOOST)
    if row is None:
        return
    for action in table.actions:
        keys = [f"{metric}/{FRESH}/{action}" for metric in (MetricName.HITS, MetricName.MATCHED_HITS)]
        raw, matched = (row.lift.get(key) for key in keys)
        if raw and matched:
            yield (
                f"A constant of {row.boost:+.2f} on all fresh logits, which learns nothing, changes fresh Hits@3 on "
                f"{action} by {percent(raw.value)}% and, at equal exposure, by {percent(matched.value)}%."
            )
