"""The pipeline's steps as lightweight components; each body only calls freshrank.

A body is shipped as source and runs in its own process: it imports what it uses. ``data`` is a directory and
``run_date`` an ISO day; ``windows`` .. ``gate`` are sections of :class:`freshrank.config.RunConfig` as JSON.
``data_version`` is not read: it makes Kubeflow's cache miss when the data behind the same path changed.
"""

from functools import partial

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Metrics, Model, Output

from freshrank import __version__

IMAGE = f"freshrank/freshrank-python:{__version__}"
"""A run in local subprocesses wants "python" in the name; on a cluster it is replaced by the configured image."""

component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)


@component
def validate_data(
    data: str, run_date: str, data_version: str, validation: str, findings: Output[Artifact], report: Output[HTML]
) -> None:
    from freshrank.orchestration.kubeflow.artifacts import validate

    validate(data, run_date, validation, findings.path, report.path)


@component
def train(
    data: str,
    run_date: str,
    data_version: str,
    windows: str,
    model: str,
    techniques: str,
    training: str,
    ranker: Output[Model],
    metrics: Output[Metrics],
) -> None:
    from freshrank.orchestration.kubeflow.artifacts import log_metrics
    from freshrank.orchestration.kubeflow.trainjob import train

    log_metrics(metrics, train(data, run_date, windows, model, techniques, training, ranker.path))


@component
def calibrate(
    data: str,
    run_date: str,
    windows: str,
    calibration: str,
    ranker: Input[Model],
    bundle: Output[Model],
    metrics: Output[Metrics],
) -> None:
    from freshrank.orchestration.kubeflow import artifacts

    artifacts.log_metrics(metrics, artifacts.calibrate(data, run_date, windows, calibration, ranker.path, bundle.path))


@component
def evaluate(
    data: str,
    run_date: str,
    windows: str,
    evaluation: str,
    gate: str,
    bundle: Input[Model],
    evidence: Output[Artifact],
    metrics: Output[Metrics],
    report: Output[HTML],
) -> str:
    from freshrank.orchestration.kubeflow.artifacts import judge

    return judge(data, run_date, windows, evaluation, gate, bundle.path, evidence.path, metrics, report.path)


@component
def deploy(
    data: str, run_date: str, bundle: Input[Model], evidence: Input[Artifact], published: Output[Artifact]
) -> int:
    from freshrank.pipeline import deploy as deploy_module

    return int(deploy_module.deploy(data, run_date, bundle.path, evidence.path, published.path)["version"])


@component
def stop(data: str, run_date: str, evidence: Input[Artifact], reasons: Output[Artifact]) -> None:
    from freshrank.pipeline import deploy as deploy_module

    deploy_module.stop(data, run_date, evidence.path, reasons.path)
