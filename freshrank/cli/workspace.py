"""`freshrank backup`, `restore`, `prune`, `settings`."""

from pathlib import Path
from typing import Annotated

import typer

from freshrank.cli.options import Data, run_date_of
from freshrank.cli.terminal import note, say, warn

commands = typer.Typer()


@commands.command()
def backup(data: Data) -> None:
    """Copy the dataset and its models to the object store (FRESHRANK_STORAGE_URL); only what changed is sent.

    This also refills a lost bucket. A deployed version is copied by the run that deploys it.
    """
    from freshrank.datasets.dataset import Dataset
    from freshrank.pipeline import backup
    from freshrank.storage.workspace import Workspace

    store, dataset = backup.required_store(), Dataset.open(data)
    where = backup.back_up_dataset(dataset, store)
    pointer = backup.back_up_models(Workspace.of(dataset.schema.name), store)
    served = f"version {pointer.version} of run {pointer.run_date} serves" if pointer else "nothing serves yet"
    say(f"kept: {where} and its models; {served}")


@commands.command()
def restore(
    data: Annotated[Path, typer.Option("--data", help="Where the dataset is, or is to be put back.")],
    name: Annotated[str | None, typer.Option(help="Its name in schema.yaml. Default: the directory's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the served model by the one in the backup.")] = False,
) -> None:
    """Restore a lost workspace from the object store: dataset, models, served model; then features and online store.
    What exists is left as it is, so the command can be repeated.
    """
    from freshrank.pipeline import backup, deploy, steps
    from freshrank.storage.workspace import Workspace

    store = backup.required_store()
    dataset = backup.restore_dataset(data, store, name)
    note(f"dataset {data}: {dataset.days[0]} .. {dataset.days[-1]}")
    pointer = backup.restore_models(Workspace.of(dataset.schema.name), store, force)
    if pointer:
        note(f"models: version {pointer.version} of run {pointer.run_date}")
    run_date = run_date_of(data, None)
    steps.build_features(data, run_date)
    steps.materialize(data, run_date)
    deploy.register_served(data, run_date)
    served = f"version {pointer.version} of run {pointer.run_date} serves" if pointer else "nothing had been served"
    say(f"restored: {data} and its models, features of {run_date}; {served}. Restart servers that ran meanwhile.")


@commands.command()
def prune(
    data: Data,
    keep_days: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Days before the log's next run of which runs, reports "
            "and what they read stay. Default: FRESHRANK_KEEP_DAYS, else 30.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:
    """Remove from the workspace what no later run, no rollback and no recent report needs.

    What was written within a day stays. Models, datasets and the online store are never touched.
    """
    from freshrank.datasets.dataset import Dataset
    from freshrank.pipeline import prune as pruning
    from freshrank.settings import settings
    from freshrank.storage.workspace import Workspace

    dataset = Dataset.open(data)
    keep = (settings().keep_days or pruning.KEEP_DAYS) if keep_days is None else keep_days
    removed = pruning.prune(dataset, Workspace.of(dataset.schema.name), keep, dry_run)
    say("would be removed:" if dry_run else "removed:")
    for each in [*removed, pruning.total(removed)]:
        say(f"  {each}")


@commands.command("settings")
def show_settings(
    cluster: Annotated[
        bool, typer.Option("--cluster", help="What only a cluster needs, too: FRESHRANK_KFP_*, FRESHRANK_CLUSTER_*.")
    ] = False,
) -> None:
    """Every environment variable, what it means and how it is set, as an env file; defaults are commented out."""
    from freshrank.orchestration.kubeflow.settings import ALL_SETTINGS
    from freshrank.settings import as_env_file, unknown_variables

    for kind in ALL_SETTINGS if cluster else ALL_SETTINGS[:1]:
        for line in as_env_file(kind):
            say(line, highlight=False)
    for problem in unknown_variables(*ALL_SETTINGS):
        warn(problem)
