"""The rows all models are trained and evaluated on: loaded once per process, encoded once per set of features."""

from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import polars as pl

from freshrank.config import RunConfig, Split, TrainingConfig, WindowConfig
from freshrank.datasets.dataset import MANIFEST, Dataset
from freshrank.datasets.kuairand import Protocol, import_kuairand
from freshrank.dates import days
from freshrank.errors import DataError
from freshrank.evaluation.metrics import Bools, Floats, Ints
from freshrank.features.encoder import Catalog
from freshrank.features.frames import JUDGED_AGE, Frame, load_frame
from freshrank.pipeline import steps
from freshrank.pipeline.run import Run
from freshrank.schema import EVENT_TIMESTAMP, IN_EVALUATION, IN_TRAINING, ITEM_ID, REQUEST_ID, USER_ID, Schema, Usage
from freshrank.settings import settings
from freshrank.storage.derived import fingerprint_of, is_current, marked, marking
from freshrank.storage.files import fingerprint, sha256_of
from freshrank.training.batches import Encoded, TensorFrame, labels_of
from freshrank.training.device import Device
from freshrank.training.loop import model_schema


@dataclass(frozen=True)
class EvidenceSource:
    """Which days of which dataset; hashable, and all a worker process needs to find its rows."""

    path: Path
    run_date: date
    windows: WindowConfig

    @property
    def split(self) -> Split:
        return self.windows.split(self.run_date)

    def dataset(self) -> Dataset:
        return Dataset.open(self.path)

    def fingerprint(self) -> str:
        """Changes when any row changes that can reach a feature or a label."""
        dataset = self.dataset()
        past = [day for day in dataset.days if day < self.run_date]
        return fingerprint(
            {"log": dataset.fingerprint(past), "windows": self.windows.model_dump(mode="json"), "date": self.run_date}
        )

    def before_evaluation(self) -> "EvidenceSource":
        """The tuning rows: as many evaluation days, all of them before this source's first one."""
        one = self.windows.evaluation_days
        shorter = max(1, self.windows.train_days - one)
        return EvidenceSource(
            self.path, self.split.evaluation[0], self.windows.model_copy(update={"train_days": shorter})
        )


@dataclass(frozen=True)
class LabelledRows:
    """A frame with its labels, lists and freshness, [N] or [N, A] each."""

    frame: Frame
    labels: Floats
    list_id: Ints
    fresh: Bools

    @classmethod
    def of(cls, frame: Frame, schema: Schema, lists: str) -> "LabelledRows":
        key = USER_ID if lists == "user" else REQUEST_ID
        list_id = np.unique(frame.rows[key].to_numpy(), return_inverse=True)[1].astype(np.int64)
        fresh = (frame.rows[JUDGED_AGE] < schema.fresh_days).to_numpy()
        return cls(frame, labels_of(frame, schema), list_id, fresh)

    def fingerprint(self, actions: list[str]) -> str:
        """Identifies the rows: only models evaluated on rows of the same fingerprint may be compared."""
        hashes = self.frame.rows.select(USER_ID, ITEM_ID, EVENT_TIMESTAMP, JUDGED_AGE, *actions).hash_rows(seed=0)
        return fingerprint([len(hashes), int(np.bitwise_xor.reduce(hashes.to_numpy())), _order(hashes)])


def _order(hashes: pl.Series) -> int:
    """Changes when two rows change places."""
    places = np.arange(1, len(hashes) + 1, dtype=np.uint64)
    return int((hashes.to_numpy() * places).sum(dtype=np.uint64))


@dataclass(frozen=True)
class Evidence:
    """Training, calibration and evaluation rows of one source."""

    schema: Schema
    items: pl.DataFrame
    train: Frame
    calibration: Frame
    evaluation: Frame

    @cached_property
    def _encoded(self) -> dict[str, "EncodedEvidence"]:
        return {}

    def encoded(self, config: RunConfig) -> "EncodedEvidence":
        """Tensors of all three frames under the encoder fitted on the training rows; cached for configs that share
        it.
        """
        seen, min_count = model_schema(self.schema, config.techniques), config.model.min_count
        key = fingerprint([seen.model_dump(mode="json"), min_count])
        if key not in self._encoded:
            self._encoded[key] = EncodedEvidence.of(self, seen, min_count)
        return self._encoded[key]


@dataclass(frozen=True)
class EncodedEvidence:
    train: Encoded[TensorFrame]
    calibration: TensorFrame
    evaluation: TensorFrame

    @classmethod
    def of(cls, evidence: Evidence, seen: Schema, min_count: int) -> "EncodedEvidence":
        device = Device.choose(TrainingConfig()).name
        train = Encoded.of(evidence.train, evidence.items, seen, min_count, device)
        catalog = Catalog.build(evidence.items, train.encoder)
        others = (TensorFrame(frame, train.encoder, catalog) for frame in (evidence.calibration, evidence.evaluation))
        return cls(train, *others)


@cache
def load_evidence(source: EvidenceSource) -> Evidence:
    """The frames of ``source``; historical features must have been built (:func:`prepare`)."""
    run = Run(source.path, source.run_date.isoformat())
    split = source.split

    def frame(part: tuple[date, ...], what: str, usages: tuple[Usage, ...]) -> Frame:
        return load_frame(run.dataset, run.workspace, run.days(part, what, usages), usages)

    return Evidence(
        schema=run.dataset.schema,
        items=run.dataset.items(),
        train=frame(split.train, "training", IN_TRAINING),
        calibration=frame(split.calibration, "calibration", IN_TRAINING),
        evaluation=frame(split.evaluation, "evaluation", IN_EVALUATION),
    )


@dataclass(frozen=True)
class Prepared:
    """What is measured on, and the oracle's rows where there are any."""

    protocol: str
    source: EvidenceSource
    oracle: EvidenceSource | None = None

    @property
    def sources(self) -> list[EvidenceSource]:
        return [self.source, *([self.oracle] if self.oracle else [])]

    def before_evaluation(self) -> "Prepared":
        oracle = self.oracle.before_evaluation() if self.oracle else None
        return Prepared(self.protocol, self.source.before_evaluation(), oracle)


def locate(
    data: Path, protocol: Protocol, windows: WindowConfig, run_date: date | None = None, oracle: Path | None = None
) -> Prepared:
    """KuaiRand's files (imported under ``protocol`` and as the oracle), or an imported dataset.

    An imported dataset is named by its own protocol, or by its schema's name where it is not KuaiRand; its oracle,
    if any, is another imported dataset.
    """
    if (data / MANIFEST).exists():
        dataset, oracles = Dataset.open(data), oracle
        name = dataset.manifest["source"].get("protocol", dataset.schema.name)
    else:
        dataset, name = _imported(data, protocol), protocol
        oracles = oracle or _imported(data, "oracle").path
    if run_date is None:
        run_date = dataset.days[-1] + timedelta(days=1)
    return Prepared(
        name,
        EvidenceSource(dataset.path.resolve(), run_date, windows),
        EvidenceSource(oracles.resolve(), run_date, windows) if oracles else None,
    )


def _imported(data: Path, protocol: Protocol) -> Dataset:
    """The import under the workspace, repeated unless it was made from these very files."""
    if not data.is_dir():
        raise DataError(f"data: {data} is not a directory; expected KuaiRand's files or an imported dataset")
    out = settings().home / "data" / f"kuairand_{protocol}"
    stamp, manifest = out.with_suffix(".source.json"), out / MANIFEST
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(data.resolve().iterdir())}
    expected = fingerprint_of({"from": str(data.resolve()), "files": files}, import_kuairand)
    if is_current(stamp, expected, manifest) and marked(stamp)["manifest"] == sha256_of(manifest):
        return Dataset.open(out)
    with marking(stamp, expected) as facts:
        dataset = import_kuairand(data, out, protocol)
        facts["manifest"] = sha256_of(manifest)
    return dataset


def prepare(prepared: Prepared) -> None:
    """Build what is missing of historical features and frames, so that workers only read."""
    for source in prepared.sources:
        split = source.split
        wanted = list(days(split.train[0], split.evaluation[-1]))
        if not set(wanted) & set(source.dataset().days):
            raise DataError(f"{source.path}: no impressions on {wanted[0]} .. {wanted[-1]}")
        steps.build_features(source.path, source.run_date.isoformat(), source.windows)
        load_evidence(source)
    _check_same_rows(prepared)


def _check_same_rows(prepared: Prepared) -> None:
    loaded = [load_evidence(source) for source in prepared.sources]
    prints = {LabelledRows.of(e.evaluation, e.schema, "user").fingerprint(e.schema.actions) for e in loaded}
    if len(prints) > 1:
        counts = " and ".join(
            f"{source.path} with {len(evidence.evaluation.rows):,} evaluation rows"
            for source, evidence in zip(prepared.sources, loaded, strict=True)
        )
        raise DataError(
            f"oracle: {counts} differ in user, item, time, age or a label, or in the order; "
            "import both from the same files"
        )
