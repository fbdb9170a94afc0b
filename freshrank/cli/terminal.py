"""What the command line prints: results to stdout, progress and problems to stderr."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from freshrank.serving.client.client import Answer

out = Console()
err = Console(stderr=True, log_path=False)


def say(sentence: str, highlight: bool = True) -> None:
    """One line, however narrow the terminal or long the path: a pipe gets it whole."""
    out.print(sentence, highlight=highlight, markup=False, soft_wrap=True)


def note(sentence: str) -> None:
    """The same on stderr: what is under way, beside the result."""
    err.print(sentence, highlight=False, markup=False, soft_wrap=True)


def warn(sentence: str) -> None:
    """A warning: probably not what was intended, but not an error."""
    err.print(f"[yellow]warning[/] {escape(sentence)}", highlight=False, soft_wrap=True)


def ranking_table(answer: "Answer", top: int) -> Table:
    """The first ``top`` candidates (0: all) of a ranking, best first."""
    rows = answer.rows()[: top or None]
    arm = f", arm {answer.arm} of the experiment" if answer.arm else ""
    title = f"model version {answer.model_version}{arm}{', degraded' if answer.degraded else ''}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table
