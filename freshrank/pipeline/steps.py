"""The steps of a daily run. The command line, the Kubeflow components and the DAG only call these.

Every step is a function of its inputs: its output is kept under the fingerprint of the data it reads, the config
sections it takes and the code it runs (:mod:`freshrank.storage.derived`), so a step that was killed is done again and
one that finished is not.
"""

import logging
import shutil
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from freshrank.config import (
    CalibrationConfig,
    EvaluationConfig,
    GateConfig,
    ModelConfig,
    Section,
    TechniquesConfig,
    TrainingConfig,
    ValidationConfig,
    WindowConfig,
)
from freshrank.dates import days
from freshrank.errors import DataError
from freshrank.schema import CREATED_AT, IN_EVALUATION, IN_TRAINING, ITEM_ID, Entity
from freshrank.storage.derived import fingerprint_of
from freshrank.storage.files import atomic_directory, atomic_write, read_json, sha256_of, write_json

if TYPE_CHECKING:
    from freshrank.pipeline.champion import Champion
    from freshrank.reports.report import RunSummary
from freshrank.pipeline.run import FreshrankPath, Run, record_outcome, require_artifact

KEY, BUNDLE = "key.json", "bundle.json"
"""In the folders of :func:`train` and :func:`calibrate`: what they were made of."""
log = logging.getLogger(__name__)


def _json(sections: dict[str, Section]) -> dict[str, Any]:
    return {name: section.model_dump(mode="json") for name, section in sections.items()}


def build_features(data: FreshrankPath, run_date: str, windows: WindowConfig | None = None) -> None:
    """Historical snapshots for every day that is learned from or judged, and for the run's date itself; hourly counters
    for the former, where the schema has them.

    Raises:
        DataError: the run's date is later than the day after the log's newest, or the log lacks a part's days.
    """
    from freshrank.features.hourly import build_hourly
    from freshrank.features.snapshots import build_history

    run = Run(data, run_date)
    _refuse_future(run)
    split = (windows or WindowConfig()).split(run.date)
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
    data: FreshrankPath,
    run_date: str,
    windows: WindowConfig,
    model: ModelConfig,
    techniques: TechniquesConfig,
    training: TrainingConfig,
) -> tuple[Run, list[date], str]:
    """The run, the days its ranker is trained on, and the fingerprint under which :func:`train` keeps it."""
    run = Run(data, run_date)
    wanted = run.days(windows.split(run.date).train, "training", IN_TRAINING)
    inputs = {
        "data": run.read(wanted),
        "days": wanted,
        "sections": _json({"model": model, "techniques": techniques, "training": training}),
    }
    return run, wanted, fingerprint_of(inputs, train)


def train(
    data: FreshrankPath,
    run_date: str,
    windows: WindowConfig,
    model: ModelConfig,
    techniques: TechniquesConfig,
    training: TrainingConfig,
    out: FreshrankPath,
) -> dict[str, Any]:
    """Train the ranker on the training days into directory ``out``.

    Under ``torchrun`` its processes train together; they must share the workspace. One that was killed goes on where it
    was kept last, with an object store (FRESHRANK_STORAGE_URL) on any node.
    """
    from freshrank.storage import object_store
    from freshrank.training.checkpoints import Checkpoints, forget
    from freshrank.training.distributed import ProcessGroup, joined
    from freshrank.training.loop import model_schema, train_encoded
    from freshrank.training.stream import encoded_days
    from freshrank.training.trained import DESCRIPTION, Trained

    run, wanted, key = train_inputs(data, run_date, windows, model, techniques, training)

    def learned(group: ProcessGroup) -> Trained:
        seen = model_schema(run.dataset.schema, techniques)
        encoded = encoded_days(run.dataset, run.workspace, wanted, seen, model.min_count, training, group)
        place, copy = checkpoint_root / str(group.size), f"{copies}/{group.size}"
        with Checkpoints.opened(place, training.checkpoint_every, group, store, copy) as keep:
            return train_encoded(encoded, model, techniques, training, None, keep, group)

    def compute(directory: Path) -> None:
        learned(group).save(directory)
        sections = {"windows": windows, "model": model, "techniques": techniques, "training": training}
        write_json(directory / KEY, {"key": key, "config": _json(sections)})

    checkpoint_root, store = run.workspace.checkpoints / key, object_store.configured()
    copies = f"checkpoints/{run.dataset.schema.name}/{key}"
    with joined() as group:
        if group.leads:
            run.step("train", key, out, compute)
            shutil.rmtree(checkpoint_root, ignore_errors=True)
            if store:
                forget(store, f"{copies}/{group.size}")
        elif not run.done("train", key):
            learned(group)
        group.wait()
    facts: dict[str, Any] = read_json(run.stored_path("train", key) / DESCRIPTION)["facts"]
    losses = facts["curve"]["losses"]["bce"]
    names = ("device", "parameters", "parameter_increase", "examples_per_second", "rows", "cold_rows", "batch_size")
    return {name: facts[name] for name in names} | {"train_loss": losses[-1]}


def calibrate_inputs(
    data: FreshrankPath, run_date: str, windows: WindowConfig, calibration: CalibrationConfig, model_dir: FreshrankPath
) -> tuple[Run, list[date], str]:
    """The run, the days that are calibrated on, and the fingerprint under which :func:`calibrate` keeps the bundle."""
    run = Run(data, run_date)
    wanted = run.days(windows.split(run.date).calibration, "calibration", IN_TRAINING)
    inputs = {
        "train": read_json(require_artifact(Path(model_dir) / KEY, "freshrank train"))["key"],
        "data": run.read(wanted),
        "days": wanted,
        "calibration": calibration.model_dump(mode="json"),
        "date": run.date,
    }
    return run, wanted, fingerprint_of(inputs, calibrate)


def calibrate(
    data: FreshrankPath,
    run_date: str,
    windows: WindowConfig,
    calibration: CalibrationConfig,
    model_dir: FreshrankPath,
    out: FreshrankPath,
) -> dict[str, Any]:
    """Fit Platt scaling on the calibration days and export the version bundle into ``out``."""
    from freshrank.export.calibration import Platt, fit_platt
    from freshrank.export.exposure_parity import with_parity
    from freshrank.export.onnx_export import export_bundle
    from freshrank.features.encoder import Catalog
    from freshrank.features.frames import load_frame
    from freshrank.training.batches import labels_of
    from freshrank.training.trained import Trained, predict

    run, wanted, key = calibrate_inputs(data, run_date, windows, calibration, model_dir)
    trained_key = read_json(Path(model_dir) / KEY)

    def compute(directory: Path) -> None:
        schema, items = run.dataset.schema, run.dataset.items()
        trained = Trained.load(Path(model_dir))
        frame = load_frame(run.dataset, run.workspace, wanted, IN_TRAINING)
        logits, labels = predict(trained, frame, items), labels_of(frame, schema)
        platt = fit_platt(logits, labels, schema.actions, calibration)
        if calibration.exposure == "parity":
            platt = with_parity(platt, trained, frame, Catalog.build(items, trained.encoder), calibration)
        facts = {
            "fingerprint": key,
            "run_date": run_date,
            "dataset": schema.name,
            "training": trained.facts,
            "platt": platt.model_dump(),
            "config": trained_key["config"] | _json({"calibration": calibration}),
        }
        export_bundle(trained, platt, frame, items, directory, facts)

    run.step("calibrate", key, out, compute)
    platt = Platt.model_validate(read_json(Path(out) / BUNDLE)["platt"])
    scaling = {"slope": platt.slope, "intercept": platt.intercept}
    by_action = {
        f"{part}_{action}": value
        for part, values in scaling.items()
        for action, value in zip(run.dataset.schema.actions, values, strict=True)
    }
    return by_action | {"fresh_shift": platt.fresh_shift}


def validate(data: FreshrankPath, run_date: str, validation: ValidationConfig, out: FreshrankPath) -> dict[str, Any]:
    """Check the newest day; write ``validation.json``, ``validation.html`` and ``data_docs/`` into ``out``.

    Raises:
        ValidationFailed: a blocking expectation failed; the files say so as well.
    """
    from freshrank.reports.validation_page import write_pages
    from freshrank.validation.validate import inspect_day

    run = Run(data, run_date)
    inspected = inspect_day(run.dataset, run.date, item_history(run), validation)
    report = inspected.report
    with atomic_directory(Path(out)) as directory:
        write_json(directory / "validation.json", report.model_dump(mode="json"))
        write_pages(inspected, directory)
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


def evaluate_inputs(
    data: FreshrankPath,
    run_date: str,
    windows: WindowConfig,
    evaluation: EvaluationConfig,
    gate: GateConfig,
    bundle: FreshrankPath,
) -> tuple[Run, list[date], "Champion | None", str]:
    """The run, the days that are judged on, what serves, and the fingerprint under which :func:`evaluate` keeps the
    judgement."""
    from freshrank.pipeline.champion import champion
    from freshrank.reports.report import TEMPLATE

    run = Run(data, run_date)
    facts = read_json(require_artifact(Path(bundle) / BUNDLE, "freshrank calibrate"))
    wanted, served = run.days(windows.split(run.date).evaluation, "evaluation", IN_EVALUATION), champion(run)
    inputs = {
        "bundle": facts["fingerprint"],
        "data": run.read(wanted),
        "days": wanted,
        "sections": _json({"evaluation": evaluation, "gate": gate}),
        "champion": served.fingerprint if served else None,
        "template": sha256_of(TEMPLATE),
    }
    return run, wanted, served, fingerprint_of(inputs, evaluate)


def evaluate(
    data: FreshrankPath,
    run_date: str,
    windows: WindowConfig,
    evaluation: EvaluationConfig,
    gate: GateConfig,
    bundle: FreshrankPath,
    out: FreshrankPath,
) -> dict[str, Any]:
    """Judge the bundle on the evaluation days against what serves; write evaluation, verdict and report to ``out``."""
    from freshrank.evaluation.evaluate import compare
    from freshrank.evaluation.evaluate import evaluate as evaluated
    from freshrank.evaluation.gate import judge
    from freshrank.evaluation.threshold_sweep import with_thresholds
    from freshrank.evaluation.warm_up_curve import with_warm_up
    from freshrank.pipeline.judgement import EvaluationRows, Judgement

    run, wanted, champion, key = evaluate_inputs(data, run_date, windows, evaluation, gate, bundle)
    facts = read_json(Path(bundle) / BUNDLE)

    def compute(directory: Path) -> None:
        schema = run.dataset.schema
        rows = EvaluationRows.load(run, wanted, evaluation)
        ours, theirs = rows.of_bundle(Path(bundle)), rows.of_champion(champion)
        comparison = compare(ours, theirs, schema, evaluation)
        comparison = with_thresholds(comparison, ours, theirs, schema, evaluation)
        challenger, baseline = (
            with_warm_up(evaluated(model, schema, evaluation), model, schema, evaluation) for model in (ours, theirs)
        )
        increase = facts["training"]["parameter_increase"]
        verdict = judge(comparison, challenger, gate, increase)
        log.info("step=evaluate date=%s verdict=%s", run.date, verdict.verdict)
        for reason in verdict.unmet_checks:
            log.info(
                "step=evaluate date=%s check=%r passed=%s: %s", run.date, reason.check, reason.passed, reason.sentence
            )
        sections = _json({"evaluation": evaluation, "gate": gate})
        judgement = Judgement(facts, champion, challenger, baseline, comparison, verdict, sections)
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
