"""`freshrank bench ...`: side-by-side measurements, each of which writes its evidence."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from freshrank.cli.options import Data, Day, Overrides, Protocol, Recipe, run_date_of
from freshrank.cli.terminal import err, out, say
from freshrank.errors import ConfigError
from freshrank.recipes import DEFAULT_RECIPE, recipe

bench = typer.Typer(no_args_is_help=True, help="Side-by-side measurements; each writes its evidence.")

BenchData = Annotated[
    Path,
    typer.Option(
        "--data", help="KuaiRand's files (imported under --protocol and as the oracle), or an imported dataset."
    ),
]
BenchProtocol = Annotated[
    Literal["staggered", "sparse", "strict"],
    typer.Option(
        "--protocol",
        help=("How KuaiRand's items are made cold. An imported dataset keeps the one it was imported under."),
    ),
]
BenchRows = Annotated[
    str | None,
    typer.Option(
        "--rows",
        help="Names, comma-separated; the baseline is always among them. Default: all. A wrong one brings up the list.",
    ),
]
BenchOracle = Annotated[
    Path | None,
    typer.Option(
        "--oracle", help="Imported dataset in which the same items are warm: the reference of the cold gap closed."
    ),
]
BenchJobs = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Processes, one thread each. Default: one per core.")
]
BenchOut = Annotated[Path, typer.Option("--out", help="Folder of the evidence; its page is OUT.md.")]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--out", help="JSON file to write; a picture may go beside it. Default: bench/NAME.json in the workspace."
    ),
]
TrainDays = Annotated[int, typer.Option("--train-days", min=1, help="Days trained on.")]
EvaluationDays = Annotated[int, typer.Option("--evaluation-days", min=1, help="Days judged.")]
Lists = Annotated[
    Literal["user", "request"],
    typer.Option("--lists", help="What is ranked together: all a user saw on the evaluation days, or a request."),
]


@bench.command("table1")
def bench_table1(
    data: BenchData,
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds 0 .. N-1 of every row.")] = 20,
    protocol: BenchProtocol = "sparse",
    rows: BenchRows = None,
    jobs: BenchJobs = None,
    target: BenchOut = Path("docs/evidence"),
    untuned: Annotated[
        bool, typer.Option("--untuned", help="The papers' settings instead of those that `freshrank bench tune` found.")
    ] = False,
    timing_repeats: Annotated[int, typer.Option(min=0, help="Side-by-side timings per row; 0 for none.")] = 3,
    day: Day = None,
    train_days: TrainDays = 10,
    evaluation_days: EvaluationDays = 3,
    lists: Lists = "user",
    oracle: BenchOracle = None,
) -> None:
    """Train and judge every row of the paper's table 1; what is done is kept, so a stopped run goes on."""
    from freshrank.bench.paper.rows import chosen
    from freshrank.bench.paper.table1 import Table1Options, table1

    chosen(_names(rows))  # a wrong name is not worth an import of the data
    prepared = _bench_data(data, protocol, day, train_days, evaluation_days, oracle)
    options = Table1Options(seeds, _names(rows), _jobs(jobs), target, untuned, timing_repeats, lists)
    failures = table1(prepared, options, out)
    say(f"evidence: {target.with_suffix('.md')}")
    _end_of_bench(len(failures))


@bench.command("tune")
def bench_tune(
    data: BenchData,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every candidate.")] = 2,
    protocol: BenchProtocol = "sparse",
    rows: BenchRows = None,
    jobs: BenchJobs = None,
    target: BenchOut = Path("docs/evidence"),
    day: Day = None,
    train_days: TrainDays = 10,
    evaluation_days: EvaluationDays = 3,
    lists: Lists = "user",
    oracle: BenchOracle = None,
) -> None:
    """Choose every row's settings among as many candidates, on days before those that table 1 judges."""
    from freshrank.bench.paper.rows import TUNED, chosen
    from freshrank.bench.paper.tune import TuneOptions, tune

    chosen(_names(rows))
    prepared = _bench_data(data, protocol, day, train_days, evaluation_days, oracle)
    failures = tune(prepared, TuneOptions(seeds, _names(rows), _jobs(jobs), target, lists=lists), out)
    say(f"winners: {TUNED}")
    _end_of_bench(len(failures))


@bench.command("epoch")
def bench_epoch(
    data: BenchData,
    protocol: BenchProtocol = "sparse",
    steps: Annotated[int, typer.Option(min=1, help="Batches per timing.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each way, in turn.")] = 5,
    target: JsonFile = None,
) -> None:
    """How much faster an epoch is for encoding each user's sequence once a day and without padding."""
    from freshrank.bench.training.epoch import epoch

    target = _evidence(target, "epoch")
    result = epoch(_bench_data(data, protocol, None, 10, 3, None), steps, repeats, target, out)
    say(
        f"{result.speed_up:.2f} times as fast ({result.lowest:.2f} to {result.highest:.2f}) on {result.threads} "
        f"threads; losses differ by at most {result.loss_difference:.1e}"
    )


@bench.command("train")
def bench_train(
    data: Data,
    day: Day = None,
    days: Annotated[int, typer.Option(min=1, help="Days trained on.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Batches of ours per measurement.")] = 300,
    peer_steps: Annotated[int, typer.Option(min=4, help="Batches of a peer per measurement.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each system, in turn.")] = 5,
    window_rows: Annotated[int, typer.Option(min=1000, help="Rows a window of the stream holds.")] = 65_536,
    peers: Annotated[str, typer.Option(help="Libraries compared with, commas between; empty: none.")] = (
        "torch-rechub,FuxiCTR"
    ),
    target: JsonFile = None,
) -> None:
    """Examples per second and memory of streamed training, against the same steps from memory and two libraries.

    Also how fast bfloat16 and torch.compile are on this machine's device, and what to set.

    The libraries come with `make test`, or with `pip install 'freshrank[bench]'`; `--peers ""` does without them.
    """
    from freshrank.bench.training.throughput import TrainPlan, train
    from freshrank.dates import parse_day

    target = _evidence(target, "train")
    plan = TrainPlan(
        days=days,
        steps=steps,
        peer_steps=peer_steps,
        rounds=rounds,
        window_rows=window_rows,
        peers=tuple(_names(peers) or ()),
    )
    result = train(data, parse_day(run_date_of(data, day)), plan, target, out)
    for name, system in result.systems.items():
        say(
            f"{name}: {system.examples_per_second:,.0f}/s ({system.lowest:,.0f} to {system.highest:,.0f}), "
            f"{system.peak_mib:,.0f} MiB"
        )
    for ratio in result.ratios:
        say(
            f"{ratio.name}: {ratio.value:.2f} ({ratio.lowest:.2f} to {ratio.highest:.2f}), "
            f"{ratio.target} {'met' if ratio.met else 'NOT met'}"
        )
    for numerics in result.numerics:
        say(str(numerics))
    say(result.advice)
    _say_where(target)


@bench.command("serving")
def bench_serving(
    data: Data,
    home: Annotated[
        Path | None,
        typer.Option(
            help="Workspace of its own for the model and the servers. Default: bench_serving in the workspace."
        ),
    ] = None,
    candidates: Annotated[str, typer.Option(help="Sizes of requests.")] = "50,100,500,2000",
    callers: Annotated[str, typer.Option(help="Concurrent callers, at 500 candidates.")] = "1,2,4,8,16",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each slice.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Slices of each system, in turn.")] = 5,
    recipe_name: Recipe = DEFAULT_RECIPE,
    overrides: Overrides = None,
    target: JsonFile = None,
) -> None:
    """Latency and throughput of `ranking` against its floor and a FastAPI server, from a real Redis, in one run."""
    from freshrank.bench.serving.latency import ServingPlan, serving
    from freshrank.settings import settings

    target = _evidence(target, "serving")
    plan = ServingPlan(sizes=_numbers(candidates), callers=_numbers(callers), seconds=seconds, rounds=rounds)
    result = serving(data, home or settings().home / "bench_serving", plan, target, recipe(recipe_name, overrides), out)
    for ratio in result.ratios:
        verdict = {True: "met", False: "NOT met", None: ""}[ratio.met]
        say(f"{ratio.name}: {ratio.value:.2f} ({ratio.lowest:.2f} to {ratio.highest:.2f}) {ratio.target} {verdict}")
    _say_where(target)


def _say_where(target: Path) -> None:
    say(f"written: {target} and {target.with_suffix('.png').name}")


def _evidence(target: Path | None, name: str) -> Path:
    from freshrank.settings import settings

    return target or settings().home / "bench" / f"{name}.json"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"received {text!r}, expected whole numbers with commas between, e.g. 50,500") from None


def _bench_data(
    data: Path, protocol: Any, day: str | None, train_days: int, evaluation_days: int, oracle: Path | None
) -> Any:
    from freshrank.bench.paper.evidence_data import locate
    from freshrank.config import WindowConfig
    from freshrank.dates import parse_day

    windows = WindowConfig(train_days=train_days, evaluation_days=evaluation_days)
    return locate(data, protocol, windows, parse_day(day) if day else None, oracle)


def _names(rows: str | None) -> list[str] | None:
    return [name.strip() for name in rows.split(",") if name.strip()] if rows is not None else None


def _jobs(jobs: int | None) -> int:
    return jobs or os.cpu_count() or 1


def _end_of_bench(failures: int) -> None:
    if failures:
        err.print(
            f"{failures} trainings failed; what they belong to is missing. Run the same command to try them again."
        )
        raise typer.Exit(1)


@bench.command("figures")
def bench_figures(
    data: Annotated[Path, typer.Option("--data", help="Imported dataset, or KuaiRand's files.")],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per recipe; those made before are reused.")] = 5,
    protocol: Protocol = "sparse",
    target: Annotated[Path, typer.Option("--out", help="Where figure-*.csv, .png and figures.md go.")] = Path(
        "docs/evidence"
    ),
    ablation: Annotated[
        Literal["missing", "permuted"], typer.Option(help="How a feature is taken away at inference.")
    ] = "missing",
) -> None:
    """Draw the paper's figures 2, 6 and 7 from trained models, with their numbers and whether its findings hold."""
    from freshrank.bench.paper import figures

    page, written = figures.run(data, protocol, seeds, target, ablation)
    for figure in written:
        say(f"figure {figure.name}  {figure.claim.outcome}", highlight=False)
    say(f"{page}")


@bench.command("features")
def bench_features(
    millions: Annotated[str, typer.Option(help="Impressions of 28 days, in millions; 100 take some 8 GB of disk.")] = (
        "1,10,100"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each step, in turn.")] = 3,
    memory_gib: Annotated[float, typer.Option(min=0.1, help="What DuckDB may hold.")] = 5.0,
    work: Annotated[
        Path | None, typer.Option(help="Where the worlds are simulated. Default: bench_features in the workspace.")
    ] = None,
    target: JsonFile = None,
) -> None:
    """Features and training frame of one day, from 1 to 100 million impressions, beside plain DuckDB on the files."""
    from freshrank.bench.data.features import FeaturesPlan, features
    from freshrank.settings import settings

    target = _evidence(target, "features")
    plan = FeaturesPlan(millions=tuple(float(n) for n in _numbers(millions)), rounds=rounds, memory_gib=memory_gib)
    result = features(plan, work or settings().home / "bench_features", target, out)
    for sentence in result.sentences():
        say(sentence, highlight=False)
    _say_where(target)


@bench.command("swap")
def bench_swap(
    data: Data,
    swaps: Annotated[int, typer.Option(min=1, help="Publications of a version nobody has seen.")] = 100,
    rollbacks: Annotated[int, typer.Option(min=0, help="Roll-backs, spread evenly among them.")] = 20,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests per second, come what may.")] = 40,
    candidates: Annotated[int, typer.Option(min=1, max=2000, help="Per request.")] = 100,
    target: JsonFile = None,
) -> None:
    """Swap and roll back under constant load: lost and wrong requests, latency during and between, memory."""
    from freshrank.bench.serving.swap import SwapPlan, swap

    target = _evidence(target, "swap")
    result = swap(data, SwapPlan(swaps=swaps, rollbacks=rollbacks, rate=rate, candidates=candidates), target, out)
    for sentence in result.sentences():
        say(sentence, highlight=False)
    _say_where(target)
    raise typer.Exit(0 if result.passed else 1)


@bench.command("validation")
def bench_validation(
    rows: Annotated[int, typer.Option(min=1_000, help="Impressions of each simulated day.")] = 1_000_000,
    trailing_days: Annotated[int, typer.Option(min=1, help="Days before the validated one.")] = 7,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each engine, in turn.")] = 3,
    target: JsonFile = None,
) -> None:
    """How long a day of a million rows takes to validate, and which engine of Great Expectations does it best."""
    from freshrank.bench.data.validation import ValidationPlan, validation
    from freshrank.settings import settings

    target = _evidence(target, "validation")
    plan = ValidationPlan(rows=rows, trailing_days=trailing_days, repeats=repeats)
    result = validation(settings().home / "bench_validation", plan, target, out)
    for sentence in result.sentences():
        say(sentence, highlight=False)
    _say_where(target)
    raise typer.Exit(0 if result.passed else 1)
