"""`freshrank run`, its steps one by one, and `submit`."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from freshrank.cli.options import Data, Day, Overrides, Recipe, local_data, run_date_of
from freshrank.cli.terminal import err, note, out, say, warn
from freshrank.errors import ConfigError
from freshrank.recipes import DEFAULT_RECIPE, recipe

commands = typer.Typer()

Out = Annotated[Path | None, typer.Option("--out", help="Output directory. Default: inside the run's folder.")]


# ---------------------------------------------------------------- the daily run
@commands.command()
def run(data: Data, day: Day = None, recipe_name: Recipe = DEFAULT_RECIPE, overrides: Overrides = None) -> None:
    """One day's retraining without Airflow: features, validation, Feast, the Kubeflow pipeline, the gate, Triton."""
    from freshrank.components import build
    from freshrank.orchestration import daily

    config = recipe(recipe_name, overrides)
    with _server(data):
        quiet = not logging.getLogger("freshrank").isEnabledFor(logging.INFO)
        daily.run(build, data, date.fromisoformat(run_date_of(data, day)), config, err if quiet else None)
    _print_run(data, run_date_of(data, day))


@commands.command()
def validate(
    data: Data, day: Day = None, target: Out = None, recipe_name: Recipe = DEFAULT_RECIPE, overrides: Overrides = None
) -> None:
    """Check the newest day against the trailing week and the fresh cohort; exit code 4 when it blocks.

    Warnings, and what could not be asked, are printed. What a failed expectation leads to can be set by its name, e.g.
    ``--set 'validation.severity={"click_like_trailing_week": "off"}'`` (blocking, warning or off).
    """
    from freshrank.config import Severity
    from freshrank.pipeline import steps
    from freshrank.storage.files import read_json
    from freshrank.validation.validate import ValidationReport

    where = target or _folder(data, day, "validation")
    config = recipe(recipe_name, overrides).validation
    result = steps.validate(data, run_date_of(data, day), config, where)
    say(f"{result['passed']} of {result['expectations']} expectations hold; page: {where / 'validation.html'}")
    report = ValidationReport.model_validate(read_json(where / "validation.json"))
    warned = [f"warning {result.name}: {result}" for result in report.failures(Severity.WARNING)]
    for line in (*warned, *report.notes):
        say(line)


@commands.command()
def train(
    data: Data, day: Day = None, target: Out = None, recipe_name: Recipe = DEFAULT_RECIPE, overrides: Overrides = None
) -> None:
    """Train the ranker on the training days."""
    from freshrank.pipeline import steps

    config, where = recipe(recipe_name, overrides), target or _folder(data, day, "train")
    facts = steps.train(
        data,
        run_date_of(data, day),
        config.windows,
        config.model,
        config.techniques,
        config.training,
        where,
    )
    _print_facts(f"ranker: {where}", facts)


@commands.command()
def calibrate(
    data: Data,
    day: Day = None,
    ranker: Annotated[Path | None, typer.Option(help="Output of `freshrank train`. Default: the run's.")] = None,
    target: Out = None,
    recipe_name: Recipe = DEFAULT_RECIPE,
    overrides: Overrides = None,
) -> None:
    """Fit the calibration and export the bundle (ONNX, encoder, golden answers)."""
    from freshrank.pipeline import steps

    config, where = recipe(recipe_name, overrides), target or _folder(data, day, "bundle")
    facts = steps.calibrate(
        data,
        run_date_of(data, day),
        config.windows,
        config.calibration,
        ranker or _folder(data, day, "train"),
        where,
    )
    _print_facts(f"bundle: {where}", facts)


@commands.command()
def evaluate(
    data: Data,
    day: Day = None,
    bundle: Annotated[Path | None, typer.Option(help="Output of `freshrank calibrate`. Default: the run's.")] = None,
    target: Out = None,
    recipe_name: Recipe = DEFAULT_RECIPE,
    overrides: Overrides = None,
) -> None:
    """Evaluate the bundle on the evaluation days against the served model; write verdict and report."""
    from freshrank.pipeline import steps

    config, where = recipe(recipe_name, overrides), target or _folder(data, day, "evaluation")
    steps.evaluate(
        data,
        run_date_of(data, day),
        config.windows,
        config.evaluation,
        config.gate,
        bundle or _folder(data, day, "bundle"),
        where,
    )
    _print_run(data, run_date_of(data, day))


@commands.command()
def publish(
    data: Data,
    day: Day = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Output of `freshrank calibrate`. Default: the run's, or what is installed of that day."),
    ] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Output of `freshrank evaluate`. Default: the run's.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also a version that was rolled back, or older than what serves.")
    ] = False,
) -> None:
    """Load a blessed bundle into Triton beside the served model, verify it, and switch to it.

    A day whose version is installed, as `freshrank run` leaves it, is served again (with --force, where it was rolled
    back or is older than what serves).
    """
    from freshrank.pipeline import deploy
    from freshrank.serving.cpu import lower_priority

    lower_priority()
    if bundle is evaluation is None and not _folder(data, day, "bundle").exists():
        version = deploy.republish(data, run_date_of(data, day), force)
        if version is not None:
            say(f"served version: {version}")
            return
        deploy.require_bundle(data, run_date_of(data, day))
    judged = evaluation or _folder(data, day, "evaluation")
    result = deploy.deploy(
        data,
        run_date_of(data, day),
        bundle or _folder(data, day, "bundle"),
        judged,
        _folder(data, day, "published"),
        force,
    )
    say(f"served version: {result['version']}")


@commands.command()
def submit(
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            parser=local_data,
            metavar="DIR|URL",
            help=("Imported dataset directory, or the URL of its copy in an object store."),
        ),
    ] = None,
    day: Day = None,
    recipe_name: Recipe = DEFAULT_RECIPE,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print package, arguments and names that would be sent; send nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the run; exit code 7 if it does not succeed.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print name, key, id, page and arguments of the run.")
    ] = False,
    cancel: Annotated[str | None, typer.Option("--cancel", help="Cancel the run of this id instead.")] = None,
) -> None:
    """Submit the same pipeline to Kubeflow Pipelines (FRESHRANK_KFP_HOST); the same question twice is one run."""
    from freshrank.components import build
    from freshrank.orchestration.kubeflow import submit as cluster

    if cancel is not None:
        say(f"run {cancel}: {'cancelled' if cluster.cancel(cancel) else 'had ended already, or is not known'}")
        return
    if data is None:
        raise ConfigError("--data: not given, expected an imported dataset directory")
    run_date = date.fromisoformat(run_date_of(data, day))
    submission = cluster.prepare(build, data, run_date, recipe(recipe_name, overrides))
    for warning in cluster.preflight_warnings(submission):
        warn(warning)
    submission = submission if dry_run else cluster.start(submission)
    text = json.dumps(submission.facts(), indent=2) if as_json else str(submission)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    if wait and submission.run_id is not None:
        _wait_for(submission.run_id)


def _wait_for(run_id: str) -> None:
    from freshrank.orchestration.kubeflow import submit as cluster

    try:
        with err.status(f"run {run_id}") as line:
            cluster.wait(run_id, poll_seconds=10, progress=lambda now: line.update(f"run {run_id}: {escape(now)}"))
    except KeyboardInterrupt:
        note(f"run {run_id} goes on; to cancel it: freshrank submit --cancel {run_id}")
        sys.exit(130)
    note(f"run {run_id}: succeeded")


# ---------------------------------------------------------------- shared
def _folder(data: Path, day: str | None, name: str) -> Path:
    from freshrank.pipeline.run import Run

    return Run(data, run_date_of(data, day)).directory / name


@contextmanager
def _server(data: Path) -> Iterator[None]:
    """A Triton to publish to: the one that runs, one started now and left running, or replicas that settings name."""
    from freshrank.cli import demo
    from freshrank.serving.deploy.local import server
    from freshrank.settings import settings

    if not settings().triton_replicas_host and not server(data).status().ready:
        demo.start_server(data, err)
    yield


def _print_run(data: Path, run_date: str) -> None:
    from freshrank.pipeline import steps
    from freshrank.reports.report import print_summary

    print_summary(steps.summary(data, run_date), out)


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    say(title)
    for name, value in facts.items():
        say(f"  {name}: {value:,.4g}" if isinstance(value, float) else f"  {name}: {value}")
