"""`freshrank ...`: the pieces as commands. An error a user can mend is one sentence and an exit code."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from freshrank import __version__
from freshrank.bench.commands import bench
from freshrank.errors import ConfigError, FreshrankError
from freshrank.options import Data, Day, Overrides, Protocol, Recipe, local_data, run_date_of
from freshrank.recipes import DEFAULT_RECIPE, recipe
from freshrank.terminal import err, note, out, say, warn

if TYPE_CHECKING:
    from freshrank.datasets.contract import Dataset
    from freshrank.datasets.mappings import Texts
    from freshrank.serving.client import Answer
    from freshrank.serving.replicas import Replicas
    from freshrank.serving.repository import ModelRepository

app = typer.Typer(name="freshrank", no_args_is_help=True, pretty_exceptions_enable=False, help=(
    "Retrain a ranker every day so that new items are served well, prove it, and serve it from Triton."))  # fmt: skip
imports = typer.Typer(no_args_is_help=True, help="Bring a log into the data contract.")
features = typer.Typer(no_args_is_help=True, help="Historical and content features, offline and online.")
app.add_typer(imports, name="import")
app.add_typer(features, name="features")
app.add_typer(bench, name="bench")
experiment = typer.Typer(no_args_is_help=True, help="Two versions at once: who is answered by which, and who shadows.")
app.add_typer(experiment, name="experiment")
Out = Annotated[Path | None, typer.Option("--out", help="Output directory. Default: inside the run's folder.")]
Source = Annotated[Path, typer.Argument(help="Directory to read.")]
At = Annotated[str | None, typer.Option("--at", help="Time with its zone, ISO 8601. Default: now.")]
Target = Annotated[Path, typer.Option("--out", help="Directory to write the dataset to (replaced as a whole).")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what every step does.")] = False,
) -> None:
    if version:
        say(__version__)
        raise typer.Exit
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr,
                        format="%(asctime)s %(levelname)s %(name)s %(message)s")  # fmt: skip


# ---------------------------------------------------------------- data in


@imports.command("kuairand")
def import_kuairand(
    source: Source,
    target: Target,
    protocol: Protocol = "staggered",
) -> None:
    """Import KuaiRand-Pure: the published CSV files or the Parquet slice."""
    from freshrank.datasets import kuairand

    _report_import(kuairand.import_kuairand(source, target, protocol))


@imports.command("parquet")
def import_parquet(
    source: Source,
    target: Target,
    allow_unknown_items: Annotated[bool, typer.Option("--allow-unknown-items", help=(
        "Keep impressions of items absent from items: counted in manifest.json and used as items without content. "
        "Without it they are refused."))] = False,
    add: Annotated[bool, typer.Option("--add", help=(
        "Keep the days that --out holds and SOURCE does not; a day in both is SOURCE's. Items and users are replaced "
        "as ever, so bring both whole."))] = False,
    replace_days: Annotated[bool, typer.Option("--replace-days", help=(
        "With --add: also replace a day of which SOURCE holds fewer rows than --out."))] = False,
) -> None:  # fmt: skip
    """Import any log: a directory with schema.yaml and the tables impressions, items and users as Parquet."""
    from freshrank.datasets import parquet
    from freshrank.datasets.contract import existing

    before = existing(target) if add else None
    _report_import(parquet.import_parquet(source, target, allow_unknown_items, add, replace_days), before)


@app.command()
def simulate(
    target: Target,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    users: Annotated[int | None, typer.Option(help="Number of users.")] = None,
    days: Annotated[int | None, typer.Option(help="Number of days of log.")] = None,
    impressions_per_day: Annotated[int | None, typer.Option(help="Impressions a day.")] = None,
) -> None:
    """Write a small simulated world with known truth, in the data contract."""
    from freshrank.datasets import simulator

    given = {"seed": seed, "users": users, "days": days, "impressions_per_day": impressions_per_day}
    world = simulator.WorldConfig.of(**{name: value for name, value in given.items() if value is not None})
    _report_import(simulator.simulate(target, world))


def _report_import(dataset: "Dataset", before: "Dataset | None" = None) -> None:
    """``before`` is what an import with ``--add`` found there."""
    rows = sum(day["rows"] for day in dataset.manifest["days"].values())
    actions = ", ".join(dataset.schema.actions)
    missing, shown = dataset.missing_days, 10
    more = f" and {len(missing) - shown} more" if len(missing) > shown else ""
    span = "1 day" if len(dataset.days) == 1 else f"{len(dataset.days)} days"
    say(f"{dataset.path}: {rows:,} impressions on {span}, {dataset.days[0]} .. "
        f"{dataset.days[-1]}; schema '{dataset.schema.name}', actions {actions}"
        + (f"; no impressions on {', '.join(map(str, missing[:shown]))}{more}" if missing else ""))  # fmt: skip
    if before:
        then, now = before.manifest["days"], dataset.manifest["days"]
        added, replaced = now.keys() - then.keys(), [day for day in now if day in then and now[day] != then[day]]
        say(f"added: {', '.join(sorted(added)) or 'no day'}; replaced: {', '.join(replaced) or 'no day'}")


# ---------------------------------------------------------------- features


@features.command("build")
def features_build(
    data: Data, day: Day = None, recipe_name: Recipe = DEFAULT_RECIPE, overrides: Overrides = None
) -> None:
    """Build the daily history snapshots of a run's windows, and materialize Feast's online store for its date."""
    from freshrank import steps

    run_date = run_date_of(data, day)
    steps.build_features(data, run_date, recipe(recipe_name, overrides).windows.model_dump_json())
    kept = steps.materialize(data, run_date)
    online = f"; the online store holds the later state of {kept} and keeps it" if kept else " and materialized"
    say(f"features of {run_date} are built{online}")


@features.command("get")
def features_get(
    data: Data,
    user: Annotated[str | None, typer.Option(help="User id, as in your log.")] = None,
    item: Annotated[list[str] | None, typer.Option(help="Item id, as in your log (repeat).")] = None,
    at: At = None,
) -> None:
    """Print what the online store knows of a user or of items, as JSON; unknown ids give nulls."""
    from freshrank.clock import parse_instant
    from freshrank.datasets.mappings import MAPPINGS
    from freshrank.feature_store import FeatureStore
    from freshrank.schema import ITEM_ID, USER_ID
    from freshrank.serving.client import Codes
    from freshrank.steps import Run

    if user is None and not item:
        raise ConfigError("features get: received no id, expected --user ID or --item ID")
    if at and not item:
        raise ConfigError(f"--at: received {at!r} without --item, expected both: only hourly counters of items "
                          "depend on the time; leave --at out, or name an item")  # fmt: skip
    run = Run(data, run_date_of(data, None))
    store, codes = FeatureStore(run.dataset, run.workspace), Codes(run.dataset.path / MAPPINGS)
    texts = run.dataset.texts()
    if user is not None:
        _print_rows(store.online_users([codes.id(USER_ID, user)]).to_dicts(), USER_ID, [user], texts)
    if item:
        ids, when = [codes.id(ITEM_ID, each) for each in item], parse_instant(at) if at else None
        _print_rows(store.online_items(ids, when).to_dicts(), ITEM_ID, item, texts)


@features.command("push")
def features_push(data: Data, at: At = None) -> None:
    """Push the hourly counters of fresh items that stand at a time into the online store (history.hourly)."""
    from freshrank import steps
    from freshrank.clock import parse_instant
    from freshrank.datasets.contract import Dataset
    from freshrank.hourly import standing_hour

    hour = standing_hour(parse_instant(at) if at else datetime.now(UTC), Dataset.open(data).schema)
    say(f"counters until {hour.isoformat()}: {steps.push_hourly(data, hour)} items")


def _print_rows(rows: list[dict[str, Any]], key: str, given: list[str], texts: "Texts") -> None:
    """Ids and categories as the log has them, not their codes; under ``key`` the id that was given."""
    for row, value in zip(rows, given, strict=True):
        shown = {name: texts.said(name, each) for name, each in row.items()}
        out.print_json(json.dumps(shown | {key: value}, default=str))


# ---------------------------------------------------------------- the daily run


@app.command()
def run(data: Data, day: Day = None, recipe_name: Recipe = DEFAULT_RECIPE, overrides: Overrides = None) -> None:
    """One day's retraining without Airflow: features, validation, Feast, the Kubeflow pipeline, the gate, Triton."""
    from freshrank import daily

    config = recipe(recipe_name, overrides)
    with _server(data):
        quiet = not logging.getLogger("freshrank").isEnabledFor(logging.INFO)
        daily.run(data, date.fromisoformat(run_date_of(data, day)), config, err if quiet else None)
    _print_run(data, run_date_of(data, day))


@app.command()
def validate(
    data: Data, day: Day = None, target: Out = None, recipe_name: Recipe = DEFAULT_RECIPE, overrides: Overrides = None
) -> None:
    """Check the newest day against the trailing week and the fresh cohort; exit code 4 when it blocks.

    Warnings, and what could not be asked, are printed. What a failed expectation leads to can be set by its name, e.g.
    ``--set 'validation.severity={"click_like_trailing_week": "off"}'`` (blocking, warning or off).
    """
    from freshrank import steps
    from freshrank.config import Severity
    from freshrank.storage import read_json
    from freshrank.validation import ValidationReport

    where = target or _folder(data, day, "validation")
    config = recipe(recipe_name, overrides).validation
    result = steps.validate(data, run_date_of(data, day), config.model_dump_json(), where)
    say(f"{result['passed']} of {result['expectations']} expectations hold; page: {where / 'validation.html'}")
    report = ValidationReport.model_validate(read_json(where / "validation.json"))
    warned = [f"warning {result.name}: {result}" for result in report.failures(Severity.WARNING)]
    for line in (*warned, *report.notes):
        say(line)


@app.command()
def train(
    data: Data, day: Day = None, target: Out = None, recipe_name: Recipe = DEFAULT_RECIPE, overrides: Overrides = None
) -> None:
    """Train the ranker on the training days."""
    from freshrank import steps

    config, where = recipe(recipe_name, overrides), target or _folder(data, day, "train")
    facts = steps.train(data, run_date_of(data, day), config.windows.model_dump_json(), config.model.model_dump_json(),
                        config.techniques.model_dump_json(), config.training.model_dump_json(), where)  # fmt: skip
    _print_facts(f"ranker: {where}", facts)


@app.command()
def calibrate(
    data: Data,
    day: Day = None,
    ranker: Annotated[Path | None, typer.Option(help="Output of `freshrank train`. Default: the run's.")] = None,
    target: Out = None,
    recipe_name: Recipe = DEFAULT_RECIPE,
    overrides: Overrides = None,
) -> None:
    """Fit the calibration and export the bundle (ONNX, encoder, golden answers)."""
    from freshrank import steps

    config, where = recipe(recipe_name, overrides), target or _folder(data, day, "bundle")
    facts = steps.calibrate(data, run_date_of(data, day), config.windows.model_dump_json(),
                            config.calibration.model_dump_json(), ranker or _folder(data, day, "train"),
                            where)  # fmt: skip
    _print_facts(f"bundle: {where}", facts)


@app.command()
def evaluate(
    data: Data,
    day: Day = None,
    bundle: Annotated[Path | None, typer.Option(help="Output of `freshrank calibrate`. Default: the run's.")] = None,
    target: Out = None,
    recipe_name: Recipe = DEFAULT_RECIPE,
    overrides: Overrides = None,
) -> None:
    """Judge the bundle on the evaluation days against what serves; write verdict and report."""
    from freshrank import steps

    config, where = recipe(recipe_name, overrides), target or _folder(data, day, "evaluation")
    steps.evaluate(data, run_date_of(data, day), config.windows.model_dump_json(), config.evaluation.model_dump_json(),
                   config.gate.model_dump_json(), bundle or _folder(data, day, "bundle"), where)  # fmt: skip
    _print_run(data, run_date_of(data, day))


@app.command()
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
    """Load a blessed bundle into Triton beside what serves, verify it, and point to it.

    A day whose version is installed, as `freshrank run` leaves it, is served again (with --force, where it was rolled
    back or is older than what serves).
    """
    from freshrank import steps
    from freshrank.scheduling import give_way

    give_way()
    if bundle is evaluation is None and not _folder(data, day, "bundle").exists():
        version = steps.republish(data, run_date_of(data, day), force)
        if version is not None:
            say(f"served version: {version}")
            return
        steps.require_kept(data, run_date_of(data, day))
    judged = evaluation or _folder(data, day, "evaluation")
    result = steps.deploy(data, run_date_of(data, day), bundle or _folder(data, day, "bundle"), judged,
                          _folder(data, day, "published"), force)  # fmt: skip
    say(f"served version: {result['version']}")


@app.command()
def rollback(
    data: Data, to: Annotated[int | None, typer.Option(help="Installed version. Default: the previous one.")] = None
) -> None:
    """Serve the previous version again, at once."""
    from freshrank.serving.publish import rollback as roll_back
    from freshrank.serving.replicas import Replicas

    repository = _repository(data)
    before = repository.served()
    pointer = roll_back(Replicas.configured(), repository, to)
    if pointer == before:
        since = f" (rolled back from {pointer.rolled_back_from})" if pointer.rolled_back_from else ""
        say(f"version {pointer.version} already serves{since}")
    else:
        say(f"served version: {pointer.rolled_back_from} -> {pointer.version} (run {pointer.run_date})")


@app.command()
def backup(data: Data) -> None:
    """Copy the dataset and its models to the object store (FRESHRANK_STORAGE_URL); only what changed is sent.

    This is also what makes a lost bucket whole again. A deployed version is copied by the run that deploys it.
    """
    from freshrank import backup
    from freshrank.datasets.contract import Dataset
    from freshrank.workspace import Workspace

    keeper, dataset = backup.store(), Dataset.open(data)
    where = backup.back_up_dataset(dataset, keeper)
    pointer = backup.back_up_models(Workspace.of(dataset.schema.name), keeper)
    served = f"version {pointer.version} of run {pointer.run_date} serves" if pointer else "nothing serves yet"
    say(f"kept: {where} and its models; {served}")


@app.command()
def restore(
    data: Annotated[Path, typer.Option("--data", help="Where the dataset is, or is to be put back.")],
    name: Annotated[str | None, typer.Option(help="Its name in schema.yaml. Default: the directory's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what serves by what was kept.")] = False,
) -> None:
    """Put what a workspace lost back from the object store: dataset, models, what serves; then features, online store.

    What is there stays, so it may be repeated.
    """
    from freshrank import backup, steps
    from freshrank.workspace import Workspace

    keeper = backup.store()
    dataset = backup.restore_dataset(data, keeper, name)
    note(f"dataset {data}: {dataset.days[0]} .. {dataset.days[-1]}")
    pointer = backup.restore_models(Workspace.of(dataset.schema.name), keeper, force)
    if pointer:
        note(f"models: version {pointer.version} of run {pointer.run_date}")
    run_date = run_date_of(data, None)
    steps.build_features(data, run_date)
    steps.materialize(data, run_date)
    steps.register_served(data, run_date)
    served = f"version {pointer.version} of run {pointer.run_date} serves" if pointer else "nothing had been served"
    say(f"restored: {data} and its models, features of {run_date}; {served}. Restart servers that ran meanwhile.")


@app.command()
def prune(
    data: Data,
    keep_days: Annotated[int | None, typer.Option(min=0, help="Days before the log's next run of which runs, reports "
                                                  "and what they read stay. Default: FRESHRANK_KEEP_DAYS, else 30.")
                         ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:  # fmt: skip
    """Remove from the workspace what no later run, no roll-back and no report of the last days needs.

    What was written within a day stays. Models, datasets and the online store are never touched.
    """
    from freshrank import pruning
    from freshrank.datasets.contract import Dataset
    from freshrank.settings import settings
    from freshrank.workspace import Workspace

    dataset = Dataset.open(data)
    keep = (settings().keep_days or pruning.KEEP_DAYS) if keep_days is None else keep_days
    found = pruning.prune(dataset, Workspace.of(dataset.schema.name), keep, dry_run)
    say("would be removed:" if dry_run else "removed:")
    for each in [*found, pruning.total(found)]:
        say(f"  {each}")


@app.command()
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
    from freshrank.orchestration import cluster

    if cancel is not None:
        say(f"run {cancel}: {'cancelled' if cluster.cancel(cancel) else 'had ended already, or is not known'}")
        return
    if data is None:
        raise ConfigError("--data: not given, expected an imported dataset directory")
    run_date = date.fromisoformat(run_date_of(data, day))
    submission = cluster.prepare(data, run_date, recipe(recipe_name, overrides))
    for doubt in cluster.doubts(submission):
        warn(doubt)
    submission = submission if dry_run else cluster.start(submission)
    text = json.dumps(submission.facts(), indent=2) if as_json else str(submission)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    if wait and submission.run_id is not None:
        _wait_for(submission.run_id)


def _wait_for(run_id: str) -> None:
    from freshrank.orchestration import cluster

    try:
        with err.status(f"run {run_id}") as line:
            cluster.wait(run_id, poll_seconds=10, progress=lambda now: line.update(f"run {run_id}: {escape(now)}"))
    except KeyboardInterrupt:
        note(f"run {run_id} goes on; to cancel it: freshrank submit --cancel {run_id}")
        sys.exit(130)
    note(f"run {run_id}: succeeded")


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option("--data", help="KuaiRand's files, or schema.yaml + tables, or an "
                                              "imported dataset. Default: a small simulated world.")] = None,
    day: Day = None,
    protocol: Protocol = "staggered",
) -> None:  # fmt: skip
    """The whole daily run through a real Airflow, Kubeflow, Feast and Triton; then rank 100 candidates for a user."""
    from freshrank import daily
    from freshrank.report import print_summary

    print_summary(daily.demo(data, day, protocol, out), out)


# ---------------------------------------------------------------- serving


@app.command()
def serve(
    data: Data,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay attached; stop with Ctrl-C.")] = False,
) -> None:
    """Start the local Triton with the model repository of this dataset; it answers on loopback only."""
    from freshrank import daily
    from freshrank.serving.local import server

    def start() -> None:
        daily.start_server(data, out)

    if foreground:
        server(data).run(start)
    else:
        start()


@app.command()
def stop(data: Data) -> None:
    """Stop the local Triton."""
    from freshrank.serving.local import server

    say("stopped" if server(data).stop() else "was not running")


@app.command()
def status(data: Data) -> None:
    """What serves, since which run, and whether the server answers; exit code 1 when it does not.

    Of several replicas (FRESHRANK_TRITON_REPLICAS, _HOST) each is listed; one that lacks what serves is exit code 1.
    """
    from freshrank.serving.local import server
    from freshrank.serving.replicas import Replicas
    from freshrank.settings import settings

    replicas = Replicas.configured()
    if not replicas.is_one:
        raise typer.Exit(_replicas_status(replicas, _repository(data)))
    now, pointer = server(data).status(), _repository(data).served()
    say(now.sentence())
    if pointer is None:
        say("nothing is published yet")
    elif now.ready:
        say(f"served version: {pointer.version} (run {pointer.run_date})")
    else:
        say(f"would serve version {pointer.version} (run {pointer.run_date}) once started")
    say(f"workspace: {settings().home}")
    raise typer.Exit(0 if now.ready else 1)


def _replicas_status(replicas: "Replicas", repository: "ModelRepository") -> int:
    from freshrank.serving.replicas import statuses

    found, pointer = statuses(replicas, repository), repository.served()
    for each in found:
        say(each.sentence())
    served = f"served version: {pointer.version} (run {pointer.run_date})" if pointer else "nothing is published yet"
    lacking = [each.address for each in found if pointer and pointer.version not in each.versions]
    say(served + (f"; not loaded on {', '.join(lacking)}" if lacking else ""))
    return 1 if lacking or any(each.problem for each in found) else 0


@app.command("settings")
def show_settings(
    cluster: Annotated[bool, typer.Option("--cluster", help="What only a cluster needs, too: FRESHRANK_KFP_*, "
                                          "FRESHRANK_CLUSTER_*.")] = False,
) -> None:  # fmt: skip
    """Every environment variable, what it means and how it is set, as an env file; defaults are commented out."""
    from freshrank.orchestration.cluster import ALL_SETTINGS
    from freshrank.settings import as_env_file, unknown_variables

    for kind in ALL_SETTINGS if cluster else ALL_SETTINGS[:1]:
        for line in as_env_file(kind):
            say(line, highlight=False)
    for problem in unknown_variables(*ALL_SETTINGS):
        warn(problem)


@app.command()
def rank(
    data: Data,
    user: Annotated[str, typer.Option(help="User id, as in your log; unknown ones are answered too.")],
    candidates: Annotated[str, typer.Option(help="Item ids, comma-separated; unknown ones are answered too.")],
    at: Annotated[str | None, typer.Option(help="Time of the request, ISO 8601 with zone. Default: now.")] = None,
    context: Annotated[list[str] | None, typer.Option(help="Context column: name=value (repeat).")] = None,
    query: Annotated[str | None, typer.Option(help="Item the request starts from, where the log has one.")] = None,
    version: Annotated[
        int | None,
        typer.Option(
            help="Loaded version that is to answer. Default: the one that serves, or the one of the user's arm."
        ),
    ] = None,
    request_id: Annotated[str, typer.Option(help="Name under which the request log keeps it.")] = "",
    top: Annotated[int, typer.Option(help="How many to print; 0 for all.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Ask Triton to rank candidate items for a user."""
    from freshrank.serving.client import Client

    with Client.for_dataset(data) as client:
        items = [candidate.strip() for candidate in candidates.split(",") if candidate.strip()]
        answer = client.rank(user, items, at, context, query, version=version, request_id=request_id)
    _print_answer(answer, top, as_json)


def _print_answer(answer: "Answer", top: int, as_json: bool) -> None:
    from freshrank.report import ranking_table

    if as_json:
        who = {"model_version": answer.model_version, "arm": answer.arm, "degraded": answer.degraded}
        for row in answer.rows()[: top or None]:
            sys.stdout.write(json.dumps(row | who) + "\n")
    else:
        out.print(ranking_table(answer, top))


ShareOf = Annotated[list[str] | None, typer.Option(metavar="VERSION=SHARE", help="Repeat for several.")]


@experiment.command("start")
def experiment_start(
    data: Data,
    name: Annotated[str, typer.Option(help="Name of the experiment, and what users are drawn by.")],
    challenger: ShareOf = None,
    shadow: ShareOf = None,
    salt: Annotated[str, typer.Option(help="Name of an earlier experiment whose users are to be kept.")] = "",
) -> None:
    """Let challengers answer a share of users, or shadows score it unseen; both are loaded and verified first."""
    from freshrank.serving.experiment import ExperimentFile
    from freshrank.serving.experiments import planned, start
    from freshrank.serving.replicas import Replicas

    plan = planned(name, salt, challenger or [], shadow or [])
    running = ExperimentFile(_repository(data).root).read()
    if running and running.name != name:
        err.print(f"experiment '{running.name}' runs and is replaced")
    start(Replicas.configured(), _repository(data), plan)
    experiment_show(data)


@experiment.command("show")
def experiment_show(data: Data) -> None:
    """The arms of the running experiment."""
    from freshrank.serving.experiments import described

    say(described(_repository(data)))


@experiment.command("stop")
def experiment_stop(data: Data) -> None:
    """Let the champion answer everybody again."""
    from freshrank.serving.experiments import stop as stop_experiment
    from freshrank.serving.replicas import Replicas

    ended = stop_experiment(Replicas.configured(), _repository(data))
    say(f"experiment '{ended.name}' has ended" if ended else "no experiment runs")


# ---------------------------------------------------------------- shared


def _folder(data: Path, day: str | None, name: str) -> Path:
    from freshrank.steps import Run

    return Run(data, run_date_of(data, day)).directory / name


def _repository(data: Path) -> Any:
    from freshrank.serving.local import repository

    return repository(data)


@contextmanager
def _server(data: Path) -> Iterator[None]:
    """A Triton to publish to: the one that runs, one started now and left running, or replicas that settings name."""
    from freshrank import daily
    from freshrank.serving.local import server
    from freshrank.settings import settings

    if not settings().triton_replicas_host and not server(data).status().ready:
        daily.start_server(data, err)
    yield


def _print_run(data: Path, run_date: str) -> None:
    from freshrank import steps
    from freshrank.report import print_summary

    print_summary(steps.summary(data, run_date), out)


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    say(title)
    for name, value in facts.items():
        say(f"  {name}: {value:,.4g}" if isinstance(value, float) else f"  {name}: {value}")


def main() -> None:
    try:
        app(standalone_mode=True)
    except FreshrankError as error:
        err.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
