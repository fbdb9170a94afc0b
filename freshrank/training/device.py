"""The device that trains, and its precision."""

import logging
from dataclasses import dataclass

import torch

from freshrank.config import TrainingConfig
from freshrank.training.batches import Batch as Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """What training runs on, chosen from what the machine has."""

    name: str
    dtype: torch.dtype
    compiled: bool

    @classmethod
    def options(cls, config: TrainingConfig) -> list["Device"]:
        """What ``config`` leaves open: on CUDA, "auto" is bf16 or float32 and torch.compile or not; on the CPU neither.

        The first is the plainest.
        """
        cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
        halves = {
            "auto": [False, True] if cuda and torch.cuda.is_bf16_supported() else [False],
            "float32": [False],
            "bfloat16": [True],
        }[config.precision]
        compiled = {"auto": [False, True] if cuda else [False], "on": [True], "off": [False]}[config.compile]
        name = "cuda" if cuda else "cpu"
        return [cls(name, torch.bfloat16 if half else torch.float32, on) for half in halves for on in compiled]

    @classmethod
    def choose(cls, config: TrainingConfig) -> "Device":
        """The plainest of :meth:`options`."""
        return cls.options(config)[0]

    def __str__(self) -> str:
        model = torch.cuda.get_device_name() if self.name == "cuda" else f"{torch.get_num_threads()} threads"
        compiled = "on" if self.compiled else "off"
        return f"{self.name} ({model}), {str(self.dtype).removeprefix('torch.')}, compile={compiled}"
