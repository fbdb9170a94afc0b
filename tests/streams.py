"""A random frame cut into shards, as training reads a log that does not fit into one window."""

from pathlib import Path

from torch import Tensor

from freshrank.features.frames import Frame, filter_frame
from freshrank.schema import Schema
from freshrank.training.batches import Batch, Encoded
from freshrank.training.shards import Shard, read_shards, user_part, write_shards
from freshrank.training.stream import streamed


def cut(frame: Frame, schema: Schema, parts: int, directory: Path) -> list[Shard]:
    directory.mkdir(exist_ok=True)
    write_shards((filter_frame(frame, user_part(parts) == part) for part in range(parts)), schema, directory)
    return read_shards(directory)


def stream_of(frame: Frame, schema: Schema, directory: Path, window_rows: int = 100, parts: int = 12) -> Encoded:
    return streamed(cut(frame, schema, parts, directory), frame.items, schema, 1, window_rows)


def hours(batch: Batch, encoded: Encoded) -> Tensor:
    """The context column ``hour``, which tells every row of a random frame from every other."""
    names = [feature.name for feature in encoded.encoder.numeric("row")]
    return batch.inputs["row_numeric"][:, names.index("hour")]
