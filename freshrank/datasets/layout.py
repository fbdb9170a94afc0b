"""Where an imported dataset keeps what, for those who do not read its tables: no polars here."""

from pathlib import Path

from freshrank.errors import DataError
from freshrank.schema import ITEM_ID, QUERY_ITEM_ID, Schema, load_schema

MANIFEST = "manifest.json"
MAPPINGS = "mappings"
"""The folder of ``<column>.parquet``, text and int64 code, for every column whose values were text at the import."""


def mapping_of(column: str) -> str:
    """Name of the mapping of ``column``: item ids share one, wherever they stand."""
    return ITEM_ID if column == QUERY_ITEM_ID else column


def schema_of(path: Path) -> Schema:
    """Schema of the dataset at ``path``; a :class:`DataError` says how to import one that is not."""
    if not (path / MANIFEST).exists():
        raise DataError(
            f"{path}: no {MANIFEST}, so this is not an imported dataset; run "
            f"`freshrank import parquet {path} --out DIR` or `freshrank import kuairand`"
        )
    return load_schema(path / "schema.yaml")
