"""The steps of a publication, as its log says them: something can be done in the moment when one begins."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def at_step(step: str, do: Callable[[], object], replica: str = "") -> Iterator[None]:
    """``do`` once, in the moment when ``step`` begins, on ``replica`` where one is named."""

    class Once(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if f"step={step} " in text and replica in text:
                logger.removeHandler(self)
                do()

    logger, once = logging.getLogger("freshrank.serving"), Once()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(once)
    try:
        yield
        assert once not in logger.handlers, f"step {step} never began"
    finally:
        logger.removeHandler(once)
        logger.setLevel(level)
