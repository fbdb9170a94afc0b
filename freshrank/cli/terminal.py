"""What the command line prints: results to stdout, progress and problems to stderr."""

from rich.console import Console
from rich.markup import escape

out = Console()
err = Console(stderr=True, log_path=False)


def say(sentence: str, highlight: bool = True) -> None:
    """One line, however narrow the terminal or long the path: a pipe gets it whole."""
    out.print(sentence, highlight=highlight, markup=False, soft_wrap=True)


def note(sentence: str) -> None:
    """The same on stderr: what is under way, beside the result."""
    err.print(sentence, highlight=False, markup=False, soft_wrap=True)


def warn(sentence: str) -> None:
    """What most likely is not as it is meant, and no error."""
    err.print(f"[yellow]warning[/] {escape(sentence)}", highlight=False, soft_wrap=True)
