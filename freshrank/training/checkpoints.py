"""Checkpoints of a training run, so that a killed one resumes at the batch it had reached.

<directory>/state.safetensors  weights, optimiser moments, states of all random generators of all ranks
           /state.json         step, schedule, losses so far

With an object store a copy is stored there too, for a step that restarts on another node with an empty disk.
"""

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from safetensors.torch import load_file, save_file

from freshrank.errors import StorageError
from freshrank.storage.files import atomic_directory, read_json, write_json
from freshrank.storage.object_store import ObjectStore, link
from freshrank.training.distributed import ALONE, ProcessGroup
from freshrank.training.state import RANDOM_PREFIX, State, tensors_under

log = logging.getLogger(__name__)


class Mirror:
    """Copies a checkpoint to an object store in the background; training never waits for it.

    One upload at a time: checkpoints written meanwhile are skipped, as the next one is newer. A failed upload is logged
    and leaves the previous copy.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.store, self.name = store, name
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def fetch(self, directory: Path) -> None:
        """Put the copy into ``directory`` where that holds none, or an older one.

        Raises:
            StorageError: the store refuses or is away. A corrupt copy is not an error: training starts from scratch.
        """
        copy = self.store.newest(self.name)
        if copy is None or copy.facts["step"] <= _step_in(directory):
            return
        try:
            self.store.fetch(self.name, directory)
        except StorageError as error:
            log.warning("the copy of the checkpoint cannot be used, what this node has is: %s", error)

    def offer(self, directory: Path) -> None:
        """Upload what ``directory`` holds now, unless an upload runs."""
        if self._running is None or self._running.done():
            self._running = self._uploads.submit(self._upload, _held(directory), _step_in(directory))

    def _upload(self, held: Path, step: int) -> None:
        try:
            self.store.save(self.name, held, {"step": step})
        except StorageError as error:
            log.warning("the checkpoint after step %d is kept on this node alone: %s", step, error)
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def wait(self) -> None:
        """Wait until no upload is running."""
        self._uploads.shutdown()


def forget(store: ObjectStore, name: str) -> None:
    """Remove the copies of a finished training; a failure to remove them is only logged."""
    try:
        store.remove(name)
    except StorageError as error:
        log.warning("the copy of a finished training's checkpoint stays: %s", error)


def _held(directory: Path) -> Path:
    """The files of ``directory`` under names of their own, which stay when the next checkpoint takes its place."""
    held = Path(mkdtemp(prefix=".upload-", dir=directory.parent))
    for file in directory.iterdir():
        link(file, held / file.name)
    return held


def _step_in(directory: Path) -> int:
    path = directory / "state.json"
    return int(read_json(path)["step"]) if path.exists() else -1


@dataclass(frozen=True)
class Checkpoints:
    """Where a training run is checkpointed, and how often (in steps)."""

    directory: Path
    every: int
    """0 = never."""
    group: ProcessGroup = ALONE
    mirror: Mirror | None = None
    """Set on the first rank where there is an object store."""

    @classmethod
    @contextmanager
    def opened(
        cls, directory: Path, every: int, group: ProcessGroup = ALONE, store: ObjectStore | None = None, name: str = ""
    ) -> Iterator["Checkpoints"]:
        """With the newest copy of ``name`` in ``directory``; at the end no upload runs any more.

        Raises:
            StorageError: the store refuses or is away.
        """
        mirror = Mirror(store, name) if store and every and group.leads else None
        if mirror:
            mirror.fetch(directory)
        group.wait()
        try:
            yield cls(directory, every, group, mirror)
        finally:
            if mirror:
                mirror.wait()

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def restore(self, state: State) -> None:
        """Restore ``state`` from the checkpoint; without one it is not changed."""
        if not (self.directory / "state.json").exists():
            return
        tensors = load_file(self.directory / "state.safetensors")
        state.restore(tensors, read_json(self.directory / "state.json"))
        # A copy: torch reads a generator's state from where the tensor's memory begins, which is the first rank's.
        drawn = {name: ranks[self.group.rank].clone() for name, ranks in tensors_under(RANDOM_PREFIX, tensors).items()}
        state.draws.restore(drawn)
        log.info("training goes on after step %d, kept in %s", state.step, self.directory)

    def save(self, state: State) -> None:
        """Checkpoint ``state``; every rank must call it."""
        random = {
            RANDOM_PREFIX + name: self.group.gathered(drawn) for name, drawn in sorted(state.draws.states().items())
        }
        if self.group.leads:
            with atomic_directory(self.directory) as temporary:
                tensors = {name: tensor.contiguous() for name, tensor in (state.tensors() | random).items()}
                save_file(tensors, temporary / "state.safetensors")
                write_json(temporary / "state.json", state.facts())
            if self.mirror:
                self.mirror.offer(self.directory)
