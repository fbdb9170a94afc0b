"""Requests that a version answers through `ranking` before it serves: from nobody, and those that were recorded.

``recorded.json`` beside the request log (``Workspace.requests``) is optional: a list of requests, each
``{tensor of protocol.INPUTS: values}``. That folder is all a server may write of a workspace on a cluster. Whoever logs
requests may leave some there; they are answered as of now, whatever ``event_time`` they were sent with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freshrank.bundle.golden import Tensors
from freshrank.errors import ServingError
from freshrank.serving.protocol import INPUTS, REQUIRED
from freshrank.storage.files import read_json, write_json

SIZES = (1, 50, 100)
"""`ranking` answers one batch at a time: a larger request would hold up those of clients, and is put to `ranker`."""
MOST_RECORDED = 32
"""Taken from the end of the file."""
_DTYPES = {spec.name: spec.dtype for spec in INPUTS}
_NOT_REPLAYED = ("event_time", "version")


def recorded_path(folder: Path) -> Path:
    return folder / "recorded.json"


def record(folder: Path, requests: Sequence[Tensors]) -> None:
    """Leave ``requests``, without their leading dimension, for the next publication, in place of those there."""
    recorded = [{name: value.tolist() for name, value in request.items()} for request in requests[-MOST_RECORDED:]]
    write_json(recorded_path(folder), recorded)


def warm_up_requests(folder: Path) -> list[Tensors]:
    """The recorded requests, after one of each of SIZES for a user and items that nobody knows.

    Raises:
        ServingError: recorded.json is not what this module writes.
    """
    path = recorded_path(folder)
    recorded = read_json(path) if path.exists() else []
    try:
        return [*requests_from_nobody(), *map(_tensors, recorded[-MOST_RECORDED:])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServingError(
            f"{path}: {error!r}; expected a list of requests, each of tensors among {list(_DTYPES)} "
            f"with at least {list(REQUIRED)}; remove the file or record again"
        ) from error


def requests_from_nobody() -> list[Tensors]:
    """One of each of SIZES; neither the user nor an item has a history."""
    return [{"user_id": np.array([-1]), "item_ids": np.arange(-size, 0)} for size in SIZES]


def _tensors(request: dict[str, Any]) -> Tensors:
    if missing := [name for name in REQUIRED if name not in request]:
        raise KeyError(missing[0])
    return {name: np.array(v, dtype=_DTYPES[name]) for name, v in request.items() if name not in _NOT_REPLAYED}
