"""The steps of a daily run. The command line, the Kubeflow components and the DAG only call these.

Every step is a function of its inputs: its output is kept under the fingerprint of the data it reads, the config
sections it takes and the code it runs, so a step that was killed is done again and one that finished is not.
"""

import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from datetime import date, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import polars as pl

from freshrank.clock import days, parse_day
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
from freshrank.datasets.contract import Dataset
from freshrank.errors import DataError, MissingArtifact, ServingError, StorageError
from freshrank.schema import CREATED_AT, IN_EVALUATION, IN_TRAINING, ITEM_ID, USAGE, Entity, Usage
from freshrank.storage import atomic_directory, atomic_write, fingerprint, read_json, sha256_of, write_json
from freshrank.workspace import Workspace

if TYPE_CHECKING:
    from freshrank.report import RunSummary
    from freshrank.serving.repository import ModelRepository, Pointer

log = logging.getLogger(__name__)
FreshrankPath = Path | str


class Run:
    """One dataset, one date: what every step starts from."""

    def __init__(self, data: FreshrankPath, run_date: str) -> None:
        self.dataset = Dataset.open(Path(data))
        self.workspace = Workspace.of(self.dataset.schema.name)
        self.workspace.bind(self.dataset)
        self.date = parse_day(run_date)
        self.directory = self.workspace.run(self.date)

    def days(self, part: Iterable[date], what: str, usages: tuple[Usage, ...]) -> list[date]:
        """Those of ``part`` on which the log has rows of ``usages``; a :class:`DataError` where there is none."""
        wanted = list(part)
        present = sorted(set(wanted) & set(self.dataset.days))
        log_rows = self.dataset.impressions(present).filter(pl.col(USAGE).is_in(list(usages))) if present else None
        kept = [] if log_rows is None else sorted(log_rows.select("day").unique().collect()["day"])
        if not kept:
            raise DataError(
                f"{self.dataset.path}: no impressions for {what} on {min(wanted)} .. {max(wanted)} of run "
                f"{self.date}; the log holds {self.dataset.days[0]} .. {self.dataset.days[-1]}"
            )
        return kept

    def read(self, part: Iterable[date]) -> str:
        """Fingerprint of every row that can reach features or labels of ``part``."""
        wanted = sorted(part)
        lookback = timedelta(days=self.dataset.schema.lookback_days + 1)
        return self.dataset.fingerprint(list(days(wanted[0] - lookback, wanted[-1])))

    def kept(self, name: str, inputs: dict[str, Any]) -> Path:
        """Where the step store holds this fingerprint, once it is done."""
        return self.workspace.steps / name / fingerprint(inputs)

    def done(self, name: str, inputs: dict[str, Any]) -> bool:
        """Whether the step store holds this fingerprint."""
        return self.kept(name, inputs).is_dir()

    def step(self, name: str, inputs: dict[str, Any], out: FreshrankPath, compute: Callable[[Path], None]) -> Path:
        """Compute into the step store unless it holds this fingerprint, then copy to ``out``."""
        key = fingerprint(inputs)
        kept = self.kept(name, inputs)
        with self.workspace.in_use():
            self._say_used(kept)
        if self.done(name, inputs):
            log.info("step=%s date=%s fingerprint=%s state=reused", name, self.date, key)
        else:
            log.info("step=%s date=%s fingerprint=%s state=started", name, self.date, key)
            with atomic_directory(kept) as directory:
                compute(directory)
            log.info("step=%s date=%s fingerprint=%s state=finished", name, self.date, key)
        with atomic_directory(Path(out)) as directory:
            shutil.copytree(kept, directory, dirs_exist_ok=True)
        return Path(out)

    def _say_used(self, kept: Path) -> None:
        """To `freshrank prune`: of ``kept``, where it is there, and of what this run reads."""
        if kept.is_dir():
            os.utime(kept)
        if first := self.workspace.reads_from(self.date):
            self.workspace.note_reads(self.date, first)


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
    from freshrank.history import build_history
    from freshrank.hourly import build_hourly

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
    from freshrank.feature_store import FeatureStore

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
    from freshrank.feature_store import FeatureStore

    run = Run(data, hour.date().isoformat())
    return FeatureStore(run.dataset, run.workspace).push_hourly(hour)


def train_inputs(
    data: FreshrankPath, run_date: str, windows: str, model: str, techniques: str, training: str
) -> tuple[Run, dict[str, Any]]:
    """The run, and all that its ranker depends on: :func:`train` keeps it under the fingerprint of the latter."""
    from freshrank import (
        checkpoints,
        columns,
        distributed,
        encoding,
        frames,
        history,
        hourly,
        pretraining,
        shards,
        stream,
        transforms,
    )
    from freshrank import training as training_module
    from freshrank.models import inputs, ranker
    from freshrank.techniques import aldi, feature_dropout, history_masking, meta_embedding, mixup, residual, score_reg
    from freshrank.techniques import pretraining as objectives

    run = Run(data, run_date)
    wanted = run.days(_split(run, windows).train, "training", IN_TRAINING)
    code = _code(columns, encoding, frames, history, hourly, shards, stream, distributed, checkpoints, training_module,
                 transforms, inputs, ranker, aldi, feature_dropout, history_masking, mixup, residual, score_reg,
                 meta_embedding, pretraining, objectives)  # fmt: skip
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
    from freshrank import checkpoints, distributed, objects, stream
    from freshrank import training as training_module

    run, key = train_inputs(data, run_date, windows, model, techniques, training)
    fit, shape, switches = (_config(section, text) for section, text in ((TrainingConfig, training),
                            (ModelConfig, model), (TechniquesConfig, techniques)))  # fmt: skip

    def learned(group: distributed.Group) -> training_module.Trained:
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

    kept, store = run.workspace.checkpoints / fingerprint(key), objects.configured()
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
    facts: dict[str, Any] = read_json(run.kept("train", key) / training_module.DESCRIPTION)["facts"]
    losses = facts["curve"]["losses"]["bce"]
    names = ("device", "parameters", "parameter_increase", "examples_per_second", "rows", "cold_rows", "batch_size")
    return {name: facts[name] for name in names} | {"train_loss": losses[-1]}


def calibrate(
    data: FreshrankPath, run_date: str, windows: str, calibration: str, model_dir: FreshrankPath, out: FreshrankPath
) -> dict[str, Any]:
    """Fit Platt scaling on the calibration days and export the version bundle into ``out``."""
    from freshrank import calibration as calibration_module
    from freshrank import export, exposure, frames, training
    from freshrank.encoding import Catalog

    run = Run(data, run_date)
    wanted = run.days(_split(run, windows).calibration, "calibration", IN_TRAINING)
    trained_key = read_json(_existing(Path(model_dir) / "key.json", "freshrank train"))
    key = {"train": trained_key["key"], "data": run.read(wanted), "days": wanted, "calibration": calibration,
           "date": run.date, "code": _code(calibration_module, exposure, export)}  # fmt: skip

    def compute(directory: Path) -> None:
        schema, items = run.dataset.schema, run.dataset.items()
        trained = training.Trained.load(Path(model_dir))
        frame = frames.load_frame(run.dataset, run.workspace, wanted, IN_TRAINING)
        logits, labels = training.predict(trained, frame, items), training.labels_of(frame, schema)
        settings = _config(CalibrationConfig, calibration)
        platt = calibration_module.fit_platt(logits, labels, schema.actions, settings)
        if settings.exposure == "parity":
            platt = exposure.with_parity(platt, trained, frame, Catalog.build(items, trained.encoder), settings)
        facts = {"fingerprint": fingerprint(key), "run_date": run_date, "dataset": schema.name,
                 "training": trained.facts, "platt": platt.model_dump(),
                 "config": trained_key["config"] | {"calibration": json.loads(calibration)}}  # fmt: skip
        export.export_bundle(trained, platt, frame, items, directory, facts)

    run.step("calibrate", key, out, compute)
    platt = calibration_module.Platt.model_validate(read_json(Path(out) / "bundle.json")["platt"])
    found = {"slope": platt.slope, "intercept": platt.intercept}
    by_action = {f"{part}_{action}": value for part, values in found.items()
                 for action, value in zip(run.dataset.schema.actions, values, strict=True)}  # fmt: skip
    return by_action | {"fresh_shift": platt.fresh_shift}


def validate(data: FreshrankPath, run_date: str, validation: str, out: FreshrankPath) -> dict[str, Any]:
    """Check the newest day; write ``validation.json``, ``validation.html`` and ``data_docs/`` into ``out``.

    Raises:
        ValidationFailed: a blocking expectation failed; the files say so as well.
    """
    from freshrank.validation import inspect_day
    from freshrank.validation_page import write_pages

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
    from freshrank.history import snapshot_path

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
    from freshrank import evaluation as judging
    from freshrank import figures, judged, popularity, report, statistics, thresholds, warm_up
    from freshrank import gate as gate_module

    run = Run(data, run_date)
    facts = read_json(_existing(Path(bundle) / "bundle.json", "freshrank calibrate"))
    wanted = run.days(_split(run, windows).evaluation, "evaluation", IN_EVALUATION)
    champion = judged.champion(run)
    code = _code(judging, statistics, warm_up, thresholds, gate_module, judged, popularity, figures, report)
    key = {"bundle": facts["fingerprint"], "data": run.read(wanted), "days": wanted, "sections": [evaluation, gate],
           "champion": champion.fingerprint if champion else None, "code": code}  # fmt: skip

    def compute(directory: Path) -> None:
        config, schema = _config(EvaluationConfig, evaluation), run.dataset.schema
        rows = judged.JudgedRows.load(run, wanted, config)
        ours, theirs = rows.of_bundle(Path(bundle)), rows.of_champion(champion)
        comparison = judging.compare(ours, theirs, schema, config)
        comparison = thresholds.with_thresholds(comparison, ours, theirs, schema, config)
        challenger, baseline = (
            warm_up.with_warm_up(judging.evaluate(model, schema, config), model, schema, config)
            for model in (ours, theirs)
        )
        increase = facts["training"]["parameter_increase"]
        verdict = gate_module.judge(comparison, challenger, _config(GateConfig, gate), increase)
        log.info("step=evaluate date=%s verdict=%s", run.date, verdict.verdict)
        for reason in verdict.obstacles:
            log.info("step=evaluate date=%s check=%r passed=%s: %s", run.date, reason.check, reason.passed,
                     reason.sentence)  # fmt: skip
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
    _record(run)


def _record(run: Run) -> None:
    """``run.json``: what serves now, and whether this run put it there."""
    from freshrank.serving.repository import ModelRepository

    pointer = ModelRepository(run.workspace.triton).served()
    ours = read_json(run.directory / "headline.json")["fingerprint"]
    write_json(
        run.directory / "run.json",
        {
            "dataset": run.dataset.schema.name,
            "run_date": run.date,
            "verdict": read_json(run.directory / "verdict.json")["verdict"],
            "served_version": pointer.version if pointer else None,
            "served_run_date": pointer.run_date if pointer else None,
            "deployed": pointer is not None and pointer.fingerprint == ours,
        },
    )


def deploy(
    data: FreshrankPath,
    run_date: str,
    bundle: FreshrankPath,
    evaluation: FreshrankPath,
    out: FreshrankPath,
    force: bool = False,
) -> dict[str, Any]:
    """Publish a blessed bundle: load it beside what serves, verify it, point to it.

    Unless ``force``, what serves stays when it is of a later day than the bundle, and when somebody rolled back from
    the bundle to it.

    Raises:
        ServingError: the verdict is not blessed, no server is ready, or the server's answers are not the golden ones.
    """
    from freshrank.serving.publish import publish
    from freshrank.serving.replicas import Replicas
    from freshrank.serving.repository import ModelRepository

    run = Run(data, run_date)
    verdict = read_json(_existing(Path(evaluation) / "verdict.json", "freshrank evaluate"))["verdict"]
    fingerprint_ = read_json(_existing(Path(bundle) / "bundle.json", "freshrank calibrate"))["fingerprint"]
    judged_fingerprint = read_json(Path(evaluation) / "headline.json")["fingerprint"]
    if verdict != "blessed" or judged_fingerprint != fingerprint_:
        raise ServingError(f"deploy: the verdict on bundle {judged_fingerprint} is '{verdict}'; expected 'blessed' for "
                           f"bundle {fingerprint_}; what serves is unchanged")  # fmt: skip
    repository = ModelRepository(run.workspace.triton)
    if served := _newer(repository, run_date, force):
        log.warning("step=deploy date=%s: run %s already serves as version %d and stays; to serve this one instead: "
                    "freshrank publish --data %s --date %s --bundle %s --evaluation %s --force", run.date,
                    served.run_date, served.version, data, run_date, bundle, evaluation)  # fmt: skip
        pointer = served
    else:
        pointer = publish(Path(bundle), Replicas.configured(), repository, force=force)
    _register_service(run, repository, pointer.version)
    _copy_models(run)
    result = {"version": pointer.version, "run_date": pointer.run_date, "fingerprint": pointer.fingerprint}
    log.info("step=deploy date=%s version=%d", run.date, pointer.version)
    with atomic_directory(Path(out)) as directory:
        write_json(directory / "published.json", result)
    _record(run)
    return result


def republish(data: FreshrankPath, run_date: str, force: bool = False) -> int | None:
    """Serve again the version of ``run_date`` that is installed; what serves then, or None where none is of that day.

    Raises:
        ServingError: no server is ready, or the server's answers are not the golden ones.
    """
    from freshrank.serving.publish import publish
    from freshrank.serving.replicas import Replicas
    from freshrank.serving.repository import ModelRepository

    run = Run(data, run_date)
    repository = ModelRepository(run.workspace.triton)
    of_day = [version for version in repository.versions() if repository.info(version).run_date == run_date]
    if not of_day:
        return None
    if served := _newer(repository, run_date, force):
        log.warning("step=publish date=%s: run %s already serves as version %d and stays; --force serves this one",
                    run.date, served.run_date, served.version)  # fmt: skip
        return served.version
    bundle = repository.version_directory(of_day[-1])
    return publish(bundle, Replicas.configured(), repository, force=force).version


def require_kept(data: FreshrankPath, run_date: str) -> None:
    """MissingArtifact where the pipeline judged ``run_date`` and did not deploy it: it leaves no bundle behind."""
    run = Run(data, run_date)
    if (run.directory / "run.json").exists() and not (run.directory / "bundle").exists():
        raise MissingArtifact(
            f"{run.directory}: the run of {run_date} left its report and no bundle, as it was not deployed; to serve "
            f"that day run train, calibrate and evaluate for it, then publish --force, each with --date {run_date}"
        )


def _newer(repository: "ModelRepository", run_date: str, force: bool) -> "Pointer | None":
    """What serves, where it is of a later day than ``run_date`` and ``force`` does not put it out."""
    served = repository.served()
    return served if served and served.run_date > run_date and not force else None


def _copy_models(run: Run) -> None:
    """Into the object store, where there is one; what serves must not wait for it."""
    from freshrank import backup, objects

    try:
        if store := objects.configured():
            backup.back_up_models(run.workspace, store)
    except StorageError as error:
        log.warning("step=deploy date=%s: the models are not copied, `freshrank backup` does it again: %s", run.date,
                    error)  # fmt: skip


def register_served(data: FreshrankPath, run_date: str) -> None:
    """The feature service of the version that serves, where one does."""
    from freshrank.serving.repository import ModelRepository

    run = Run(data, run_date)
    repository = ModelRepository(run.workspace.triton)
    if pointer := repository.served():
        _register_service(run, repository, pointer.version)


def _register_service(run: Run, repository: "ModelRepository", version: int) -> None:
    """The feature service of what serves: what it reads is in its encoder, not in the schema of today."""
    from freshrank.encoding import Encoder
    from freshrank.feature_store import FeatureStore
    from freshrank.serving.feast_import import import_feast

    import_feast()
    schema = Encoder.load(repository.version_directory(version)).schema
    FeatureStore(run.dataset, run.workspace).register_model(version, schema)


def stop(data: FreshrankPath, run_date: str, evaluation: FreshrankPath, out: FreshrankPath) -> dict[str, Any]:
    """End a day that is not blessed: keep its reasons; what serves is unchanged."""
    run = Run(data, run_date)
    verdict = read_json(_existing(Path(evaluation) / "verdict.json", "freshrank evaluate"))
    reasons = [reason["sentence"] for reason in verdict["reasons"] if not reason["passed"]]
    with atomic_directory(Path(out)) as directory:
        (directory / "reasons.txt").write_text("\n".join([verdict["verdict"], *reasons, ""]))
    _record(run)
    return {"verdict": verdict["verdict"], "reasons": reasons}


def summary(data: FreshrankPath, run_date: str) -> "RunSummary":
    """How the run of ``run_date`` ended; a :class:`MissingArtifact` where it has not been judged."""
    from freshrank.judged import summarise

    run = Run(data, run_date)
    _existing(run.directory / "run.json", f"freshrank run --date {run_date}")
    return summarise(run.directory)


def _existing(path: Path, command: str) -> Path:
    if not path.exists():
        raise MissingArtifact(f"{path}: not found; run `{command}` first")
    return path
