"""What an epoch gains must not change what it learns."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from freshrank.bench.paper.evidence_data import Prepared, load_evidence
from freshrank.bench.paper.rows import BASELINE, ROWS, config_of
from freshrank.bench.training.epoch import _PerImpression, epoch
from freshrank.storage.files import read_json

pytestmark = pytest.mark.integration


def test_both_ways_end_with_the_same_losses(world: Prepared, home: Path) -> None:
    """Two batches each; the ratio is of this machine and this moment, so only its parts are looked at."""
    result = epoch(world, 2, 1, home / "epoch.json", Console(quiet=True))
    assert result.loss_difference < 1e-5
    assert result.lowest <= result.speed_up <= result.highest
    assert read_json(home / "epoch.json") == result.model_dump()


def test_the_naive_way_holds_a_user_block_per_impression(world: Prepared) -> None:
    """The same rows, each with its user beside it."""
    whole = load_evidence(world.source).encoded(config_of(ROWS[BASELINE], 0, windows=world.source.windows)).train.data
    rows = torch.arange(64)
    once, repeated = whole.batch(rows).inputs, _PerImpression(whole, 1).batch(rows).inputs
    assert len(once["sequence_actions"]) < 64 == len(repeated["sequence_actions"])
    assert torch.equal(once["sequence_actions"][once["user_index"]], repeated["sequence_actions"])
