"""One rank of a training that ``torchrun`` starts: trains on the random frame, in memory and streamed, and saves both.

python -m torch.distributed.run --nproc-per-node 2 -m tests.rank OUT
"""

import sys
from pathlib import Path

import polars as pl

from freshrank.config import MixupConfig, ScoreRegConfig, TechniquesConfig
from freshrank.features.frames import Frame
from freshrank.training.batches import Encoded
from freshrank.training.distributed import ALONE, ProcessGroup, joined
from freshrank.training.loop import train_encoded
from freshrank.training.trained import Trained
from tests.streams import stream_of
from tests.worlds import random_frame, tiny_schema

SCHEMA = tiny_schema()
SIZES = {"memory": {"users": 60, "rows": 960}, "stream": {"users": 300, "rows": 6000}}


def frame(source: str = "memory") -> Frame:
    """Every label observed, so that the mean of the ranks' mean losses is the mean loss of all rows."""
    generated = random_frame(SCHEMA, **SIZES[source])
    return Frame(generated.users, generated.items, generated.rows.with_columns(pl.col("save").fill_null(0)))


def trained(source: str, directory: Path, group: ProcessGroup = ALONE) -> Trained:
    """In memory without anything that draws or that is not a mean over rows; streamed with all of it."""
    from tests.models.test_ranker import SMALL, TRAINING

    fit = TRAINING.model_copy(update={"epochs": 3, "batch_size": 64, "min_steps": 1})
    if source == "memory":
        encoded, techniques = Encoded.of(frame(), frame().items, SCHEMA, 1), TechniquesConfig()
        fit = fit.model_copy(update={"new_item_probability": 0.0})
    else:
        encoded = stream_of(frame(source), SCHEMA, directory, window_rows=1000, parts=48)
        techniques = TechniquesConfig(mixup=MixupConfig(), score_reg=ScoreRegConfig())
    return train_encoded(encoded, SMALL, techniques, fit, group=group)


def main(out: Path) -> None:
    with joined() as group:
        for source in ("memory", "stream"):
            trained(source, out / f"shards-{group.rank}", group).save(out / f"{source}-{group.rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
