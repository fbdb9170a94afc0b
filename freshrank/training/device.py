"""The device that trains, and its precision."""

from dataclasses import dataclass

import torch

from freshrank.config import TrainingConfig


@dataclass(frozen=True)
class Device:
    """What training runs on."""

    name: str
    dtype: torch.dtype
    compiled: bool

    @classmethod
    def choose(cls, config: TrainingConfig) -> "Device":
        """As ``config`` says, whatever is fastest: the same configuration gives the same ranker."""
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(name, torch.bfloat16 if config.precision == "bfloat16" else torch.float32, config.compile)

    def __str__(self) -> str:
        model = torch.cuda.get_device_name() if self.name == "cuda" else f"{torch.get_num_threads()} threads"
        compiled = "on" if self.compiled else "off"
        return f"{self.name} ({model}), {str(self.dtype).removeprefix('torch.')}, compile={compiled}"
