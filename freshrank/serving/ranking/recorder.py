"""Some of the requests that arrive, left where the next publication finds them (`warm_up_requests.record`)."""

import logging
import threading
import time
from pathlib import Path

from freshrank.bundle.golden import Tensors
from freshrank.serving.probe_requests import MOST_RECORDED, record
from freshrank.serving.protocol import REQUIRED

SAMPLE_SECONDS = 1.0
WRITE_SECONDS = 300.0

log = logging.getLogger(__name__)


class Recorder:
    """Keeps one request a second at most, and writes the last MOST_RECORDED once they are there, then every five
    minutes, in a thread of its own."""

    def __init__(self, folder: Path, sample_seconds: float = SAMPLE_SECONDS) -> None:
        self._folder = folder
        self._sample_seconds = sample_seconds
        self._recorded: list[Tensors] = []
        self._next_sample = self._next_write = float("-inf")

    def offer(self, request: Tensors) -> None:
        """A request as it is on the wire; it is copied where it is kept."""
        now = time.monotonic()
        if now < self._next_sample:
            return
        self._next_sample = now + self._sample_seconds
        # Not the context: what a request may carry changes with the schema, and must not refuse a version of another.
        recorded = {name: request[name][0].copy() for name in REQUIRED}
        self._recorded = [*self._recorded, recorded][-MOST_RECORDED:]
        if len(self._recorded) == MOST_RECORDED and now >= self._next_write:
            self._next_write = now + WRITE_SECONDS
            threading.Thread(target=self._write, args=(self._recorded,), name="recorder", daemon=True).start()

    def _write(self, requests: list[Tensors]) -> None:
        try:
            record(self._folder, requests)
        except OSError as error:
            log.warning("requests for the next publication cannot be recorded: %s", error)
