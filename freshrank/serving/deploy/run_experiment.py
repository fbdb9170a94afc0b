"""Start and stop an experiment: versions are loaded and verified before the first user meets them."""

import logging
from contextlib import suppress

from pydantic import ValidationError

from freshrank.errors import ConfigError, ServingError
from freshrank.serving.deploy.publish import verify, warm_up
from freshrank.serving.deploy.replicas import Fleet, Replica, Replicas, changing
from freshrank.serving.experiment import Arm, Experiment, ExperimentFile
from freshrank.serving.probe_requests import requests_from_nobody
from freshrank.serving.repository import RANKER, ModelRepository
from freshrank.storage.files import read_json

log = logging.getLogger(__name__)


def planned(name: str, salt: str, challengers: list[str], shadows: list[str]) -> Experiment:
    """An experiment from ``VERSION=SHARE`` texts; ConfigError says what cannot be."""
    try:
        return Experiment(name=name, salt=salt, challengers=_arms(challengers), shadows=_arms(shadows))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        problem_text = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"experiment: {where + ': ' if where else ''}{problem_text}") from None


def _arms(texts: list[str]) -> tuple[Arm, ...]:
    return tuple(_arm(text) for text in texts)


def _arm(text: str) -> Arm:
    version, _, share = text.partition("=")
    try:
        return Arm(version=int(version), share=float(share))
    except ValueError:
        raise ConfigError(
            f"experiment: received {text!r}, expected VERSION=SHARE with a share above 0 and at most 1, e.g. 4=0.1"
        ) from None


def described(repository: ModelRepository) -> str:
    """The running experiment as a person wants to read it."""
    running, served = ExperimentFile(repository.root).read(), repository.served()
    if running is None:
        return "no experiment runs"
    rest = 1 - sum(arm.share for arm in running.challengers)
    champion = served.version if served else "?"
    lines = [f"experiment '{running.name}'", f"arm 0  champion    version {champion}  {rest:.1%} of users"]
    lines += [
        f"arm {number}  challenger  version {arm.version}  {arm.share:.1%} of users"
        for number, arm in enumerate(running.challengers, start=1)
    ]
    lines += [f"       shadow      version {arm.version}  {arm.share:.1%} of users" for arm in running.shadows]
    return "\n".join(lines)


def start(servers: Replicas | str, repository: ModelRepository, experiment: Experiment) -> None:
    """Load and verify every version of ``experiment`` beside what serves, on every one of ``servers`` (the replicas, or
    the address of the one Triton), then write its file; it replaces another one.

    Raises:
        ConfigError: a version is not installed, or is the one that serves.
        ServingError: a version does not load or gives wrong golden answers; nothing has changed then.
    """
    with changing(servers, repository) as fleet:
        fleet.require_ready()
        served = repository.served()
        if served is None:
            raise ServingError("nothing is served yet; publish a bundle first")
        for version in experiment.versions:
            _require(version, served.version, repository.versions())
        for shadow in experiment.shadows:
            _require_same_features(repository, shadow.version, served.version)
        try:
            _prepare(fleet, experiment)
        except ServingError as error:
            left = ""
            with suppress(ServingError):
                left = fleet.withdraw(repository.live())
            raise ServingError(f"experiment '{experiment.name}' was not started: {error}{left}") from error
        ExperimentFile(repository.root).write(experiment)
        _settle(fleet)


def _prepare(fleet: Fleet, experiment: Experiment) -> None:
    repository = fleet.repository
    config = repository.ranker_config_json({*repository.live(), *experiment.versions})
    repository.refresh_code(experiment.versions)

    def prepare(replica: Replica) -> None:
        replica.enter("load", experiment.versions)
        replica.client.load(RANKER, config)
        for version in experiment.versions:
            replica.enter("verify", version)
            verify(replica.client, repository, version)
            replica.enter("warm-up", version)
            warm_up(replica.client, repository, version, requests_from_nobody())

    fleet.each(prepare, "load", gently=True)
    if not fleet.is_one:
        fleet.complete(lambda client: all(client.is_model_ready(RANKER, v) for v in experiment.versions), prepare)


def stop(servers: Replicas | str, repository: ModelRepository) -> Experiment | None:
    """All users meet the champion again, what nobody needs is unloaded; returns the experiment that ran."""
    with changing(servers, repository) as fleet:
        file = ExperimentFile(repository.root)
        running = file.read()
        file.remove()
        if not fleet.is_one or fleet.is_ready():
            _settle(fleet)
        return running


def _settle(fleet: Fleet) -> None:
    repository = fleet.repository
    repository.write_configs()
    if live := repository.live():
        config = repository.ranker_config_json(live)
        try:
            fleet.each(lambda replica: replica.client.load(RANKER, config), "settle")
        except ServingError as error:
            if fleet.is_one:
                raise
            log.warning("what is no longer needed is not unloaded everywhere; the next publication does it: %s", error)


def _require(version: int, served: int, installed: list[int]) -> None:
    if version == served:
        raise ConfigError(f"experiment: version {version} serves already, it is the champion; name another one")
    if version not in installed:
        raise ConfigError(f"experiment: version {version} is not installed, expected one of {installed}")


def _require_same_features(repository: ModelRepository, shadow: int, served: int) -> None:
    if _schema(repository, shadow) != _schema(repository, served):
        raise ConfigError(
            f"experiment: shadow version {shadow} reads other features than version {served}, which it "
            "is to shadow; make it a challenger"
        )


def _schema(repository: ModelRepository, version: int) -> object:
    return read_json(repository.version_directory(version) / "encoder.json")["schema"]
