"""Exposure parity: fresh items get the share of the top slots that they have of the candidates.

A calibrated ranker shows items it knows little of less often than their share, because its predictions for them lie
closer to the mean. One constant on the logits of all fresh items sets that right. It is found without a single label:
only scores say who is on top. A log under-represents fresh items (that is the problem), so they are put among the
candidates of real lists of the calibration days, with the features they had on that day.

The constant is bounded: where the warm items of a log are the chosen few, parity would ask for far more than what
fresh items are worth (1.3 logits in the simulated world), and calibration would pay for it.
"""

import logging

import numpy as np
import polars as pl
from scipy.special import expit

from freshrank.config import CalibrationConfig
from freshrank.evaluation import metrics
from freshrank.evaluation.metrics import Bools, Floats, Ints
from freshrank.export.calibration import Platt
from freshrank.features.daily_aggregates import DAY
from freshrank.features.encoder import Catalog
from freshrank.features.frames import EXPOSURES, ITEM_ROW, JUDGED_AGE, USER_ROW, Frame
from freshrank.schema import ITEM_AGE, ITEM_ID, Schema
from freshrank.training.batches import TensorFrame
from freshrank.training.trained import Trained, predict_encoded

log = logging.getLogger(__name__)
SHARE = 0.2
"""Of the candidates that are fresh; the shift hardly depends on it."""
_OF_THE_ITEM = [ITEM_ROW, ITEM_ID, ITEM_AGE, JUDGED_AGE, EXPOSURES]


def with_fresh_candidates(frame: Frame, schema: Schema, seed: int = 0) -> Frame | None:
    """``frame`` with rows added in which a user meets a fresh item of the day; None where no fresh item was shown.

    An added row is a real one, context and time included, with another item: its labels mean nothing.
    """
    parts = [_mixed(rows, schema.fresh_days, seed) for rows in frame.rows.partition_by(DAY, maintain_order=True)]
    known = [part for part in parts if part is not None]
    return Frame(frame.users, frame.items, pl.concat(known).sort(USER_ROW, maintain_order=True)) if known else None


def _mixed(rows: pl.DataFrame, fresh_days: float, seed: int) -> pl.DataFrame | None:
    fresh = pl.col(ITEM_AGE) < fresh_days
    pool = rows.filter(fresh).select(_OF_THE_ITEM).unique(ITEM_ID, maintain_order=True)
    warm = rows.filter(~fresh)
    if not len(pool) or not len(warm):
        return None
    count = round(len(warm) * SHARE / (1 - SHARE))
    hosts = warm.sample(count, with_replacement=True, seed=seed)
    guests = pool.sample(count, with_replacement=True, seed=seed + 1)
    added = hosts.with_columns(guests.get_columns()).unique([USER_ROW, ITEM_ID], maintain_order=True)
    return pl.concat([warm, added])


def parity_shift(logits: Floats, utilities: Floats, fresh: Bools, lists: Ints, items: Ints, k: int) -> float:
    """The constant on all fresh logits with which fresh rows hold their share of the top ``k`` of all lists.

    Args:
        logits: calibrated, [N, A].
        utilities: [A].
        fresh, lists, items: [N]; lists of ``k`` rows or fewer decide nothing and are left out.

    Returns:
        0 where every list is too short, or holds only fresh or only warm rows.
    """
    _, inverse, counts = np.unique(lists, return_inverse=True, return_counts=True)
    ranked = counts[inverse] > k
    if not 0 < fresh[ranked].sum() < ranked.sum():
        return 0.0
    numbers = np.unique(lists[ranked], return_inverse=True)[1].astype(np.int64)
    ties = metrics.tie_key(0, lists[ranked], items[ranked])
    probabilities = expit(logits[ranked].astype(np.float64))
    share = float(fresh[ranked].mean())
    return float(metrics.matched_ranks(probabilities, utilities, fresh[ranked], numbers, ties, k, share)[1])


def with_parity(platt: Platt, trained: Trained, frame: Frame, catalog: Catalog, config: CalibrationConfig) -> Platt:
    """``platt`` with the shift that gives fresh items parity on the lists of ``frame``, the calibration rows."""
    schema = trained.encoder.schema
    mixed = with_fresh_candidates(frame, schema)
    if mixed is None:
        log.warning("exposure parity: no fresh item was shown on the calibration days; fresh logits stay as they are")
        return platt
    logits = predict_encoded(trained, TensorFrame(mixed, trained.encoder, catalog))
    rows = mixed.rows
    shift = parity_shift(
        platt.scaled(logits),
        np.asarray(schema.utilities, np.float64),
        (rows[ITEM_AGE] < schema.fresh_days).to_numpy(),
        rows[USER_ROW].to_numpy().astype(np.int64),
        rows[ITEM_ID].to_numpy(),
        config.top,
    )
    bounded = float(np.clip(shift, -config.max_fresh_shift, config.max_fresh_shift))
    log.info("exposure parity: fresh logits are moved by %+.3f; parity asks for %+.3f", bounded, shift)
    return platt.model_copy(update={"fresh_shift": bounded})
