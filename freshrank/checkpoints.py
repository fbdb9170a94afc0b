"""A training under way, kept so that a killed one goes on at the very batch it had reached.

<directory>/state.safetensors  weights, optimiser moments, states of all random generators of all ranks
           /state.json         step, schedule, losses so far

With an object store a copy is kept there as well, for the step that starts again on another node with an empty disk.
"""

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from freshrank.distributed import ALONE, Group
from freshrank.errors import StorageError
from freshrank.objects import ObjectStore, link
from freshrank.storage import atomic_directory, read_json, write_json

log = logging.getLogger(__name__)
_WEIGHT, _MOMENT, _RANDOM = "weight.", "moment.", "random."


class Draws:
    """The random generators of one training, one per purpose, so that a purpose switched on leaves the others alone."""

    def __init__(self, seed: int, rank: int = 0) -> None:
        self.seed, self.rank = seed, rank
        self.generators: dict[int, torch.Generator] = {}

    def generator(self, stream: int) -> torch.Generator:
        """The generator of a purpose, the same object at every call."""
        if stream not in self.generators:
            # Ranks hold different rows: what is drawn for them must differ too.
            self.generators[stream] = torch.Generator().manual_seed(self.seed + stream + _RANK_STEP * self.rank)
        return self.generators[stream]

    def seed_torch(self) -> None:
        """Give torch's own generators, which dropout draws from, another seed on every rank but the first."""
        if self.rank:
            torch.manual_seed(self.seed + _RANK_STEP * self.rank)

    def states(self) -> dict[str, Tensor]:
        states = {str(stream): generator.get_state() for stream, generator in self.generators.items()}
        states["torch"] = torch.get_rng_state()
        return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})

    def restore(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
        for stream in set(states) - {"torch", "cuda"}:
            self.generator(int(stream)).set_state(states[stream])


_RANK_STEP = 1_000_003


@dataclass
class TrainingCurve:
    """Mean losses since the entry before, by step."""

    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: int, parts: dict[str, float]) -> None:
        self.steps.append(step)
        for name, value in parts.items():
            self.losses.setdefault(name, []).append(value)


class RunningMean:
    """Sums losses on the device and reads them only when asked, to keep a GPU busy."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, parts: dict[str, Tensor], weight: float = 1.0) -> None:
        self.count += 1
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.detach() * weight

    def take(self, group: Group) -> dict[str, float]:
        """Means over the steps since the last call and over the ranks."""
        totals = group.gathered(torch.stack(list(self.sums.values())).cpu()).mean(0)
        means = {name: float(total) / self.count for name, total in zip(self.sums, totals, strict=True)}
        self.sums, self.count = {}, 0
        return means


@dataclass
class State:
    """All that a step changes."""

    ranker: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    draws: Draws
    device: str
    curve: TrainingCurve = field(default_factory=TrainingCurve)
    sums: RunningMean = field(default_factory=RunningMean)
    step: int = 0
    """Steps done."""

    def tensors(self) -> dict[str, Tensor]:
        moments = {f"{_MOMENT}{place}.{name}": value for place, values in self.optimizer.state_dict()["state"].items()
                   for name, value in values.items()}  # fmt: skip
        return {_WEIGHT + name: tensor for name, tensor in self.ranker.state_dict().items()} | moments

    def facts(self) -> dict[str, Any]:
        sums = {name: float(total) for name, total in self.sums.sums.items()}
        return {"step": self.step, "device": self.device, "schedule": self.schedule.state_dict(),
                "rates": [group["lr"] for group in self.optimizer.param_groups],
                "curve": {"steps": self.curve.steps, "losses": self.curve.losses},
                "sums": sums, "count": self.sums.count}  # fmt: skip

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Become the state that :meth:`tensors` and :meth:`facts` were taken of."""
        self.ranker.load_state_dict(_under(_WEIGHT, tensors))
        self._restore_optimizer(_under(_MOMENT, tensors), facts["rates"])
        self.schedule.load_state_dict(facts["schedule"])
        self.curve = TrainingCurve(**facts["curve"])
        device = next(self.ranker.parameters()).device
        self.sums.sums = {name: torch.tensor(total, device=device) for name, total in facts["sums"].items()}
        self.sums.count, self.step = facts["count"], facts["step"]

    def _restore_optimizer(self, moments: dict[str, Tensor], rates: list[float]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            place, _, name = key.partition(".")
            state.setdefault(int(place), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        groups = [entry | {"lr": rate} for entry, rate in zip(groups, rates, strict=True)]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class Mirror:
    """The copy of a checkpoint in an object store; made beside the training, which never waits for it.

    One upload at a time: what is offered meanwhile is passed over, and the next one is newer anyway. One that fails is
    logged and leaves the copy before it.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.store, self.name = store, name
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def fetch(self, directory: Path) -> None:
        """Put the copy into ``directory`` where that holds none, or an older one.

        Raises:
            StorageError: the store refuses or is away. A copy that is broken is no reason: training begins anew.
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
        """Until no upload runs."""
        self._uploads.shutdown()


def forget(store: ObjectStore, name: str) -> None:
    """Remove the copies of a training that is finished; that they cannot be removed is no reason to fail."""
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
    """Where a training is kept while it runs, and how often (in steps)."""

    directory: Path
    every: int
    """0 = never."""
    group: Group = ALONE
    mirror: Mirror | None = None
    """The first rank's, where there is an object store."""

    @classmethod
    @contextmanager
    def opened(
        cls, directory: Path, every: int, group: Group = ALONE, store: ObjectStore | None = None, name: str = ""
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

    @property
    def device(self) -> str | None:
        """What the kept training runs on; None where none is kept."""
        path = self.directory / "state.json"
        return read_json(path)["device"] if path.exists() else None

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def restore(self, state: State) -> None:
        """Take ``state`` to where the kept training was; leave it where none is kept."""
        if self.device is None:
            return
        tensors = load_file(self.directory / "state.safetensors")
        state.restore(tensors, read_json(self.directory / "state.json"))
        # A copy: torch reads a generator's state from where the tensor's memory begins, which is the first rank's.
        drawn = {name: ranks[self.group.rank].clone() for name, ranks in _under(_RANDOM, tensors).items()}
        state.draws.restore(drawn)
        log.info("training goes on after step %d, kept in %s", state.step, self.directory)

    def save(self, state: State) -> None:
        """Keep ``state``; every rank must call it."""
        random = {_RANDOM + name: self.group.gathered(drawn) for name, drawn in sorted(state.draws.states().items())}
        if self.group.leads:
            with atomic_directory(self.directory) as temporary:
                tensors = {name: tensor.contiguous() for name, tensor in (state.tensors() | random).items()}
                save_file(tensors, temporary / "state.safetensors")
                write_json(temporary / "state.json", state.facts())
            if self.mirror:
                self.mirror.offer(self.directory)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
