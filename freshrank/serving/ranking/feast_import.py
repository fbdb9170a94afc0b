"""Import Feast without what reading online never uses: 2.6 s and 180 MB instead of 8.5 s and 360 MB."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def import_feast() -> None:
    """Import Feast into this process; for a server, which starts often and holds little else.

    Feast instruments its classes with typeguard, 4 s for checks of calls that are ours, and imports torch wherever
    it is installed though it runs without.
    """
    if "feast" not in sys.modules:
        with _uninstrumented(), _hidden("torch"):
            import feast  # noqa: F401


@contextmanager
def _uninstrumented() -> Iterator[None]:
    import typeguard

    typechecked: Any = typeguard.typechecked
    vars(typeguard)["typechecked"] = lambda target: target
    try:
        yield
    finally:
        vars(typeguard)["typechecked"] = typechecked


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let an import of ``module`` fail, unless it is there already."""
    if module in sys.modules:
        yield
        return
    vars(sys)["modules"][module] = None
    try:
        yield
    finally:
        del sys.modules[module]
