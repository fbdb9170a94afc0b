"""What follows a verdict: publish the bundle, register it with Feast, or keep what serves."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freshrank.errors import MissingArtifact, ServingError, StorageError
from freshrank.storage.files import atomic_directory, read_json, write_json

if TYPE_CHECKING:
    from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.pipeline.run import FreshrankPath, Run, record_outcome, require_artifact

log = logging.getLogger(__name__)


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
    from freshrank.serving.deploy.publish import publish
    from freshrank.serving.deploy.replicas import Replicas
    from freshrank.serving.repository import ModelRepository

    run = Run(data, run_date)
    verdict = read_json(require_artifact(Path(evaluation) / "verdict.json", "freshrank evaluate"))["verdict"]
    fingerprint_ = read_json(require_artifact(Path(bundle) / "bundle.json", "freshrank calibrate"))["fingerprint"]
    judged_fingerprint = read_json(Path(evaluation) / "headline.json")["fingerprint"]
    if verdict != "blessed" or judged_fingerprint != fingerprint_:
        raise ServingError(
            f"deploy: the verdict on bundle {judged_fingerprint} is '{verdict}'; expected 'blessed' for "
            f"bundle {fingerprint_}; what serves is unchanged"
        )
    repository = ModelRepository(run.workspace.triton)
    if served := _newer(repository, run_date, force):
        log.warning(
            "step=deploy date=%s: run %s already serves as version %d and stays; to serve this one instead: "
            "freshrank publish --data %s --date %s --bundle %s --evaluation %s --force",
            run.date,
            served.run_date,
            served.version,
            data,
            run_date,
            bundle,
            evaluation,
        )
        pointer = served
    else:
        pointer = publish(Path(bundle), Replicas.configured(), repository, force=force)
    _register_service(run, repository, pointer.version)
    _copy_models(run)
    result = {"version": pointer.version, "run_date": pointer.run_date, "fingerprint": pointer.fingerprint}
    log.info("step=deploy date=%s version=%d", run.date, pointer.version)
    with atomic_directory(Path(out)) as directory:
        write_json(directory / "published.json", result)
    record_outcome(run)
    return result


def republish(data: FreshrankPath, run_date: str, force: bool = False) -> int | None:
    """Serve again the version of ``run_date`` that is installed; what serves then, or None where none is of that day.

    Raises:
        ServingError: no server is ready, or the server's answers are not the golden ones.
    """
    from freshrank.serving.deploy.publish import publish
    from freshrank.serving.deploy.replicas import Replicas
    from freshrank.serving.repository import ModelRepository

    run = Run(data, run_date)
    repository = ModelRepository(run.workspace.triton)
    of_day = [version for version in repository.versions() if repository.info(version).run_date == run_date]
    if not of_day:
        return None
    if served := _newer(repository, run_date, force):
        log.warning(
            "step=publish date=%s: run %s already serves as version %d and stays; --force serves this one",
            run.date,
            served.run_date,
            served.version,
        )
        return served.version
    bundle = repository.version_directory(of_day[-1])
    return publish(bundle, Replicas.configured(), repository, force=force).version


def require_bundle(data: FreshrankPath, run_date: str) -> None:
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
    from freshrank.pipeline import backup
    from freshrank.storage import object_store

    try:
        if store := object_store.configured():
            backup.back_up_models(run.workspace, store)
    except StorageError as error:
        log.warning(
            "step=deploy date=%s: the models are not copied, `freshrank backup` does it again: %s", run.date, error
        )


def register_served(data: FreshrankPath, run_date: str) -> None:
    """The feature service of the version that serves, where one does."""
    from freshrank.serving.repository import ModelRepository

    run = Run(data, run_date)
    repository = ModelRepository(run.workspace.triton)
    if pointer := repository.served():
        _register_service(run, repository, pointer.version)


def _register_service(run: Run, repository: "ModelRepository", version: int) -> None:
    """The feature service of what serves: what it reads is in its encoder, not in the schema of today."""
    from freshrank.features.encoder import Encoder
    from freshrank.features.store import FeatureStore
    from freshrank.serving.ranking.feast_import import import_feast

    import_feast()
    schema = Encoder.load(repository.version_directory(version)).schema
    FeatureStore(run.dataset, run.workspace).register_model(version, schema)


def stop(data: FreshrankPath, run_date: str, evaluation: FreshrankPath, out: FreshrankPath) -> dict[str, Any]:
    """End a day that is not blessed: keep its reasons; what serves is unchanged."""
    run = Run(data, run_date)
    verdict = read_json(require_artifact(Path(evaluation) / "verdict.json", "freshrank evaluate"))
    reasons = [reason["sentence"] for reason in verdict["reasons"] if not reason["passed"]]
    with atomic_directory(Path(out)) as directory:
        (directory / "reasons.txt").write_text("\n".join([verdict["verdict"], *reasons, ""]))
    record_outcome(run)
    return {"verdict": verdict["verdict"], "reasons": reasons}
