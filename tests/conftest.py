"""What every test may rely on."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _loggers_are_on() -> None:
    """Libraries that set logging up in this process, as Airflow does, switch off the loggers that were there."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("freshrank") and isinstance(logger, logging.Logger):
            logger.disabled = False
