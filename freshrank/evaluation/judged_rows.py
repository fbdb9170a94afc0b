"""One model's predictions on the evaluation rows, cut into slices."""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from freshrank.config import EvaluationConfig, age_names, exposure_names
from freshrank.errors import DataError
from freshrank.evaluation import metrics
from freshrank.evaluation.metrics import Bools, Floats, Ints
from freshrank.evaluation.results import ALL, FRESH, WARM
from freshrank.schema import Schema


@dataclass(frozen=True)
class JudgedRows:
    """One model's predictions on the evaluation rows, with the observed labels."""

    probabilities: Floats
    """[N, A], actions in schema order."""
    score: Floats
    """[N], the utility-weighted sum of the probabilities (eq. 12); what lists are ranked by."""
    labels: Floats
    """[N, A] of 0, 1, NaN = not observed."""
    list_id: Ints
    age_days: Floats
    exposures: Ints
    """Impressions of the item before this row's day."""
    item_id: Ints

    def __post_init__(self) -> None:
        for field in fields(self):
            shape = getattr(self, field.name).shape
            expected = self.labels.shape if field.name in ("probabilities", "labels") else self.labels.shape[:1]
            if shape != expected or self.labels.ndim != 2:
                raise DataError(
                    f"Judged.{field.name}: received shape {shape}, expected {expected or '[N, A]'}; "
                    "all arrays hold the same rows in the same order"
                )
        strange = self.labels[~np.isin(self.labels, (0, 1)) & ~np.isnan(self.labels)]
        if len(strange):
            raise DataError(f"Judged.labels: received {strange[0]}, expected 0, 1 or NaN (not observed)")
        if not np.isfinite(self.age_days).all():
            raise DataError("Judged.age_days: received a value that is not finite; give every item a created_at")

    @property
    def invalid(self) -> str | None:
        """Why nothing can be judged: scores that are not finite, probabilities outside [0, 1], or no row at all."""
        if not len(self.score):
            return "there is no row to judge"
        bad = ~((self.probabilities >= 0) & (self.probabilities <= 1)).all(axis=1) | ~np.isfinite(self.score)
        return f"{bad.sum():,} of {len(bad):,} predictions are not finite probabilities" if bad.any() else None


def slices(age_days: Floats, exposures: Ints, fresh_days: float, config: EvaluationConfig) -> dict[str, Bools]:
    """Name -> row mask [N]; age buckets hold their lower end, exposure buckets their upper end."""
    named = {ALL: np.ones(len(age_days), np.bool_), FRESH: age_days < fresh_days, WARM: age_days >= fresh_days}
    age_of = np.searchsorted(config.age_buckets, age_days, side="right")
    for bucket, name in enumerate(age_names(config.age_buckets)):
        named[f"age:{name}"] = age_of == bucket
    exposed = np.searchsorted(config.exposure_buckets, exposures, side="left")
    for bucket, name in enumerate(exposure_names(config.exposure_buckets)):
        named[f"exposures:{name}"] = exposed == bucket
    return named


@dataclass(frozen=True)
class SlicedRows:
    """One model's rows by slice, with the lists long enough to be ranked; arrays named ``listed_*`` hold only their
    E rows.
    """

    judged: JudgedRows
    schema: Schema
    config: EvaluationConfig

    @cached_property
    def utilities(self) -> NDArray[np.float64]:
        return np.asarray(self.schema.utilities, np.float64)

    @cached_property
    def slices(self) -> dict[str, Bools]:
        return slices(self.judged.age_days, self.judged.exposures, self.schema.fresh_days, self.config)

    @cached_property
    def buckets(self) -> list[str]:
        """Names of the slices by age and by exposures."""
        return [name for name in self.slices if name not in (ALL, FRESH, WARM)]

    @cached_property
    def items(self) -> Ints:
        """[N] dense item numbers."""
        return np.unique(self.judged.item_id, return_inverse=True)[1].astype(np.int64)

    @cached_property
    def listed(self) -> Bools:
        _, inverse, counts = np.unique(self.judged.list_id, return_inverse=True, return_counts=True)
        long_enough: Bools = counts[inverse] >= self.config.min_candidates
        return long_enough

    @cached_property
    def lists(self) -> Ints:
        return np.unique(self.judged.list_id[self.listed], return_inverse=True)[1].astype(np.int64)

    @cached_property
    def list_count(self) -> int:
        return int(self.lists.max(initial=-1)) + 1

    @cached_property
    def ties(self) -> NDArray[np.uint64]:
        columns = (self.judged.list_id, self.judged.item_id, self.judged.age_days.astype(np.float64))
        return metrics.tie_key(self.config.seed, *(column[self.listed] for column in columns))

    @cached_property
    def rank(self) -> Ints:
        return metrics.ranks(self.judged.score[self.listed], self.lists, self.ties)

    @cached_property
    def listed_fresh(self) -> Bools:
        return self.slices[FRESH][self.listed]

    @cached_property
    def fresh_share(self) -> float | None:
        return float(self.listed_fresh.mean()) if self.list_count else None

    def positive(self, name: str, action: int) -> Bools:
        """[E] rows of the slice with the action."""
        with_action: Bools = self.judged.labels[self.listed, action] == 1
        return with_action & self.slices[name][self.listed]

    def hits(self, name: str, rank: Ints) -> tuple[Bools, Bools]:
        """([L, A], [L, A]): the list holds a row of the slice with the action; has one among its first k."""
        columns = [
            metrics.list_hits(self.positive(name, action), rank, self.lists, self.list_count, self.config.k)
            for action in range(len(self.utilities))
        ]
        return np.stack([holds for holds, _ in columns], axis=1), np.stack([hit for _, hit in columns], axis=1)

    def matched(self, share: float) -> tuple[Ints, float] | str:
        """Ranks and shift at equal exposure, or why they cannot be had."""
        if not 0 < (self.fresh_share or 0) < 1:
            return "the lists hold only fresh or only warm candidates"
        if not np.allclose(self.judged.score, self.judged.probabilities @ self.utilities, rtol=1e-3, atol=1e-4):
            return "the score is not the utility-weighted sum of the probabilities, so logits cannot be shifted"
        return metrics.matched_ranks(
            self.judged.probabilities[self.listed],
            self.utilities,
            self.listed_fresh,
            self.lists,
            self.ties,
            self.config.k,
            share,
        )
