"""Which version answers which user now: the pointer and the experiment, looked up again when they change."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from freshrank.errors import ServingError
from freshrank.features.encoder import Encoder
from freshrank.serving.experiment import Experiment, ExperimentFile
from freshrank.serving.repository import ModelRepository, Pointer
from freshrank.storage.files import WatchedFile

log = logging.getLogger(__name__)


class NothingPublished(ServingError):
    """No version has been put in service yet."""


@dataclass(frozen=True)
class ServedModels:
    """What the model repository says, both read at the same time."""

    pointer: Pointer
    experiment: Experiment | None


class PointerWatch:
    """Reads what serves, each file again only when it is another one.

    A pointer counts once its version's encoder is in memory, too: nobody is sent to a version that cannot be used.
    """

    def __init__(self, repository: ModelRepository, known: Callable[[int], Encoder | None]) -> None:
        self._repository = repository
        self._known = known
        self._experiment = ExperimentFile(repository.root)
        self._pointer = WatchedFile(repository.pointer_path, self._read_pointer)
        self._newest: tuple[int, Encoder] | None = None

    def __call__(self) -> ServedModels:
        # Before the pointer: an experiment that is gone has been stopped only where the pointer is still there.
        experiment = self._experiment.read()
        return ServedModels(self._pointed(), experiment)

    def _pointed(self) -> Pointer:
        try:
            return self._pointer.value()
        except FileNotFoundError:
            if self._pointer.last is None and not self._pointer.path.exists():
                raise NothingPublished("nothing is published yet; publish a bundle with `freshrank publish`") from None
            raise

    def _read_pointer(self) -> Pointer:
        pointer = self._repository.served()
        if pointer is None:
            raise FileNotFoundError(f"{self._repository.pointer_path} is gone")
        self._newest = pointer.version, self.encoder(pointer.version)
        return pointer

    def encoder(self, number: int) -> Encoder:
        """Of an installed version; the served one's is in memory."""
        if self._newest and self._newest[0] == number:
            return self._newest[1]
        return self._known(number) or Encoder.load(self._repository.version_directory(number))
