"""Options that many commands share."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import typer

from freshrank.recipes import RECIPES


def local_data(data: str) -> Path:
    """The directory that ``data`` names or, for a URL, where a copy of it is kept and brought up to date."""
    from freshrank.storage.object_store import local_dataset

    return local_dataset(data)


Data = Annotated[
    Path,
    typer.Option(
        "--data",
        parser=local_data,
        metavar="DIR|URL",
        help=(
            "Imported dataset directory (see `freshrank import`), or the URL of its copy in an object store (see "
            "`freshrank backup`)."
        ),
    ),
]
Day = Annotated[
    str | None,
    typer.Option(
        "--date", help="Run date D, YYYY-MM-DD: data up to D-1 is used. Default: the day after the newest in the log."
    ),
]
Recipe = Annotated[str, typer.Option("--recipe", help=f"Named configuration: {', '.join(RECIPES)}.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Change one value: section.field=value (repeat).")]
Protocol = Annotated[
    Literal["staggered", "sparse", "strict", "oracle"],
    typer.Option(help="How KuaiRand's items are made cold; see docs/kuairand.md."),
]


def run_date_of(data: Path, day: str | None) -> str:
    from freshrank.datasets.dataset import Dataset
    from freshrank.dates import parse_day

    if day:
        return parse_day(day).isoformat()
    return (Dataset.open(data).days[-1] + timedelta(days=1)).isoformat()
