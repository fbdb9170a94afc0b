"""What the command line prints: results to stdout, progress and problems to stderr."""

from rich.console import Console

out = Console()
err = Console(stderr=True, log_path=False)


def say(sentence: str, highlight: bool = True) -> None:
    """One line, however narrow the terminal or long the path: a pipe gets it whole."""
    out.print(sentence, highlight=highlight, markup=False, soft_wrap=True)
