"""Builders of schemas and judged rows for the tests of evaluation, gate and report."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.schema import Schema

Lists = Sequence[Sequence[tuple[float, float, float]]]
"""Per list its rows: (probability, label, age in days)."""
UTILITIES = {"click": 1.0, "save": 2.0}


def schema_of(utilities: dict[str, float] | None = None, fresh_days: float = 7) -> Schema:
    key = {"role": "key"}
    actions = {name: {"role": "action", "utility": u} for name, u in (utilities or UTILITIES).items()}
    return Schema.model_validate(
        {
            "name": "tiny",
            "fresh_days": fresh_days,
            "impressions": {
                "request_id": key,
                "event_timestamp": {"role": "time"},
                "user_id": key,
                "item_id": key,
                **actions,
            },
            "items": {"item_id": key, "created_at": {"role": "time"}},
            "users": {"user_id": key},
        }
    )


def judged_of(lists: Lists) -> JudgedRows:
    """One action, its probability the score."""
    rows = np.array([row for rows in lists for row in rows], np.float64).reshape(-1, 3)
    return JudgedRows(
        probabilities=rows[:, :1],
        score=rows[:, 0],
        labels=rows[:, 1:2],
        list_id=np.repeat(np.arange(len(lists)), [len(rows) for rows in lists]).astype(np.int64),
        age_days=rows[:, 2],
        exposures=np.zeros(len(rows), np.int64),
        item_id=np.arange(len(rows), dtype=np.int64),
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    p: np.ndarray = 1 / (1 + np.exp(-x))
    return p


def logit(p: np.ndarray) -> np.ndarray:
    x: np.ndarray = np.log(p) - np.log1p(-p)
    return x


def with_logits(judged: JudgedRows, logits: np.ndarray, utilities: list[float]) -> JudgedRows:
    """The same rows predicted as sigmoid(logits), [N, A]."""
    probabilities = sigmoid(logits)
    return replace(judged, probabilities=probabilities, score=probabilities @ np.asarray(utilities))


def world(lists: int = 600, candidates: int = 10, seed: int = 0, noise: float = 0.4) -> JudgedRows:
    """Two actions drawn from a known logit; a calibrated, noisy model of it. A quarter of the rows is fresh."""
    rng = np.random.default_rng(seed)
    rows = lists * candidates
    logits = rng.normal(size=(rows, 1)) * 1.2 + np.array([-1.0, -2.5])
    labels = (rng.random((rows, 2)) < sigmoid(logits + noise * rng.normal(size=(rows, 1)))).astype(float)
    fresh = rng.random(rows) < 0.25
    age = np.where(fresh, rng.uniform(0, 7, rows), rng.uniform(7, 60, rows))
    empty = JudgedRows(
        probabilities=np.zeros((rows, 2)),
        score=np.zeros(rows),
        labels=labels,
        list_id=np.repeat(np.arange(lists), candidates).astype(np.int64),
        age_days=age,
        exposures=np.where(fresh, rng.integers(0, 20, rows), rng.integers(20, 5000, rows)).astype(np.int64),
        item_id=rng.integers(0, 500, rows).astype(np.int64),
    )
    return with_logits(empty, logits, list(UTILITIES.values()))


def shuffled(judged: JudgedRows, seed: int) -> JudgedRows:
    order = np.random.default_rng(seed).permutation(len(judged.score))
    return replace(judged, **{name: value[order] for name, value in vars(judged).items()})
