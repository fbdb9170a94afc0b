"""The Typer application that every module of commands registers with."""

import typer

app = typer.Typer(
    name="freshrank",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=("Retrain a ranker every day so that new items are served well, prove it, and serve it from Triton."),
)
