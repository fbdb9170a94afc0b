"""The numbers of a table of recipes: one row each, with intervals and what they are better than."""

from typing import Any

from pydantic import BaseModel

from freshrank.bench.paper import lifts
from freshrank.bench.paper.costs import Cost
from freshrank.bench.paper.lifts import Estimate
from freshrank.bench.paper.task import MEASURES
from freshrank.evaluation.results import FRESH, WARM, MetricName

COLUMNS = ("row", "seed", "metric", "slice", "action", "value")
LIFTED = tuple(f"{metric}/{name}" for metric, name in MEASURES)
GAPS = (f"{MetricName.HITS}/{FRESH}", f"{MetricName.MATCHED_HITS}/{FRESH}", f"{MetricName.LOG_LOSS}/{FRESH}")
"""What the cold gap is read on; one figure alone deceives."""
OTHERS = (
    *((metric, name) for metric in (MetricName.PR_AUC, MetricName.ECE) for name in (FRESH, WARM)),
    *((metric, FRESH) for metric in (MetricName.SCORE_GAP_POSITIVE, MetricName.SCORE_GAP_NEGATIVE)),
)


class TableRow(BaseModel):
    """One line of the table. Estimates are keyed ``metric/slice/action``."""

    name: str
    label: str
    settings: dict[str, Any]
    parameters: int
    parameters_percent: float
    cost: Cost | None = None
    boost: float | None = None
    """Mean over seeds of the constant added to fresh logits."""
    values: dict[str, float]
    """Means over seeds."""
    lift: dict[str, Estimate] = {}
    """Relative to the baseline, %."""
    gap: dict[str, Estimate] = {}
    """Share of the baseline's distance to the oracle."""
    others: dict[str, Estimate] = {}
    """PR-AUC, ECE and score gap."""


class PaperTable(BaseModel):
    """All a page and a picture need; kept beside them as JSON."""

    protocol: str
    seeds: int
    actions: list[str]
    judged_rows: int
    lists: int
    days: dict[str, str]
    tuned: str | None
    """Protocol under which the settings were tuned; None: the papers' settings."""
    draws: int = lifts.DRAWS
    confidence: float = lifts.CONFIDENCE
    noise: Cost | None = None
    """The baseline timed against itself."""
    rows: list[TableRow]
    failed: dict[str, str] = {}
    """Rows that are missing, and why."""

    def row(self, name: str) -> TableRow | None:
        return next((row for row in self.rows if row.name == name), None)


def better(key: str) -> int:
    """-1 for a measure that is good when low, else 1."""
    return -1 if key.startswith((MetricName.LOG_LOSS.value, MetricName.ECE.value)) else 1
