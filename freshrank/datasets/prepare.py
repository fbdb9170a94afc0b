"""Any source of a daily run as a dataset: imported, an export to import, or a simulated world."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from freshrank.datasets.layout import MANIFEST
from freshrank.errors import ConfigError
from freshrank.settings import settings

if TYPE_CHECKING:
    from freshrank.datasets.kuairand import Protocol


log = logging.getLogger(__name__)


def prepare(data: Path | None, protocol: "Protocol") -> Path:
    """An imported dataset for ``data``: itself, or imported by its layout; a simulated world for None."""
    where = settings().home / "data"
    if data is None:
        return _simulated(where / "simulated")
    if not data.is_dir():
        raise ConfigError(
            f"data: {data} is not a directory; expected KuaiRand's files, or schema.yaml with Parquet "
            "tables, or an imported dataset"
        )
    if (data / MANIFEST).exists():
        return data
    if (data / "schema.yaml").exists():
        from freshrank.datasets.parquet import import_parquet

        return import_parquet(data, where / data.resolve().name).path
    from freshrank.datasets.kuairand import import_kuairand

    return import_kuairand(data, where / f"kuairand_{protocol}", protocol).path


def _simulated(path: Path) -> Path:
    from freshrank.datasets.simulator import WorldConfig, simulate

    return path if (path / MANIFEST).exists() else simulate(path, WorldConfig()).path
