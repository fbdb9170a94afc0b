"""Experiments: which version answers which user, and which versions score requests as shadows.

``<model repository>/experiment.json`` is written by `freshrank experiment` and read by the server. A user's place is
``int.from_bytes(blake2b(f"{salt}/{user_id}".encode(), digest_size=8).digest(), "big") / 2**64``: the first challenger
takes the places below its share, the next one those from there to the sum of both, the champion the rest. The same user
always meets the same arm, and a last challenger whose share grows takes users from the champion alone.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from freshrank.errors import ServingError
from freshrank.storage.files import WatchedFile, read_json, write_json

FILE = "experiment.json"
CHAMPION = 0
_SUM_TOLERANCE = 1e-9

log = logging.getLogger(__name__)


class Arm(BaseModel):
    """A version and the share of users it is for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Annotated[int, Field(ge=1)]
    share: Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Assignment:
    """Who answers a user: arm 0 and no version of its own is the champion, the version that the pointer serves."""

    experiment: str = ""
    arm: int = CHAMPION
    version: int | None = None
    shadows: tuple[int, ...] = ()


class Experiment(BaseModel):
    """``experiment.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    salt: str = ""
    """Other than the name where an experiment is to keep the users of an earlier one."""
    challengers: tuple[Arm, ...] = ()
    """They answer their users; the champion answers the rest."""
    shadows: tuple[Arm, ...] = ()
    """They score the requests of their share of users beside whoever answers; nobody sees it but the request log."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = sum(arm.share for arm in self.challengers)
        if total > 1 + _SUM_TOLERANCE:
            raise ValueError(f"the challengers' shares sum to {total:g}, expected at most 1")
        if len(set(self.versions)) < len(self.challengers) + len(self.shadows):
            raise ValueError(f"versions {[a.version for a in (*self.challengers, *self.shadows)]} hold one twice")
        if not self.versions:
            raise ValueError("no challenger and no shadow, expected at least one of them")
        return self

    @property
    def versions(self) -> list[int]:
        return sorted({arm.version for arm in (*self.challengers, *self.shadows)})

    def arms(self, user_ids: Iterable[int]) -> npt.NDArray[np.int64]:
        """Arm of each user: 0 the champion, 1, ... the challengers in their order."""
        bounds = np.cumsum([arm.share for arm in self.challengers])
        places = np.array([_place(self.salt or self.name, user) for user in user_ids])
        arms = np.searchsorted(bounds, places, side="right") + 1
        return np.where(arms > len(bounds), CHAMPION, arms).astype(np.int64)

    def assign(self, user_id: int) -> Assignment:
        arm = int(self.arms([user_id])[0])
        version = None if arm == CHAMPION else self.challengers[arm - 1].version
        shadows = tuple(
            each.version
            for each in self.shadows
            if _place(f"{self.salt or self.name}/{each.version}", user_id) < each.share
        )
        return Assignment(self.name, arm, version, shadows)


def _place(salt: str, user_id: int) -> float:
    digest = hashlib.blake2b(f"{salt}/{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class ExperimentFile:
    """The running experiment of a model repository, None where there is none."""

    def __init__(self, root: Path) -> None:
        self.path = root / FILE
        self._watched = WatchedFile(self.path, self.read_anew)
        self._complaint = ""

    def read(self) -> Experiment | None:
        """Read again only when the file changes; while it cannot be read, the last valid one applies."""
        try:
            return self._watched.value()
        except FileNotFoundError:
            self._watched.forget()
        except (OSError, ServingError) as error:
            self._complain(str(error))
        return self._watched.last

    def read_anew(self) -> Experiment | None:
        """What the file says now, None without one; ServingError where it cannot be read."""
        try:
            return Experiment.model_validate(read_json(self.path)) if self.path.exists() else None
        except (OSError, ValueError, ValidationError) as error:
            reason = str(error).replace("\n", " ")
            raise ServingError(
                f"{self.path} cannot be read: {reason}; remove it with `freshrank experiment stop`, or "
                "start the experiment again"
            ) from error

    def _complain(self, problem: str) -> None:
        last = self._watched.last
        stands = f"'{last.name}' goes on" if last else "there is no experiment"
        if problem != self._complaint:
            log.warning("%s; until then %s", problem, stands)
        self._complaint = problem

    def write(self, experiment: Experiment) -> None:
        write_json(self.path, experiment.model_dump(mode="json"))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
