"""Text values -> int64 codes, stored with the data: append-only, so a code never changes its meaning."""

from pathlib import Path
from typing import Any

import polars as pl

from freshrank.schema import ITEM_ID, QUERY_ITEM_ID, Schema
from freshrank.storage.files import sha256_of

MAPPINGS = "mappings"
"""Their folder in a dataset."""
_EMPTY = pl.Series("value", [], dtype=pl.String)


def mapping_of(column: str) -> str:
    """Name of the mapping of ``column``: item ids share one, wherever they stand."""
    return ITEM_ID if column == QUERY_ITEM_ID else column


class Mappings:
    """The mappings of one dataset; a value's code is its place in the order of first appearance."""

    def __init__(self, directory: Path) -> None:
        """Continue the mappings kept in ``directory``; none there starts afresh."""
        paths = sorted(directory.glob("*.parquet"))
        self._values = {path.stem: pl.read_parquet(path).sort("code")["value"] for path in paths}

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def encode(self, name: str, values: pl.Series) -> pl.Series:
        """Codes of a String or List(String) series; new values are appended in sorted order."""
        nested = isinstance(values.dtype, pl.List)
        known = self._extend(name, values.explode() if nested else values)
        codes = pl.int_range(len(known), eager=True)
        lookup = pl.element() if nested else pl.col(values.name)
        replaced = lookup.replace_strict(known, codes, default=None, return_dtype=pl.Int64)
        expression = pl.col(values.name).list.eval(replaced) if nested else replaced
        return values.to_frame().select(expression).to_series()

    def write(self, directory: Path) -> dict[str, dict[str, int | str]]:
        """Write one file per mapping; rows and sha256 of each."""
        directory.mkdir(parents=True)
        return {name: self._write(directory / f"{name}.parquet", self._values[name]) for name in sorted(self._values)}

    def _write(self, path: Path, values: pl.Series) -> dict[str, int | str]:
        table = pl.DataFrame({"value": values, "code": pl.int_range(len(values), eager=True)})
        table.write_parquet(path)
        return {"rows": len(values), "sha256": sha256_of(path)}

    def _extend(self, name: str, values: pl.Series) -> pl.Series:
        known = self._values.get(name, _EMPTY)
        new = values.drop_nulls().unique().sort().alias("value")
        self._values[name] = pl.concat([known, new.filter(~new.is_in(known.implode()))])
        return self._values[name]


class Texts:
    """int64 codes -> the text of the log that they stand for; read when first asked."""

    def __init__(self, schema: Schema, directory: Path) -> None:
        self._columns = schema.coded()
        self._files = {path.stem: path for path in directory.glob("*.parquet")}
        self._loaded: dict[str, pl.Series] = {}

    def decode(self, name: str | None, value: Any) -> Any:
        """``value`` of a column or feature, or a list of them, as the log has it; what is no code stays as it is."""
        column = mapping_of(self._columns.get(name or "", name or ""))
        if column not in self._files:
            return value
        if isinstance(value, list):
            return [self._text(column, each) for each in value]
        return self._text(column, value)

    def column(self, codes: pl.Series) -> pl.Series:
        """A whole column, whose name says what it holds; null where a code stands for nothing."""
        name = mapping_of(codes.name)
        if name not in self._files:
            return codes
        known = self._known(name)
        return codes.replace_strict(pl.int_range(len(known), eager=True), known, default=None)

    def _known(self, column: str) -> pl.Series:
        if column not in self._loaded:
            self._loaded[column] = pl.read_parquet(self._files[column]).sort("code")["value"]
        return self._loaded[column]

    def _text(self, column: str, code: Any) -> Any:
        known = self._known(column)
        try:
            place = -1 if isinstance(code, bool) else int(code)
        except (TypeError, ValueError):
            return code
        return known[place] if 0 <= place < len(known) else code
