"""One answered request: what metrics count and the request log keeps."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from freshrank.bundle.golden import Tensors
from freshrank.features.encoder import Blocks


@dataclass(frozen=True)
class Ranked:
    """A request of N candidates and its answer."""

    request_id: str
    """As the client named it (Triton's own request id); "" where it did not."""
    user_id: int
    item_ids: npt.NDArray[np.int64]
    at: datetime
    context: dict[str, Any]
    """Context columns (and ``query_item_id``) that were given: codes of categorical ones, values of numeric ones."""
    answer: Tensors
    """``protocol.OUTPUTS``, without the leading dimension of the wire."""
    inputs: Blocks
    """What the ranker was given: user blocks [1, ..], candidate blocks [N, ..]."""
    experiment: str = ""
    """Name of the experiment that assigned the user; "" without one, or where the request named its version."""
    shadows: dict[int, Tensors] = field(default_factory=dict)
    """``probabilities`` [N, A] and ``score`` [N] of the versions that answered beside, unseen by the client."""
