"""`freshrank ...`: the command line. An error the user can fix is one sentence and an exit code."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from freshrank import __version__
from freshrank.cli import data as data_commands
from freshrank.cli import pipeline, serving, workspace
from freshrank.cli.bench import bench
from freshrank.cli.options import Day, Protocol
from freshrank.cli.terminal import err, note, out, say
from freshrank.errors import FreshrankError

app = typer.Typer(
    name="freshrank",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=("Retrain a ranker every day so that new items are served well, prove it, and serve it from Triton."),
)
app.add_typer(data_commands.imports, name="import")
app.add_typer(data_commands.features, name="features")
app.add_typer(bench, name="bench")
app.add_typer(serving.experiment, name="experiment")
for module in (data_commands, pipeline, serving, workspace):
    app.add_typer(module.commands)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what every step does.")] = False,
) -> None:
    if version:
        say(__version__)
        raise typer.Exit
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="KuaiRand's files, or schema.yaml + tables, or an imported dataset. Default: a small simulated world.",
        ),
    ] = None,
    day: Day = None,
    protocol: Protocol = "staggered",
) -> None:
    """The whole daily run through a real Airflow, Kubeflow, Feast and Triton; then rank 100 candidates for a user."""
    from freshrank.cli import demo as demo_module
    from freshrank.reports.report import print_summary

    print_summary(demo_module.demo(data, day, protocol, out), out)


EXTRAS = {
    **dict.fromkeys(("demo", "run", "submit"), "orchestrate"),
    **dict.fromkeys(("serve", "stop", "status", "rollback", "experiment"), "serve"),
    "bench": "bench",
}
"""What a command needs beside the base install; the others, which read a log or train on it, need ``train``."""


def main() -> None:
    try:
        app(standalone_mode=True)
    except ModuleNotFoundError as error:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        if error.name is None or error.name.partition(".")[0] == "freshrank":
            raise
        extra = f"freshrank[{EXTRAS.get(command, 'train')}]"
        note(f"freshrank {command} needs {extra} ({error.name} is not installed): pip install '{extra}'")
        sys.exit(2)
    except FreshrankError as error:
        err.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
