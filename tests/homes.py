"""A workspace of its own with a small simulated world and a Triton, driven by the command line in real processes."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.storage.files import read_json, sha256_of

WORLD = WorldConfig(users=400, days=7, items_at_start=250, new_items_per_day=25, impressions_per_day=4000)
DAY_1, DAY_2 = date(2024, 1, 7), date(2024, 1, 8)
LENIENT = [
    "gate.fresh_margin=0.5",
    "gate.overall_margin=0.5",
    "gate.max_ece=0.5",
    "gate.max_score_gap=1",
    "gate.min_lists=10",
    "gate.min_fresh_lists=5",
    "gate.max_calibration_ratio=10",
    "model.mlp=[32, 16]",
    "training.batch_size=256",
]
"""The tiny world's intervals are wide: bounds under which an honest model passes."""


@dataclass
class Home:
    """One workspace with a Triton of its own."""

    path: Path
    data: Path
    environment: dict[str, str]

    @classmethod
    def make(cls, path: Path) -> "Home":
        ports = [_free_port() for _ in range(3)]
        names = ("FRESHRANK_TRITON_GRPC_PORT", "FRESHRANK_TRITON_HTTP_PORT", "FRESHRANK_TRITON_METRICS_PORT")
        own = {"FRESHRANK_HOME": str(path / "home"), **{n: str(p) for n, p in zip(names, ports, strict=True)}}
        data = simulate(path / "world", WORLD).path
        return cls(path, data, os.environ | own)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "freshrank", "-v", arguments[0], "--data", str(self.data), *arguments[1:]]

    def freshrank(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, check=False
        )

    def run_arguments(self, day: date, *overrides: str) -> list[str]:
        sets = [part for override in (*LENIENT, *overrides) for part in ("--set", override)]
        return ["run", "--date", day.isoformat(), *sets]

    def run(self, day: date, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self.freshrank(*self.run_arguments(day, *overrides))

    def folder(self, day: date) -> Path:
        return self.path / "home" / "runs" / "simulated" / day.isoformat()

    @property
    def triton(self) -> Path:
        return self.path / "home" / "triton" / "simulated"

    @property
    def served(self) -> dict[str, object]:
        pointer: dict[str, object] = read_json(self.triton / "served.json")
        return pointer

    def versions(self) -> list[str]:
        return sorted(entry.name for entry in (self.triton / "models" / "ranker").iterdir() if entry.name.isdigit())

    def state(self) -> dict[str, object]:
        """What a user can see of how the days ended."""
        files = (path for path in (self.triton / "models" / "ranker").rglob("*") if path.is_file())
        digests = {
            str(p.relative_to(self.triton)): sha256_of(p) for p in files if p.suffix in (".onnx", ".safetensors")
        }
        verdicts = {p.parent.name: read_json(p) for p in (self.path / "home" / "runs").glob("*/*/verdict.json")}
        return {"served": self.served, "files": digests, "verdicts": verdicts}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
