"""What `ranking` counts, beside Triton's own metrics and on the same port.

All are counters, so that a rate or a ratio over any window is one line of PromQL (docs/serving.md). The classes know
nothing of Triton: whoever uses them says how a family of counters is made.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from freshrank.features.encoder import Encoder
from freshrank.features.vocabulary import MISSING
from freshrank.schema import SEQUENCE_ITEMS, Entity, Feature, Kind
from freshrank.serving.ranking.ranked import Ranked

DEFAULTS_EVERY = 8
"""Defaults are counted in one answered request of so many, and weighed accordingly."""
KEPT_VERSIONS = 8
"""Counters of earlier versions are dropped."""
KINDS = ("warm", "cold", "unknown")


class Family(Protocol):
    """A family of counters, such as ``pb_utils.MetricFamily``."""

    def Metric(self, labels: dict[str, str]) -> Any:
        """A counter with ``increment(amount)``."""


class MakeFamily(Protocol):
    """Makes a family of counters."""

    def __call__(self, name: str, description: str) -> Family: ...


FAMILIES = {
    "requests_total": "Requests by outcome (ok, degraded, refused, unpublished, failed) and by the version that "
    "answered, 0 where none did",
    "arm_requests_total": "Answered requests by experiment and arm; 0 is the champion",
    "candidates_total": "Ranked candidates by kind (warm, cold, unknown) and version",
    "probability_sum": "Sum of probabilities by action, kind and version; over candidates_total it is their mean, and "
    "warm less cold is the gap",
    "defaults_total": "Values of a feature that were missing, by feature and arm; counted in one request of "
    f"{DEFAULTS_EVERY} and weighed accordingly. Numeric features with a declared default are not "
    "counted: a missing value and a value equal to it look alike",
    "values_total": "Values of a feature that were asked for, as defaults_total counts them",
    "stage_seconds_total": "Time spent by stage (features, encode, ranker, shadow) and version",
    "shadow_batches_total": "Batches of requests that a shadow scored, or failed to, by version and outcome",
    "fallbacks_total": "Batches that a challenger could not answer, by its version; the champion did",
    "pointer_failures_total": "Batches of requests answered by what the pointer said last, as it could not be read",
    "log_requests_total": "Requests that the request log kept or had to drop",
}
"""Name and description of each; the names are prefixed with ``freshrank_ranking_``."""


@dataclass(frozen=True)
class _Counted:
    """Features of one block of the ranker's inputs, by column."""

    block: str
    columns: list[tuple[str, slice]]


class RankingMetrics:
    """Counters by name and labels; a labelled counter is made when it first counts."""

    def __init__(self, make_family: MakeFamily) -> None:
        self._families = {name: make_family(f"freshrank_ranking_{name}", text) for name, text in FAMILIES.items()}
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._answered: Counter[int] = Counter()
        self._counted: dict[int, list[_Counted]] = {}

    def add(self, name: str, amount: float, **labels: object) -> None:
        """Count ``amount`` on the counter of those labels."""
        key = name, tuple((label, str(value)) for label, value in labels.items())
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels=dict(key[1]))
        self._metrics[key].increment(amount)

    def refused(self, outcome: str) -> None:
        """A request that was not answered."""
        self.add("requests_total", 1, outcome=outcome, version=0)

    def stages(self, version: int, seconds: Mapping[str, float]) -> None:
        """Where the time of a batch went."""
        for stage, taken in seconds.items():
            self.add("stage_seconds_total", taken, stage=stage, version=version)

    def answered(self, ranked: Ranked, encoder: Encoder) -> None:
        """A request that was, by a version with ``encoder``."""
        version = int(ranked.answer["model_version"][0])
        if version not in self._counted:
            self._counted[version] = counted(encoder)
            self._retire(list(self._counted)[:-KEPT_VERSIONS])
        outcome = "degraded" if ranked.answer["degraded"][0] else "ok"
        self.add("requests_total", 1, outcome=outcome, version=version)
        if ranked.experiment:
            self.add("arm_requests_total", 1, experiment=ranked.experiment, arm=int(ranked.answer["arm"][0]))
        self._candidates(version, ranked, encoder.schema.actions)
        self._answered[version] += 1
        if self._answered[version] % DEFAULTS_EVERY == 1:
            self._defaults(version, ranked)

    def _retire(self, versions: list[int]) -> None:
        """Drop the counters of versions that answered long ago: a new one comes every day."""
        gone = {("version", str(version)) for version in versions}
        self._metrics = {key: metric for key, metric in self._metrics.items() if gone.isdisjoint(key[1])}
        for version in versions:
            del self._counted[version], self._answered[version]

    def _candidates(self, version: int, ranked: Ranked, actions: list[str]) -> None:
        kinds = np.where(ranked.answer["known"], ranked.answer["cold"].astype(np.int64), 2)
        one_hot = (kinds[None, :] == np.arange(len(KINDS))[:, None]).astype(np.float32)
        numbers, sums = one_hot.sum(axis=1).tolist(), (one_hot @ ranked.answer["probabilities"]).tolist()
        for kind, number, totals in zip(KINDS, numbers, sums, strict=True):
            if number:
                self.add("candidates_total", number, kind=kind, version=version)
                for action, total in zip(actions, totals, strict=True):
                    self.add("probability_sum", total, action=action, kind=kind, version=version)

    def _defaults(self, version: int, ranked: Ranked) -> None:
        # By arm, not by version: these are hundreds of counters, and Triton keeps something of each that ever was.
        arm = int(ranked.answer["arm"][0])
        for each in self._counted[version]:
            block = ranked.inputs[each.block]
            missing = np.isnan(block) if block.dtype.kind == "f" else block == MISSING
            for feature, place in each.columns:
                number = int(missing[:, place].all(axis=1).sum())
                self.add("values_total", DEFAULTS_EVERY * len(block), feature=feature, arm=arm)
                self.add("defaults_total", DEFAULTS_EVERY * number, feature=feature, arm=arm)


def counted(encoder: Encoder) -> list[_Counted]:
    """The features whose missing values can be told from the ranker's inputs: those without a declared number."""
    families = []
    for entity in (Entity.USER, Entity.ITEM, Entity.ROW):
        blocks = {
            "categorical": (encoder.categorical(entity), False),
            "numeric": (encoder.numeric(entity), False),
            "multi": (encoder.multi_valued(entity), True),
            "embedding": (encoder.embedding(entity), True),
        }
        families += [
            _Counted(f"{entity}_{name}", _columns(features, wide)) for name, (features, wide) in blocks.items()
        ]
    length = encoder.schema.history.sequence_length
    families.append(_Counted("sequence_actions", [(SEQUENCE_ITEMS, slice(0, length))]))
    return [each for each in families if each.columns]


def _columns(features: list[Feature], wide: bool) -> list[tuple[str, slice]]:
    places, start = [], 0
    for feature in features:
        end = start + (feature.dim if wide else 1)
        if feature.default is None or feature.kind is not Kind.NUMERIC:
            places.append((feature.name, slice(start, end)))
        start = end
    return places
