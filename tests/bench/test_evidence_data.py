"""Where the judged rows come from, and that only the same ones are compared."""

import os
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from freshrank.bench.paper.evidence_data import Prepared, load_evidence, locate, prepare
from freshrank.bench.paper.rows import EVIDENCE_WINDOWS
from freshrank.config import ModelConfig, RunConfig
from freshrank.datasets.dataset import MANIFEST
from freshrank.errors import DataError
from tests.bench.conftest import RUN_DATE, WINDOWS
from tests.datasets.test_kuairand import published

pytestmark = pytest.mark.integration


def test_raw_files_are_imported_under_the_protocol_and_as_the_oracle(home: Path) -> None:
    """Once: a second call takes the import that was made of these very files, a changed file makes it anew."""
    raw = published(home / "raw")
    prepared = locate(raw, "strict", EVIDENCE_WINDOWS)
    assert prepared.protocol == "strict"
    assert prepared.oracle is not None
    names = [source.dataset().schema.name for source in prepared.sources]
    assert names == ["kuairand_strict", "kuairand_oracle"]
    manifest = prepared.source.path / MANIFEST
    made = manifest.stat().st_mtime_ns
    assert locate(raw, "strict", EVIDENCE_WINDOWS) == prepared
    assert manifest.stat().st_mtime_ns == made
    os.utime(next(raw.iterdir()))
    locate(raw, "strict", EVIDENCE_WINDOWS)
    assert manifest.stat().st_mtime_ns > made


def test_an_imported_dataset_keeps_its_protocol_and_has_no_oracle_unless_one_is_named(home: Path) -> None:
    """What --protocol says is for raw files."""
    raw = published(home / "more")
    imported = locate(raw, "sparse", EVIDENCE_WINDOWS)
    prepared = locate(imported.source.path, "strict", EVIDENCE_WINDOWS)
    assert (prepared.protocol, prepared.oracle) == ("sparse", None)
    assert imported.oracle is not None
    named = locate(imported.source.path, "strict", EVIDENCE_WINDOWS, oracle=imported.oracle.path)
    assert named == imported


def test_the_run_date_is_the_day_after_the_log(world: Prepared) -> None:
    """Unless another one is given."""
    assert locate(world.source.path, "sparse", WINDOWS).source.run_date == RUN_DATE


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Before anything is imported."""
    with pytest.raises(DataError, match="is not a directory"):
        locate(tmp_path / "nowhere", "sparse", EVIDENCE_WINDOWS)


def test_an_oracle_that_judges_other_rows_is_refused(world: Prepared) -> None:
    """Here those of the day before: nothing would be paired."""
    other = replace(world.source, run_date=RUN_DATE - timedelta(days=1))
    with pytest.raises(DataError, match="differ in user, item, time, age or a label"):
        prepare(Prepared("simulated", world.source, other))


def test_frames_are_encoded_once_per_min_count(world: Prepared) -> None:
    """All rows and seeds share the tensors; another min_count has another vocabulary."""
    evidence = load_evidence(world.source)
    assert load_evidence(world.source) is evidence
    common, rare, rarest = (evidence.encoded(RunConfig(model=ModelConfig(min_count=n))) for n in (30, 3, 1))
    assert evidence.encoded(RunConfig(model=ModelConfig(min_count=3))) is rare
    assert len(rarest.train.encoder.vocabularies["item_id"]) > len(common.train.encoder.vocabularies["item_id"])


def test_training_calibration_and_evaluation_rows_are_in_time_order(world: Prepared) -> None:
    """No row of a later part is younger than one of an earlier."""
    evidence = load_evidence(world.source)
    parts = [frame.rows["event_timestamp"] for frame in (evidence.train, evidence.calibration, evidence.evaluation)]
    for earlier, later in pairwise(parts):
        assert earlier.max() < later.min()
