"""Platt scaling per action, fitted on the calibration days: p = sigmoid(slope * logit + intercept)."""

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from freshrank.config import CalibrationConfig
from freshrank.errors import DataError
from freshrank.storage.files import read_json, write_json

log = logging.getLogger(__name__)
MIN_SLOPE = 0.01


class Platt(BaseModel):
    """Slopes and intercepts, one per action in the schema's order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    fresh_shift: float = 0.0
    """Added to every logit of fresh items, towards a higher score (exposure.py)."""

    def scaled(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Calibrated logits [N, A] of logits [N, A], before the shift of fresh items."""
        calibrated: npt.NDArray[np.float64] = np.asarray(self.slope) * logits.astype(np.float64) + self.intercept
        return calibrated

    def probabilities(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Calibrated probabilities [N, A] of logits [N, A], before the shift of fresh items."""
        probabilities: npt.NDArray[np.float64] = expit(self.scaled(logits))
        return probabilities

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump())

    @classmethod
    def load(cls, path: Path) -> "Platt":
        return cls.model_validate(read_json(path))


def fit_platt(
    logits: npt.NDArray[np.float32], labels: npt.NDArray[np.float32], actions: list[str], config: CalibrationConfig
) -> Platt:
    """Fit on logits [N, A] and labels [N, A] (NaN = not observed).

    A slope below ``MIN_SLOPE`` would reverse the ranking; it is clipped and logged, and the gate evaluates the result.

    Raises:
        DataError: fewer than ``config.min_positives`` positives, or no negative, of an action.
    """
    fits = [_fit_one(logits[:, a], labels[:, a], action, config) for a, action in enumerate(actions)]
    return Platt(slope=tuple(s for s, _ in fits), intercept=tuple(i for _, i in fits))


def _fit_one(
    logit: npt.NDArray[np.float32], label: npt.NDArray[np.float32], action: str, config: CalibrationConfig
) -> tuple[float, float]:
    observed = np.isfinite(label)
    x, y = logit[observed, None].astype(np.float64), label[observed].astype(int)
    positives = int(y.sum())
    if positives < config.min_positives or positives == len(y):
        raise DataError(
            f"action '{action}': {positives} positives among {len(y)} observed calibration labels; expected at least "
            f"{config.min_positives} and one negative. Calibrate on more days (windows.calibration_days) or lower "
            "calibration.min_positives"
        )
    model = LogisticRegression(C=np.inf, max_iter=200).fit(x, y)
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope < MIN_SLOPE:
        log.warning(
            "calibration of '%s': slope %.4f held at %.2f; the ranker orders this action badly",
            action,
            slope,
            MIN_SLOPE,
        )
        return MIN_SLOPE, _intercept_at(MIN_SLOPE, x[:, 0], float(y.mean()))
    return slope, intercept


def _intercept_at(slope: float, x: npt.NDArray[np.float64], rate: float) -> float:
    """The intercept with which predictions of a clipped slope have the observed mean ``rate``."""
    bound = 50.0 + slope * float(np.abs(x).max())
    return float(brentq(lambda b: float(expit(slope * x + b).mean()) - rate, -bound, bound))
