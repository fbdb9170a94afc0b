"""Days of an earlier import that a new one retains: their files are reused, their rows checked against the new
items.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from freshrank.datasets.checks import Findings
from freshrank.datasets.mappings import mapping_of
from freshrank.errors import DataError
from freshrank.schema import CREATED_AT, EVENT_TIMESTAMP, ITEM_ID, USER_ID, Kind, Role, Schema

if TYPE_CHECKING:
    from freshrank.datasets.dataset import Dataset

log = logging.getLogger(__name__)

_MAPPED = (Kind.CATEGORICAL, Kind.MULTI_VALUED)


def refuse_another_log(earlier: Schema, schema: Schema, out: Path) -> None:
    """DataError where the days at ``out`` are of another log, have other columns, or were cut at another hour."""
    if _shape(earlier) != _shape(schema):
        raise DataError(
            f"{out}: received a schema.yaml whose name, impressions or utc_offset_hours differ from those of the days "
            f"that are there ('{earlier.name}'), expected the same; import the whole log without --add"
        )


def _shape(schema: Schema) -> tuple[object, ...]:
    columns = {name: (column.role, column.kind) for name, column in schema.impressions.items()}
    return schema.name, schema.utc_offset_hours, columns


def refuse_shrunken_days(earlier: "Dataset", written: dict[str, Any], findings: Findings) -> None:
    """A day with fewer rows than the stored one is most likely a few late rows, not the whole day."""
    for day, facts in written.items():
        before = earlier.manifest["days"].get(day, facts)["rows"]
        if facts["rows"] < before:
            findings.refuse(
                "impressions",
                f"holds {facts['rows']:,} rows of {day}, of which {before:,} are there",
                "bring the whole day, leave these rows out, or replace it with --replace-days",
            )


def note_numbers(earlier: "Dataset", findings: Findings) -> None:
    """Columns stored as numbers in the earlier days must not become text: a code would be taken for a number."""
    mapped = earlier.manifest["mappings"]
    for name, column in earlier.schema.impressions.items():
        is_coded = name in (ITEM_ID, *_ids(earlier.schema)) or column.kind in _MAPPED
        if is_coded and mapping_of(name) not in mapped:
            findings.note_coding(mapping_of(name), text=False, where="the log of the days that are kept")


def _ids(schema: Schema) -> list[str]:
    keys = [name for name, column in schema.impressions.items() if column.role is Role.KEY]
    return [name for name in keys if name in schema.users or name in schema.items]


def check_earlier_days(
    earlier: "Dataset",
    partitions: Sequence[Path],
    items: pl.DataFrame,
    users: pl.DataFrame,
    allow_unknown_items: bool,
    findings: Findings,
) -> None:
    """Check the earlier days against the new ``items``: no item may be missing or created later than before."""
    _warn_of_lost_users(earlier, users)
    changed = (
        earlier.items()
        .select(ITEM_ID, pl.col(CREATED_AT).alias("before"))
        .join(items.select(ITEM_ID, CREATED_AT), on=ITEM_ID, how="left")
        .filter(pl.col(CREATED_AT).is_null() | (pl.col(CREATED_AT) > pl.col("before")))
    )
    if changed.is_empty() or not partitions:
        return
    shown = (
        pl.scan_parquet(list(partitions)).select(ITEM_ID, EVENT_TIMESTAMP).join(changed.lazy(), on=ITEM_ID).collect()
    )
    shown = shown.with_columns(earlier.texts().column(shown[ITEM_ID]))
    _refuse_vanished(shown.filter(pl.col(CREATED_AT).is_null()), allow_unknown_items, findings)
    early = shown.filter(pl.col(EVENT_TIMESTAMP) < pl.col(CREATED_AT))
    findings.refuse_rows(
        f"items.{CREATED_AT}",
        "it is later than an impression of the item on a day that is kept",
        "correct created_at, or import the whole log without --add",
        early.select(pl.struct(ITEM_ID, EVENT_TIMESTAMP, CREATED_AT)).to_series(),
    )


def _warn_of_lost_users(earlier: "Dataset", users: pl.DataFrame) -> None:
    before = earlier.users().select(USER_ID)
    if gone := len(before.join(users, on=USER_ID, how="anti")):
        log.warning(
            "%s: %s of the %s users that were there are not in this table: they count as unknown from now on; "
            "bring the whole table",
            earlier.path,
            f"{gone:,}",
            f"{len(before):,}",
        )


def _refuse_vanished(shown: pl.DataFrame, allow_unknown_items: bool, findings: Findings) -> None:
    if allow_unknown_items:
        findings.count("kept impressions of items absent from items", len(shown))
    else:
        findings.refuse_rows(
            f"items.{ITEM_ID}",
            "an item that a kept day shows is absent from items",
            "bring the whole table of items, or import with --allow-unknown-items",
            shown[ITEM_ID],
        )


def take_over(source: Path, target: Path) -> None:
    """Hard-link the file where the file system allows it, so that nothing is copied."""
    target.parent.mkdir(parents=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
