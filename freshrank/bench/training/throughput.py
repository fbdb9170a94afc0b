"""`freshrank bench train`: examples per second of streamed training, and its memory, beside what it could cost.

Every measurement is a process of its own, so that its peak memory is its own; systems take turns, and a ratio is formed
within a turn. Ours trains with no technique on, streamed and on the same batches held ready in memory: what reading,
encoding and shuffling cost. The peers train on batches held ready in memory, which their loaders would have to make.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file

from freshrank.bench.measure import Ratio, alone, machine, peak_mib, ratio
from freshrank.bench.training import peers
from freshrank.config import ModelConfig, TechniquesConfig, TrainingConfig, WindowConfig
from freshrank.errors import ConfigError
from freshrank.models.ranker import Ranker, count_parameters
from freshrank.pipeline import steps
from freshrank.pipeline.run import Run
from freshrank.reports.report import library_versions
from freshrank.reports.style import BLUE, GREY, STYLE, VERMILION
from freshrank.schema import IN_TRAINING
from freshrank.storage.files import atomic_write, write_json
from freshrank.training.batches import BatchSource, Encoded, TensorFrame, Weighted
from freshrank.training.device import Device
from freshrank.training.distributed import ALONE, ProcessGroup
from freshrank.training.loop import StepWatch, fit, model_schema
from freshrank.training.shards import training_rows
from freshrank.training.stream import encoded_days

if TYPE_CHECKING:
    from matplotlib.axes import Axes


STREAMED, READY = "freshrank, streamed", "freshrank, batches in memory"
LOADER = "torch-rechub, its own loader"
WARM_UP = 3


STEPS_TIMED = 15
Numerics = tuple[Literal["float32", "bfloat16"], bool]
"""``training.precision`` and ``training.compile``."""
NUMERICS: tuple[Numerics, ...] = (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True))
"""The defaults first, which the others are compared with."""


@dataclass(frozen=True)
class TrainPlan:
    """How much is measured."""

    days: int = 10
    batch_size: int = 1024
    window_rows: int = 65_536
    steps: int = 300
    peer_steps: int = 40
    rounds: int = 5
    numerics: tuple[Numerics, ...] = NUMERICS
    threads: int = 0
    """0: as many as torch takes."""
    peers: tuple[str, ...] = tuple(peers.PEERS)


@dataclass(frozen=True)
class Work:
    """Which rows a process trains on."""

    data: Path
    run_date: date
    plan: TrainPlan

    @property
    def windows(self) -> WindowConfig:
        return WindowConfig(train_days=self.plan.days, calibration_days=1, evaluation_days=1)

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(batch_size=self.plan.batch_size, window_rows=self.plan.window_rows, min_steps=1)

    @property
    def run(self) -> Run:
        return Run(self.data, self.run_date.isoformat())

    @property
    def wanted(self) -> list[date]:
        return self.run.days(self.windows.split(self.run_date).train, "training", IN_TRAINING)

    @property
    def rows(self) -> int:
        return training_rows(self.run.dataset, self.wanted)

    def fewer(self, share: int) -> "Work":
        """The last of the days, a part of ``share``."""
        return replace(self, plan=replace(self.plan, days=self.plan.days // share))

    def encoded(self) -> Encoded[BatchSource]:
        run, schema = self.run, model_schema(self.run.dataset.schema, TechniquesConfig())
        return encoded_days(run.dataset, run.workspace, self.wanted, schema, ModelConfig().min_count, self.training)


class Measurement(BaseModel):
    """One process."""

    rows: int
    seconds: float
    peak_mib: float
    cpu_seconds: float = 0.0
    """Of all threads: what reading ahead costs shows here, and other load on the machine hardly does."""
    parameters: int = 0
    loss: float = 0.0


class Speed(BaseModel):
    """One system, over the rounds."""

    examples_per_second: float
    lowest: float
    highest: float
    examples_per_cpu_second: float
    peak_mib: float
    parameters: int
    rows: int
    loss: float


class Memory(BaseModel):
    """Peak resident memory of reading an epoch, by how many days it has."""

    days: int
    rows: int
    streamed_mib: float
    whole_mib: float


class NumericsSpeed(BaseModel):
    """Steps on the machine's device beside those of the defaults."""

    precision: Literal["float32", "bfloat16"]
    compile: bool
    speed_up: Ratio | None
    failure: str = ""
    """Why no step was made."""

    @property
    def settings(self) -> str:
        return f"training.precision={self.precision} training.compile={json.dumps(self.compile)}"

    def __str__(self) -> str:
        if self.speed_up is None:
            return f"{self.settings}: not possible here, {self.failure}"
        ratio = self.speed_up
        return (
            f"{self.settings}: {ratio.value:.2f} times the defaults' speed ({ratio.lowest:.2f} to {ratio.highest:.2f})"
        )


class TrainBench(BaseModel):
    rows: int
    batch_size: int
    window_rows: int
    threads: int
    systems: dict[str, Speed]
    ratios: list[Ratio]
    numerics: list[NumericsSpeed]
    advice: str
    memory: list[Memory]
    same_losses: bool
    """Whether the streamed steps and those on batches in memory ended with the same loss to the bit."""
    machine: dict[str, str]
    versions: dict[str, str]
    differs: str


class FirstBatches:
    """The first ``count`` batches of a source; length and schedule are the whole source's."""

    def __init__(self, whole: BatchSource, count: int) -> None:
        self.whole, self.count = whole, count
        self.user_days, self.cold_rows = whole.user_days, whole.cold_rows

    def __len__(self) -> int:
        return len(self.whole)

    def feed(
        self, size: int, epochs: int, seed: int, start: int = 0, group: ProcessGroup = ALONE
    ) -> Iterator[Weighted]:
        return islice(self.whole.feed(size, epochs, seed, start, group), self.count)


class PreparedBatches(FirstBatches):
    """The same batches, made before anybody asks."""

    def __init__(self, whole: BatchSource, count: int, training: TrainingConfig) -> None:
        super().__init__(whole, count)
        self.batches = list(super().feed(training.batch_size, 1, training.seed))

    def feed(
        self, size: int, epochs: int, seed: int, start: int = 0, group: ProcessGroup = ALONE
    ) -> Iterator[Weighted]:
        return islice(iter(self.batches), start, None)


def _ours(work: Work, ready: bool) -> Measurement:
    _set_threads(work)
    encoded, plan = work.encoded(), work.plan
    _fitted(FirstBatches(encoded.data, WARM_UP), encoded, work.training)
    source = (
        PreparedBatches(encoded.data, plan.steps, work.training) if ready else FirstBatches(encoded.data, plan.steps)
    )
    cpu = time.process_time()
    seconds, loss, parameters = _fitted(source, encoded, work.training)
    cpu = time.process_time() - cpu
    rows = min(len(encoded.data), plan.steps * plan.batch_size)
    return Measurement(
        rows=rows, seconds=seconds, cpu_seconds=cpu, peak_mib=peak_mib(), parameters=parameters, loss=loss
    )


def _fitted(
    source: BatchSource, encoded: Encoded[BatchSource], training: TrainingConfig, watch: StepWatch | None = None
) -> tuple[float, float, int]:
    torch.manual_seed(0)
    device = Device.choose(training)
    ranker, techniques = Ranker(encoded.encoder, ModelConfig()).to(device.name), TechniquesConfig()
    started = time.perf_counter()
    curve = fit(ranker, source, encoded.encoder, techniques, training, device, watch)
    seconds = time.perf_counter() - started
    return seconds, curve.losses["bce"][-1] if curve.losses else 0.0, count_parameters(ranker)


def _step_seconds(work: Work, numerics: Numerics) -> float | str:
    """Of a step on the machine's device, the median of some; or in a sentence why it takes none."""
    _set_threads(work)
    training = work.training.model_copy(update=dict(zip(("precision", "compile"), numerics, strict=True)))
    encoded, began = work.encoded(), []

    def watch(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began.append(time.perf_counter())

    try:
        _fitted(PreparedBatches(encoded.data, STEPS_TIMED + 1, training), encoded, training, watch)
    except RuntimeError as error:  # no compiler, say
        return str(error).partition("\n")[0]
    seconds = [end - start for start, end in pairwise(began)]
    return median(seconds[len(seconds) // 3 :])  # the first ones compile


def _export(work: Work, path: Path) -> peers.Fields:
    """Write the rows of the first batches to ``path`` as the peers take them."""
    encoded = work.encoded()
    ranker = Ranker(encoded.encoder, ModelConfig())
    batches = islice(encoded.data.feed(work.plan.batch_size, 1, 0), work.plan.peer_steps)
    parts = [peers.rows_of(fed.batch, encoded.encoder, ranker) for fed in batches]
    rows = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    save_file(rows | {"labels": torch.cat([labels for _, labels in parts])}, path)
    return peers.Fields.of(encoded.encoder, ModelConfig(), rows[peers.DENSE].shape[1])


def _peer(name: str, work: Work, columns: peers.Fields, path: Path, own_loader: bool = False) -> Measurement:
    _set_threads(work)
    rows = load_file(path)
    labels, size = rows.pop("labels"), work.plan.batch_size
    torch.manual_seed(0)
    with peers.silent():
        peer = peers.PEERS[name](columns, ModelConfig(), work.training.learning_rate)
        batches = _batches(rows, labels, size)
        peer.train(batches[:WARM_UP])
        fed: Any = batches
        if own_loader:
            assert isinstance(peer, peers.Rechub)
            fed = peer.loader(rows, labels, size)
        started, cpu = time.perf_counter(), time.process_time()
        losses = peer.train(fed)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Measurement(
        rows=len(labels),
        seconds=seconds,
        cpu_seconds=cpu,
        peak_mib=peak_mib(),
        parameters=peer.parameters,
        loss=sum(losses),
    )


def _batches(rows: peers.PeerRows, labels: torch.Tensor, size: int) -> list[tuple[peers.PeerRows, torch.Tensor]]:
    parts = {name: block.split(size) for name, block in rows.items()}
    return [
        ({name: part[number].clone() for name, part in parts.items()}, part_labels)
        for number, part_labels in enumerate(labels.split(size))
    ]


def _read(work: Work, whole: bool) -> Measurement:
    """Every batch of an epoch, nothing learned from it."""
    _set_threads(work)
    if whole:
        work = replace(work, plan=replace(work.plan, window_rows=10**9))
    started, encoded = time.perf_counter(), work.encoded()
    assert isinstance(encoded.data, TensorFrame) == whole
    rows = sum(len(fed.batch.labels) for fed in encoded.data.feed(work.plan.batch_size, 1, 0))
    return Measurement(rows=rows, seconds=time.perf_counter() - started, peak_mib=peak_mib())


def _set_threads(work: Work) -> None:
    if work.plan.threads:
        torch.set_num_threads(work.plan.threads)


def train(data: Path, run_date: date, plan: TrainPlan, out: Path, console: Console) -> TrainBench:
    """Measure as ``plan`` says; write ``out`` as JSON and a picture beside it.

    Raises:
        ConfigError: a peer is not installed, or all rows fit a window, so that nothing would be streamed.
    """

    peers.require(plan.peers)
    work = Work(data.resolve(), run_date, plan)
    if work.rows <= plan.window_rows:
        raise ConfigError(
            f"bench train: --window-rows: received {plan.window_rows}, expected fewer than the "
            f"{work.rows} training rows, else nothing is streamed; or name more --days"
        )
    steps.build_features(work.data, run_date.isoformat(), work.windows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        columns = alone(_export, work, path)
        turns = _turns(work, columns, path)
        runs = [
            {name: alone(*call) for name, call in (turns if number % 2 else dict(reversed(turns.items()))).items()}
            for number in track(range(plan.rounds), "training", console=console, disable=not console.is_terminal)
        ]
    # Fewer days may fit a window, and then there is nothing to compare.
    parts = [work.fewer(share) for share in (4, 2, 1) if plan.days // share]
    memory = [_memory(part) for part in parts if part.rows > plan.window_rows]
    numerics = _numerics(work, console)
    systems = {name: _speed([each[name] for each in runs]) for name in turns}
    result = TrainBench(
        rows=memory[-1].rows,
        batch_size=plan.batch_size,
        window_rows=plan.window_rows,
        threads=plan.threads or torch.get_num_threads(),
        systems=systems,
        ratios=_ratios(runs, plan.peers),
        numerics=numerics,
        advice=advice(str(Device.choose(work.training)).partition(",")[0], numerics),
        memory=memory,
        same_losses=all(each[STREAMED].loss == each[READY].loss for each in runs),
        machine=machine(),
        versions=library_versions() | {name: peers.version(name) for name in plan.peers},
        differs=" ".join(str(peers.__doc__).split()),
    )
    write_json(out, result.model_dump())
    write_picture(result, out.with_suffix(".png"))
    return result


def _turns(work: Work, columns: peers.Fields, path: Path) -> dict[str, tuple[Any, ...]]:
    ours: dict[str, tuple[Any, ...]] = {STREAMED: (_ours, work, False), READY: (_ours, work, True)}
    theirs: dict[str, tuple[Any, ...]] = {name: (_peer, name, work, columns, path) for name in work.plan.peers}
    if "torch-rechub" in theirs:
        theirs[LOADER] = (*theirs["torch-rechub"], True)
    return ours | theirs


def _speed(runs: Sequence[Measurement]) -> Speed:
    speeds = [each.rows / each.seconds for each in runs]
    return Speed(
        examples_per_second=median(speeds),
        lowest=min(speeds),
        highest=max(speeds),
        examples_per_cpu_second=median(each.rows / each.cpu_seconds for each in runs),
        peak_mib=max(each.peak_mib for each in runs),
        parameters=runs[0].parameters,
        rows=runs[0].rows,
        loss=runs[0].loss,
    )


def _ratios(rounds: Sequence[dict[str, Measurement]], names: Sequence[str]) -> list[Ratio]:
    speeds = [{name: each.rows / each.seconds for name, each in turn.items()} for turn in rounds]
    ours, ready = ([each[name] for each in speeds] for name in (STREAMED, READY))
    ratios = [ratio("streamed / batches in memory", ours, ready, at_least=0.9)]
    if names:
        better = [max(each[name] for name in names) for each in speeds]
        ratios.append(ratio("streamed / the better peer, its batches in memory", ours, better, at_least=3))
    return ratios


def _numerics(work: Work, console: Console) -> list[NumericsSpeed]:
    """Every combination in turn with the others; one that failed is not tried again."""
    plan, found = work.plan, dict[Numerics, list[float]]()
    failures: dict[Numerics, str] = {}
    for _ in track(range(plan.rounds), "precision", console=console, disable=not console.is_terminal):
        for numerics in (each for each in plan.numerics if each not in failures):
            seconds = alone(_step_seconds, work, numerics)
            if isinstance(seconds, str):
                failures[numerics] = seconds
            else:
                found.setdefault(numerics, []).append(seconds)
    return [
        NumericsSpeed(
            precision=precision,
            compile=compiled,
            speed_up=None
            if (precision, compiled) in failures
            else ratio("speed-up", found[plan.numerics[0]], found[precision, compiled]),
            failure=failures.get((precision, compiled), ""),
        )
        for precision, compiled in plan.numerics[1:]
    ]


def advice(device: str, numerics: Sequence[NumericsSpeed]) -> str:
    """Which configuration is the fastest on ``device``."""
    faster = [(each.speed_up.value, each.settings) for each in numerics if each.speed_up and each.speed_up.lowest > 1]
    if not faster:
        return f"{device}: nothing is faster than the defaults in every round, leave them"
    flags = " ".join(f"--set {setting}" for setting in max(faster)[1].split())
    return f"{device}: the fastest is {flags}; it makes another ranker, so let the gate judge it"


def _memory(work: Work) -> Memory:
    streamed, whole = alone(_read, work, False), alone(_read, work, True)
    return Memory(days=work.plan.days, rows=streamed.rows, streamed_mib=streamed.peak_mib, whole_mib=whole.peak_mib)


def write_picture(result: "TrainBench", path: Path) -> None:
    """A PNG at ``path``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), atomic_write(path) as temporary:
        figure = Figure(figsize=(11, 4), layout="constrained")
        speed, memory = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_speed(speed, result)
        _draw_memory(memory, result)
        figure.savefig(temporary, format="png", dpi=130)


def _draw_speed(axes: "Axes", result: "TrainBench") -> None:
    names = list(reversed(result.systems))
    systems = [result.systems[name] for name in names]
    middle = [each.examples_per_second for each in systems]
    spread = [
        [each.examples_per_second - each.lowest for each in systems],
        [each.highest - each.examples_per_second for each in systems],
    ]
    colours = [BLUE if name.startswith("freshrank") else GREY for name in names]
    axes.barh(names, middle, xerr=spread, color=colours, ecolor=VERMILION)
    for place, each in enumerate(systems):
        axes.text(each.highest, place, f"  {each.examples_per_second:,.0f}/s, {each.peak_mib:,.0f} MiB", va="center")
    axes.set_xlim(right=1.35 * max(each.highest for each in systems))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="examples per second", title=f"Batches of {result.batch_size:,}, {result.threads} threads")


def _draw_memory(axes: "Axes", result: "TrainBench") -> None:
    rows = [each.rows for each in result.memory]
    axes.plot(
        rows,
        [each.streamed_mib for each in result.memory],
        "o-",
        color=BLUE,
        label=f"streamed, windows of {result.window_rows:,}",
    )
    axes.plot(rows, [each.whole_mib for each in result.memory], "s--", color=GREY, label="in memory")
    axes.set(xlabel="training rows", ylabel="peak resident MiB", title="Reading an epoch")
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
