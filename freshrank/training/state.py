"""All that a training step changes: weights, moments, generators and the curve of losses."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from freshrank.training.distributed import ProcessGroup

log = logging.getLogger(__name__)
_WEIGHT, _MOMENT, RANDOM_PREFIX = "weight.", "moment.", "random."


class Generators:
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

    def take(self, group: ProcessGroup) -> dict[str, float]:
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
    draws: Generators
    curve: TrainingCurve = field(default_factory=TrainingCurve)
    sums: RunningMean = field(default_factory=RunningMean)
    step: int = 0
    """Steps done."""

    def tensors(self) -> dict[str, Tensor]:
        moments = {
            f"{_MOMENT}{place}.{name}": value
            for place, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return {_WEIGHT + name: tensor for name, tensor in self.ranker.state_dict().items()} | moments

    def facts(self) -> dict[str, Any]:
        sums = {name: float(total) for name, total in self.sums.sums.items()}
        return {
            "step": self.step,
            "schedule": self.schedule.state_dict(),
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "curve": {"steps": self.curve.steps, "losses": self.curve.losses},
            "sums": sums,
            "count": self.sums.count,
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restore the state from its :meth:`tensors` and :meth:`facts`."""
        self.ranker.load_state_dict(tensors_under(_WEIGHT, tensors))
        self._restore_optimizer(tensors_under(_MOMENT, tensors), facts["rates"])
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


def tensors_under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
