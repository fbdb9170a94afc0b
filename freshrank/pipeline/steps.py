"""The steps of a daily run. The command line, the Kubeflow components and the DAG only call these.

Every step is a function of its inputs: its output is kept under the fingerprint of the data it reads, the config
sections it takes and the code it runs, so a step that was killed is done again and one that finished is not.
"""

import inspect
import json
import logging
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import polars as pl

from freshrank.config import (
    CalibrationConfig,
    EvaluationConfig,
    GateConfig,
    ModelConfig,
    Section,
    Split,
    TechniquesConfig,
    TrainingConfig,
    ValidationConfig,
    WindowConfig,
)
from freshrank.dates import days
from freshrank.errors import DataError
from freshrank.schema import CREATED_AT, IN_EVALUATION, IN_TRAINING, ITEM_ID, Entity
from freshrank.storage.files import atomic_directory, atomic_write, fingerprint, read_json, sha256_of, write_json

if TYPE_CHECKING:
    from freshrank.reports.report import RunSummary
from freshrank.pipeline.run import FreshrankPath, Run, record_outcome, require_artifact

log = logging.getLogger(__name__)


def _code(*modules: ModuleType) -> str:
    """Fingerprint of the source of ``modules``: an edit makes their kept outputs stale."""
    return fingerprint([sha256_of(Path(inspect.getfile(module))) for module in modules])


def _config(section: type[Section], text: str) -> Any:
    return section.model_validate_json(text)


def _split(run: Run, windows: str) -> Split:
    split: Split = WindowConfig.model_validate_json(windows).split(run.date)
    return split


def build_features(data: FreshrankPath, run_date: str, windows: str | None = None) -> None:
    """Historical snapshots for every day that is learned from or judged, and for the run's date itself; hourly counters
    for the former, where the schema has them.

    Raises:
        DataError: the run's date is later than the day after the log's newest, or the log lacks a part's days.
    """
    from freshrank.features.hourly import build_hourly
    from freshrank.features.snapshots import build_history

    run = Run(data, run_date)
    _refuse_future(run)
    split = _split(run, windows or WindowConfig().model_dump_json())
    window = days(split.train[0], split.evaluation[-1])
    needed = run.days(window, "training, calibration or evaluation", (*IN_TRAINING, *IN_EVALUATION))
    with run.workspace.in_use():
        run.workspace.note_reads(run.date, needed[0])
        build_history(run.dataset, run.workspace, [*needed, run.date])
        build_hourly(run.dataset, run.workspace, needed)


def materialize(data: FreshrankPath, run_date: str) -> datetime | None:
    """Register the feature definitions and put the state of the run's date into the online store.

    Returns the instant of a later state that the store holds and keeps, None where the run's was put in.

    Raises:
        DataError: the run's date is later than the day after the log's newest.
    """
    from freshrank.features.store import FeatureStore

    run = Run(data, run_date)
    _refuse_future(run)
    store = FeatureStore(run.dataset, run.workspace)
    store.apply()
    return store.materialize(run.date)


def _refuse_future(run: Run) -> None:
    """The snapshot of a day whose yesterday has not come is short of it, and once online it keeps the right one out."""
    newest = run.dataset.days[-1]
    if run.date > newest + timedelta(days=1):
        raise DataError(
            f"date: received {run.date}, expected {newest + timedelta(days=1)} at the latest, the day after the newest "
            f"partition in {run.dataset.path}; import the log up to {run.date - timedelta(days=1)} first"
        )


def push_hourly(data: FreshrankPath, hour: datetime) -> int:
    """Push the counters of ``hour`` (a full hour, UTC) into the online store; of how many items."""
    from freshrank.features.store import FeatureStore

    run = Run(data, hour.date().isoformat())
    return FeatureStore(run.dataset, run.workspace).push_hourly(hour)


def train_inputs(
    data: FreshrankPath, run_date: str, windows: str, model: str, techniques: str, training: str
) -> tuple[Run, dict[str, Any]]:
    """The run, and all that its ranker depends on: :func:`train` keeps it under the fingerprint of the latter."""
    from freshrank.features import columns, encoder, frames, hourly, snapshots
    from freshrank.models import inputs, ranker
    from freshrank.techniques import aldi, feature_dropout, history_masking, meta_embedding, mixup, residual, score_reg
    from freshrank.techniques import self_supervision as objectives
    from freshrank.training import augmentations, checkpoints, distributed, pretrain_items, shards, stream
    from freshrank.training import loop as training_module

    run = Run(data, run_date)
    wanted = run.days(_split(run, windows).train, "training", IN_TRAINING)
    code = _code(
        columns,
        encoder,
        frames,
        snapshots,
        hourly,
        shards,
        stream,
        distributed,
        checkpoints,
        training_module,
        augmentations,
        inputs,
        ranker,
        aldi,
        feature_dropout,
        history_masking,
        mixup,
        residual,
        score_reg,
        meta_embedding,
        pretrain_items,
        objectives,
    )
    return run, {"data": run.read(wanted), "days": wanted, "sections": [model, techniques, training], "code": code}


def train(
    data: FreshrankPath,
    run_date: str,
    windows: str,
    model: str,
    techniques: str,
    training: str,
    out: FreshrankPath,
) -> dict[str, Any]:
    """Train the ranker on the training days into directory ``out``.

    Under ``torchrun`` its processes train together; they must share the workspace. One that was killed goes on where it
    was kept last, with an object store (FRESHRANK_STORAGE_URL) on any node.
    """
    from freshrank.storage import object_store
    from freshrank.training import checkpoints, distributed, stream
    from freshrank.training import loop as training_module
    from freshrank.training.trained import DESCRIPTION, Trained

    run, key = train_inputs(data, run_date, windows, model, techniques, training)
    fit, shape, switches = (
        _config(section, text)
        for section, text in ((TrainingConfig, training), (ModelConfig, model), (TechniquesConfig, techniques))
    )

    def learned(group: distributed.Group) -> Trained:
        seen = training_module.model_schema(run.dataset.schema, switches)
        encoded = stream.encoded_days(run.dataset, run.workspace, key["days"], seen, shape.min_count, fit, group)
        place, copy = kept / str(group.size), f"{copies}/{group.size}"
        with checkpoints.Checkpoints.opened(place, fit.checkpoint_every, group, store, copy) as keep:
            return training_module.train_encoded(encoded, shape, switches, fit, None, keep, group)

    def compute(directory: Path) -> None:
        learned(group).save(directory)
        sections = {"windows": windows, "model": model, "techniques": techniques, "training": training}
        config = {name: json.loads(section) for name, section in sections.items()}
        write_json(directory / "key.json", {"key": key, "config": config})

    kept, store = run.workspace.checkpoints / fingerprint(key), object_store.configured()
    copies = f"checkpoints/{run.dataset.schema.name}/{kept.name}"
    with distributed.joined() as group:
        if group.leads:
            run.step("train", key, out, compute)
            shutil.rmtree(kept, ignore_errors=True)
            if store:
                checkpoints.forget(store, f"{copies}/{group.size}")
        elif not run.done("train", key):
            learned(group)
        group.wait()
    facts: dict[str, Any] = read_json(run.kept("train", key) / DESCRIPTION)["facts"]
    losses = facts["curve"]["losses"]["bce"]
    names = ("device", "parameters", "parameter_increase", "examples_per_second", "rows", "cold_rows", "batch_size")
    return {name: facts[name] for name in names} | {"train_loss": losses[-1]}


def calibrate(
    data: FreshrankPath, run_date: str, windows: str, calibration: str, model_dir: FreshrankPath, out: FreshrankPath
) -> dict[str, Any]:
    """Fit Platt scaling on the calibration days and export the version bundle into ``out``."""
    from freshrank.export import calibration as calibration_module
    from freshrank.export import exposure_parity, onnx_export
    from freshrank.features import frames
    from freshrank.features.encoder import Catalog
    from freshrank.training import batches
    from freshrank.training import trained as trained_module
    from freshrank.training.trained import Trained

    run = Run(data, run_date)
    wanted = run.days(_split(run, windows).calibration, "calibration", IN_TRAINING)
    trained_key = read_json(require_artifact(Path(model_dir) / "key.json", "freshrank train"))
    key = {
        "train": trained_key["key"],
        "data": run.read(wanted),
        "days": wanted,
        "calibration": calibration,
        "date": run.date,
        "code": _code(calibration_module, exposure_parity, onnx_export),
    }

    def compute(directory: Path) -> None:
        schema, items = run.dataset.schema, run.dataset.items()
        trained = Trained.load(Path(model_dir))
        frame = frames.load_frame(run.dataset, run.workspace, wanted, IN_TRAINING)
        logits, labels = trained_module.predict(trained, frame, items), batches.labels_of(frame, schema)
        settings = _config(CalibrationConfig, calibration)
        platt = calibration_module.fit_platt(logits, labels, schema.actions, settings)
        if settings.exposure == "parity":
            platt = exposure_parity.with_parity(platt, trained, frame, Catalog.build(items, trained.encoder), settings)
        facts = {
            "fingerprint": fingerprint(key),
            "run_date": run_date,
            "dataset": schema.name,
            "training": trained.facts,
            "platt": platt.model_dump(),
            "config": trained_key["config"] | {"calibration": json.loads(calibration)},
        }
        onnx_export.export_bundle(trained, platt, frame, items, directory, facts)

    run.step("calibrate", key, out, compute)
    platt = calibration_module.Platt.model_validate(read_json(Path(out) / "bundle.json")["platt"])
    found = {"slope": platt.slope, "intercept": platt.intercept}
    by_action = {
        f"{part}_{action}": value
        for part, values in found.items()
        for action, value in zip(run.dataset.schema.actions, values, strict=True)
    }
    return by_action | {"fresh_shift": platt.fresh_shift}


def validate(data: FreshrankPath, run_date: str, validation: str, out: FreshrankPath) -> dict[str, Any]:
    """Check the newest day; write ``validation.json``, ``validation.html`` and ``data_docs/`` into ``out``.

    Raises:
        ValidationFailed: a blocking expectation failed; the files say so as well.
    """
    from freshrank.reports.validation_page import write_pages
    from freshrank.validation.validate import inspect_day

    run = Run(data, run_date)
    found = inspect_day(run.dataset, run.date, item_history(run), _config(ValidationConfig, validation))
    report = found.report
    with atomic_directory(Path(out)) as directory:
        write_json(directory / "validation.json", report.model_dump(mode="json"))
        write_pages(found, directory)
    report.raise_if_blocked()
    held = sum(result.success for result in report.results)
    return {"expectations": len(report.results), "passed": held, "rows": report.rows, "fresh_rows": report.fresh_rows}


def item_history(run: Run) -> pl.DataFrame | None:
    """The last week's snapshots of item counters beside each item's birth, for the leak detector.

    The run's own snapshot alone would show nothing: whatever is in the log was born before it.
    """
    from freshrank.features.snapshots import snapshot_path

    week = [snapshot_path(run.workspace, Entity.ITEM, run.date - timedelta(days=age)) for age in range(7)]
    present = [path for path in week if path.exists()]
    if not present:
        return None
    births = run.dataset.births().select(ITEM_ID, CREATED_AT)
    return pl.read_parquet(present, hive_partitioning=False).join(births, on=ITEM_ID, how="inner")


def evaluate(
    data: FreshrankPath,
    run_date: str,
    windows: str,
    evaluation: str,
    gate: str,
    bundle: FreshrankPath,
    out: FreshrankPath,
) -> dict[str, Any]:
    """Judge the bundle on the evaluation days against what serves; write evaluation, verdict and report to ``out``."""
    from freshrank.evaluation import evaluate as judging
    from freshrank.evaluation import gate as gate_module
    from freshrank.evaluation import metrics, popularity, threshold_sweep, warm_up_curve
    from freshrank.pipeline import champion as champion_module
    from freshrank.pipeline import judgement as judged
    from freshrank.reports import figures, report

    run = Run(data, run_date)
    facts = read_json(require_artifact(Path(bundle) / "bundle.json", "freshrank calibrate"))
    wanted = run.days(_split(run, windows).evaluation, "evaluation", IN_EVALUATION)
    champion = champion_module.champion(run)
    code = _code(judging, metrics, warm_up_curve, threshold_sweep, gate_module, judged, popularity, figures, report)
    key = {
        "bundle": facts["fingerprint"],
        "data": run.read(wanted),
        "days": wanted,
        "sections": [evaluation, gate],
        "champion": champion.fingerprint if champion else None,
        "code": code,
    }

    def compute(directory: Path) -> None:
        config, schema = _config(EvaluationConfig, evaluation), run.dataset.schema
        rows = judged.JudgedRows.load(run, wanted, config)
        ours, theirs = rows.of_bundle(Path(bundle)), rows.of_champion(champion)
        comparison = judging.compare(ours, theirs, schema, config)
        comparison = threshold_sweep.with_thresholds(comparison, ours, theirs, schema, config)
        challenger, baseline = (
            warm_up_curve.with_warm_up(judging.evaluate(model, schema, config), model, schema, config)
            for model in (ours, theirs)
        )
        increase = facts["training"]["parameter_increase"]
        verdict = gate_module.judge(comparison, challenger, _config(GateConfig, gate), increase)
        log.info("step=evaluate date=%s verdict=%s", run.date, verdict.verdict)
        for reason in verdict.obstacles:
            log.info(
                "step=evaluate date=%s check=%r passed=%s: %s", run.date, reason.check, reason.passed, reason.sentence
            )
        sections = {"evaluation": json.loads(evaluation), "gate": json.loads(gate)}
        judgement = judged.Judgement(facts, champion, challenger, baseline, comparison, verdict, sections)
        judgement.write(directory, run)

    run.step("evaluate", key, out, compute)
    verdict = read_json(Path(out) / "verdict.json")
    _publish_evidence(run, Path(out))
    return {"verdict": verdict["verdict"], "reasons": verdict["reasons"], **read_json(Path(out) / "headline.json")}


def _publish_evidence(run: Run, evidence: Path) -> None:
    """Put what a person opens into the run's folder, and start its record."""
    names = ("report.html", "challenger.json", "baseline.json", "comparison.json", "verdict.json", "headline.json")
    for name in names:
        with atomic_write(run.directory / name) as path:
            shutil.copyfile(evidence / name, path)
    record_outcome(run)


def summary(data: FreshrankPath, run_date: str) -> "RunSummary":
    """How the run of ``run_date`` ended; a :class:`MissingArtifact` where it has not been judged."""
    from freshrank.pipeline.judgement import summarise

    run = Run(data, run_date)
    require_artifact(run.directory / "run.json", f"freshrank run --date {run_date}")
    return summarise(run.directory)
