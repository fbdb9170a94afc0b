"""What a client sends to the model ``ranking`` and gets back: the one place its tensors are named.

Context columns are those of role ``context`` of the schema, in its order, one value per request.
On the wire every tensor has a leading dimension of 1, so that Triton may hand over several waiting requests at once;
the shapes here are without it.
"""

from freshrank.bundle.format import TensorSpec
from freshrank.bundle.golden import Tensors
from freshrank.schema import Kind, Role, Schema

RANKING = "ranking"
MAX_CANDIDATES = 2000
MAX_BATCH = 16
"""Requests that are waiting at the same time and may be answered together."""
INPUTS = (
    TensorSpec(name="user_id", dtype="int64", shape=(1,)),
    TensorSpec(name="item_ids", dtype="int64", shape=(-1,)),
    # Microseconds since 1970, UTC; 0 or absent: now.
    TensorSpec(name="event_time", dtype="int64", shape=(1,)),
    TensorSpec(name="query_item_id", dtype="int64", shape=(1,)),
    # Codes of the categorical context columns, values of the numeric ones; absent: all of them missing.
    TensorSpec(name="context_categorical", dtype="int64", shape=(-1,)),
    TensorSpec(name="context_numeric", dtype="float32", shape=(-1,)),
    # Categorical, then numeric columns: which of the values are there; absent: all that were sent.
    TensorSpec(name="context_present", dtype="bool", shape=(-1,)),
    # A loaded version that is to answer, whatever the pointer and the experiment say; 0 or absent: they decide.
    TensorSpec(name="version", dtype="int64", shape=(1,)),
)
REQUIRED = ("user_id", "item_ids")
OPTIONAL = tuple(spec.name for spec in INPUTS if spec.name not in REQUIRED)
OUTPUTS = (
    # [N, actions] and [N]: calibrated probabilities, and their sum weighted by the utilities of the schema.
    TensorSpec(name="probabilities", dtype="float32", shape=(-1, -1)),
    TensorSpec(name="score", dtype="float32", shape=(-1,)),
    TensorSpec(name="model_version", dtype="int64", shape=(1,)),
    # Which arm of the experiment the user is in: 0 the champion, also where there is none; 1, ... the challengers.
    TensorSpec(name="arm", dtype="int64", shape=(1,)),
    # [N]: younger than ``fresh_days``, or not known at all; and whether the online store knows the item.
    TensorSpec(name="cold", dtype="bool", shape=(-1,)),
    TensorSpec(name="known", dtype="bool", shape=(-1,)),
    # The online store could not be read: answered as if nothing were known of the user and of the items.
    TensorSpec(name="degraded", dtype="bool", shape=(1,)),
)


def context_columns(schema: Schema, kind: Kind) -> list[str]:
    """Names of the context columns of ``kind`` in the order of their tensor."""
    columns = schema.impressions.items()
    return [name for name, column in columns if column.role is Role.CONTEXT and column.kind is kind]


def on_wire(request: Tensors) -> Tensors:
    """Tensors of ``INPUTS`` as the server takes them, with a leading dimension of 1."""
    return {name: value[None] for name, value in request.items()}


def off_wire(answer: Tensors) -> Tensors:
    """The inverse, for an answer."""
    return {name: value[0] for name, value in answer.items()}
