"""`freshrank import`, `simulate`, `features`: data in, features built and read."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freshrank.cli.options import Data, Day, Overrides, Protocol, Recipe, run_date_of
from freshrank.cli.terminal import out, say
from freshrank.errors import ConfigError
from freshrank.recipes import DEFAULT_RECIPE, recipe

commands = typer.Typer()

if TYPE_CHECKING:
    from freshrank.datasets.dataset import Dataset
    from freshrank.datasets.mappings import Texts

imports = typer.Typer(no_args_is_help=True, help="Bring a log into the data contract.")
features = typer.Typer(no_args_is_help=True, help="Historical and content features, offline and online.")
SourceArgument = Annotated[Path, typer.Argument(help="Directory to read.")]
At = Annotated[str | None, typer.Option("--at", help="Time with its zone, ISO 8601. Default: now.")]
TargetOption = Annotated[Path, typer.Option("--out", help="Directory to write the dataset to (replaced as a whole).")]


# ---------------------------------------------------------------- data in
@imports.command("kuairand")
def import_kuairand(
    source: SourceArgument,
    target: TargetOption,
    protocol: Protocol = "staggered",
) -> None:
    """Import KuaiRand-Pure: the published CSV files or the Parquet slice."""
    from freshrank.datasets import kuairand

    _report_import(kuairand.import_kuairand(source, target, protocol))


@imports.command("parquet")
def import_parquet(
    source: SourceArgument,
    target: TargetOption,
    allow_unknown_items: Annotated[
        bool,
        typer.Option(
            "--allow-unknown-items",
            help=(
                "Keep impressions of items absent from items: counted in manifest.json and used as items without "
                "content. Without it they are refused."
            ),
        ),
    ] = False,
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help=(
                "Keep the days that --out holds and SOURCE does not; a day in both is SOURCE's. Items and users are "
                "replaced as ever, so bring both whole."
            ),
        ),
    ] = False,
    replace_days: Annotated[
        bool,
        typer.Option(
            "--replace-days", help=("With --add: also replace a day of which SOURCE holds fewer rows than --out.")
        ),
    ] = False,
) -> None:
    """Import any log: a directory with schema.yaml and the tables impressions, items and users as Parquet."""
    from freshrank.datasets import parquet
    from freshrank.datasets.dataset import existing

    before = existing(target) if add else None
    _report_import(parquet.import_parquet(source, target, allow_unknown_items, add, replace_days), before)


@commands.command()
def simulate(
    target: TargetOption,
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
    say(
        f"{dataset.path}: {rows:,} impressions on {span}, {dataset.days[0]} .. "
        f"{dataset.days[-1]}; schema '{dataset.schema.name}', actions {actions}"
        + (f"; no impressions on {', '.join(map(str, missing[:shown]))}{more}" if missing else "")
    )
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
    from freshrank.pipeline import steps

    run_date = run_date_of(data, day)
    steps.build_features(data, run_date, recipe(recipe_name, overrides).windows)
    later_state = steps.materialize(data, run_date)
    online = (
        f"; the online store holds the later state of {later_state} and keeps it"
        if later_state
        else " and materialized"
    )
    say(f"features of {run_date} are built{online}")


@features.command("get")
def features_get(
    data: Data,
    user: Annotated[str | None, typer.Option(help="User id, as in your log.")] = None,
    item: Annotated[list[str] | None, typer.Option(help="Item id, as in your log (repeat).")] = None,
    at: At = None,
) -> None:
    """Print what the online store knows of a user or of items, as JSON; unknown ids give nulls."""
    from freshrank.datasets.mappings import MAPPINGS
    from freshrank.dates import parse_instant
    from freshrank.features.store import FeatureStore
    from freshrank.pipeline.run import Run
    from freshrank.schema import ITEM_ID, USER_ID
    from freshrank.serving.client.ids import Codes

    if user is None and not item:
        raise ConfigError("features get: received no id, expected --user ID or --item ID")
    if at and not item:
        raise ConfigError(
            f"--at: received {at!r} without --item, expected both: only hourly counters of items "
            "depend on the time; leave --at out, or name an item"
        )
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
    from freshrank.datasets.dataset import Dataset
    from freshrank.dates import parse_instant
    from freshrank.features.hourly import standing_hour
    from freshrank.pipeline import steps

    hour = standing_hour(parse_instant(at) if at else datetime.now(UTC), Dataset.open(data).schema)
    say(f"counters until {hour.isoformat()}: {steps.push_hourly(data, hour)} items")


def _print_rows(rows: list[dict[str, Any]], key: str, given: list[str], texts: "Texts") -> None:
    """Ids and categories as the log has them, not their codes; under ``key`` the id that was given."""
    for row, value in zip(rows, given, strict=True):
        shown = {name: texts.decode(name, each) for name, each in row.items()}
        out.print_json(json.dumps(shown | {key: value}, default=str))
