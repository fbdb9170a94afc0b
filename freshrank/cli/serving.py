"""`freshrank serve`, `status`, `stop`, `rank`, `rollback`, `experiment`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freshrank.cli.options import Data
from freshrank.cli.terminal import err, out, ranking_table, say

commands = typer.Typer()

if TYPE_CHECKING:
    from freshrank.serving.client.client import Answer
    from freshrank.serving.deploy.replicas import Replicas
    from freshrank.serving.repository import ModelRepository

experiment = typer.Typer(no_args_is_help=True, help="Two versions at once: who is answered by which, and who shadows.")


@commands.command()
def rollback(
    data: Data, to: Annotated[int | None, typer.Option(help="Installed version. Default: the previous one.")] = None
) -> None:
    """Serve the previous version again, at once."""
    from freshrank.serving.deploy.publish import rollback as roll_back
    from freshrank.serving.deploy.replicas import Replicas

    repository = _repository(data)
    before = repository.served()
    pointer = roll_back(Replicas.configured(), repository, to)
    if pointer == before:
        since = f" (rolled back from {pointer.rolled_back_from})" if pointer.rolled_back_from else ""
        say(f"version {pointer.version} already serves{since}")
    else:
        say(f"served version: {pointer.rolled_back_from} -> {pointer.version} (run {pointer.run_date})")


# ---------------------------------------------------------------- serving
@commands.command()
def serve(
    data: Data,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay attached; stop with Ctrl-C.")] = False,
) -> None:
    """Start the local Triton with the model repository of this dataset; it answers on loopback only."""
    from freshrank.cli import demo
    from freshrank.serving.deploy.local import server

    def start() -> None:
        demo.start_server(data, out)

    if foreground:
        server(data).run(start)
    else:
        start()


@commands.command()
def stop(data: Data) -> None:
    """Stop the local Triton."""
    from freshrank.serving.deploy.local import server

    say("stopped" if server(data).stop() else "was not running")


@commands.command()
def status(data: Data) -> None:
    """The served version, its run, and whether the server answers; exit code 1 when it does not.

    Of several replicas (FRESHRANK_TRITON_REPLICAS, _HOST) each is listed; one that lacks what serves is exit code 1.
    """
    from freshrank.serving.deploy.local import server
    from freshrank.serving.deploy.replicas import Replicas
    from freshrank.settings import settings

    replicas = Replicas.configured()
    if not replicas.is_one:
        raise typer.Exit(_replicas_status(replicas, _repository(data)))
    now, pointer = server(data).status(), _repository(data).served()
    say(now.sentence())
    if pointer is None:
        say("nothing is published yet")
    elif now.ready:
        say(f"served version: {pointer.version} (run {pointer.run_date})")
    else:
        say(f"would serve version {pointer.version} (run {pointer.run_date}) once started")
    say(f"workspace: {settings().home}")
    raise typer.Exit(0 if now.ready else 1)


def _replicas_status(replicas: "Replicas", repository: "ModelRepository") -> int:
    from freshrank.serving.deploy.replicas import statuses

    replica_statuses, pointer = statuses(replicas, repository), repository.served()
    for each in replica_statuses:
        say(each.sentence())
    served = f"served version: {pointer.version} (run {pointer.run_date})" if pointer else "nothing is published yet"
    lacking = [each.address for each in replica_statuses if pointer and pointer.version not in each.versions]
    say(served + (f"; not loaded on {', '.join(lacking)}" if lacking else ""))
    return 1 if lacking or any(each.problem for each in replica_statuses) else 0


@commands.command()
def rank(
    data: Data,
    user: Annotated[str, typer.Option(help="User id, as in your log; unknown ones are answered too.")],
    candidates: Annotated[str, typer.Option(help="Item ids, comma-separated; unknown ones are answered too.")],
    at: Annotated[str | None, typer.Option(help="Time of the request, ISO 8601 with zone. Default: now.")] = None,
    context: Annotated[list[str] | None, typer.Option(help="Context column: name=value (repeat).")] = None,
    query: Annotated[str | None, typer.Option(help="Item the request starts from, where the log has one.")] = None,
    version: Annotated[
        int | None,
        typer.Option(
            help="Loaded version that is to answer. Default: the one that serves, or the one of the user's arm."
        ),
    ] = None,
    request_id: Annotated[str, typer.Option(help="Name under which the request log keeps it.")] = "",
    top: Annotated[int, typer.Option(help="How many to print; 0 for all.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Ask Triton to rank candidate items for a user."""
    from freshrank.serving.client.client import Client

    with Client.for_dataset(data) as client:
        items = [candidate.strip() for candidate in candidates.split(",") if candidate.strip()]
        answer = client.rank(user, items, at, context, query, version=version, request_id=request_id)
    _print_answer(answer, top, as_json)


def _print_answer(answer: "Answer", top: int, as_json: bool) -> None:

    if as_json:
        who = {"model_version": answer.model_version, "arm": answer.arm, "degraded": answer.degraded}
        for row in answer.rows()[: top or None]:
            sys.stdout.write(json.dumps(row | who) + "\n")
    else:
        out.print(ranking_table(answer, top))


ShareOf = Annotated[list[str] | None, typer.Option(metavar="VERSION=SHARE", help="Repeat for several.")]


@experiment.command("start")
def experiment_start(
    data: Data,
    name: Annotated[str, typer.Option(help="Name of the experiment, and what users are drawn by.")],
    challenger: ShareOf = None,
    shadow: ShareOf = None,
    salt: Annotated[str, typer.Option(help="Name of an earlier experiment whose users are to be kept.")] = "",
) -> None:
    """Let challengers answer a share of users, or shadows score it without answering; both are loaded and verified
    first.
    """
    from freshrank.serving.deploy.replicas import Replicas
    from freshrank.serving.deploy.run_experiment import planned, start
    from freshrank.serving.experiment import ExperimentFile

    plan = planned(name, salt, challenger or [], shadow or [])
    running = ExperimentFile(_repository(data).root).read()
    if running and running.name != name:
        err.print(f"experiment '{running.name}' runs and is replaced")
    start(Replicas.configured(), _repository(data), plan)
    experiment_show(data)


@experiment.command("show")
def experiment_show(data: Data) -> None:
    """The arms of the running experiment."""
    from freshrank.serving.deploy.run_experiment import described

    say(described(_repository(data)))


@experiment.command("stop")
def experiment_stop(data: Data) -> None:
    """End the experiment: the champion answers every user again."""
    from freshrank.serving.deploy.replicas import Replicas
    from freshrank.serving.deploy.run_experiment import stop as stop_experiment

    ended = stop_experiment(Replicas.configured(), _repository(data))
    say(f"experiment '{ended.name}' has ended" if ended else "no experiment runs")


def _repository(data: Path) -> Any:
    from freshrank.serving.deploy.local import repository

    return repository(data)
