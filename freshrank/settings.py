"""Where things are: paths, ports, stores. What is trained lives in config.py, names in schema.py."""

import json
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from freshrank.errors import ConfigError

_NOT_REPEATED = {"secret_env", "storage_url"}
"""Settings that may hold a secret where they are wrong."""
_REDIS_OPTIONS = {
    "client_name",
    "db",
    "health_check_interval",
    "max_connections",
    "password",
    "protocol",
    "ssl",
    "retry_on_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_timeout",
    "username",
}
S = TypeVar("S", bound=BaseSettings)


def store_url(url: str) -> str:
    """``url`` of an object store, or empty; ValueError where it is of another kind or carries credentials."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError("expected a URL: file:///directory or s3://bucket/prefix") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "expected a URL without credentials or a query: set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
            "and AWS_ENDPOINT_URL in the environment"
        )
    known = {"file": not parts.netloc and len(parts.path) > 1, "s3": bool(parts.netloc)}
    if url and not known.get(parts.scheme, False):
        raise ValueError("expected file:///directory or s3://bucket/prefix")
    return url.rstrip("/")


def redis_address(url: SecretStr) -> SecretStr:
    """``url`` as Feast reads it; ValueError, which repeats none of it but an option's name, where it could not."""
    nodes, options = _redis_parts(url)
    if len(nodes) != 1 or not re.fullmatch(r"[^\s:/@]+:\d{1,5}", nodes[0]):
        raise ValueError(
            "expected host:port and options with commas between, such as cache:6379,db=0,ssl=true,"
            "password=…; neither redis://… nor a comma in a password"
        )
    for name in (option.partition("=")[0] for option in options):
        if name not in _REDIS_OPTIONS and not name.startswith("ssl_"):
            raise ValueError(f"expected options among {sorted(_REDIS_OPTIONS)} and ssl_*, there is one named {name!r}")
    return url


def redis_host(url: SecretStr) -> str:
    """``host:port`` of ``url``, which is no secret, wherever it stands among the options."""
    return _redis_parts(url)[0][0]


def _redis_parts(url: SecretStr) -> tuple[list[str], list[str]]:
    """Nodes and options."""
    parts = url.get_secret_value().split(",")
    return [part for part in parts if "=" not in part], [part for part in parts if "=" in part]


def store_endpoint() -> str | None:
    """AWS_ENDPOINT_URL, None where it is not set; ConfigError where it carries credentials, for it is no secret."""
    url = os.environ.get("AWS_ENDPOINT_URL")
    if url and "@" in url:
        raise ConfigError(
            "AWS_ENDPOINT_URL: received a value that is not repeated here, expected a URL without "
            "credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return url or None


class Settings(BaseSettings):
    """Read from environment variables ``FRESHRANK_<FIELD>``; the defaults run everything on one machine."""

    model_config = SettingsConfigDict(env_prefix="FRESHRANK_", extra="forbid", use_attribute_docstrings=True)

    home: Path = Path(".freshrank")
    """Workspace: datasets, features, frames, runs, the model repository, Airflow's and Feast's state."""
    triton_host: str = "127.0.0.1"
    """The server that is published to and asked; `freshrank serve` starts one on loopback only."""
    triton_http_port: int = 8000
    """Of requests over HTTP."""
    triton_grpc_port: int = 8001
    """Of publishing, and of requests over gRPC."""
    triton_metrics_port: int = 8002
    """Of Prometheus; only of the server that `freshrank serve` starts."""
    triton_control_token: SecretStr = SecretStr("")
    """Sent with calls that list, load or unload models; required where the server restricts them."""
    triton_replicas: str = ""
    """``host:port,host:port`` (gRPC): the Tritons of one model repository; publications go to all of them."""
    triton_replicas_host: str = ""
    """The same as a DNS name that resolves to all of them (a headless service), who may come and go; the port is
    ``triton_grpc_port``."""
    triton_replica_seconds: Annotated[float, Field(gt=0)] = 300
    """How long one of several replicas may take to load, verify and warm up a version."""
    online_store: Literal["sqlite", "redis"] = "sqlite"
    """Where serving reads features: a file in the workspace, or ``redis_url``."""
    redis_url: Annotated[SecretStr, AfterValidator(redis_address)] = SecretStr("127.0.0.1:6379")
    """``host:port,db=0,password=…`` as Feast wants it; on a cluster it comes from a Secret."""
    online_timeout_seconds: Annotated[float, Field(gt=0)] = 0.25
    """How long a request waits for the online store before it is answered without it."""
    item_cache_seconds: Annotated[float, Field(ge=0)] = 30
    """How long the server answers from an item's features before it reads them again; 0 reads them every time."""
    ranking_instances: Annotated[int, Field(ge=0)] = 0
    """Processes of the model `ranking` per server; 0 is one per two cores."""
    request_log_share: Annotated[float, Field(ge=0, le=1)] = 0
    """Share of requests that the server keeps in `requests/` of the workspace, with what it answered and why."""
    features_engine: Literal["duckdb", "spark"] = "duckdb"
    """What turns the log into historical features; spark takes the session that is there, else a local one."""
    features_memory_gib: Annotated[float, Field(ge=0)] = 0
    """What DuckDB may hold in memory before it goes to disk; 0 leaves it at its own default, four fifths."""
    train_connect_seconds: Annotated[float, Field(gt=0)] = 600
    """How long processes that train together wait for one another to come, also for a node in place of a lost one."""
    train_exchange_seconds: Annotated[float, Field(gt=0)] = 1800
    """How long one of them may keep the others waiting in a step of training before they end."""
    runner: Literal["local", "cluster"] = "local"
    """Where the Kubeflow pipeline runs: in this process tree, or on a cluster through its API."""
    kfp_host: str = ""
    """URL of Kubeflow's ``ml-pipeline-ui``, or of the API itself, which has no logs of failed steps."""
    storage_url: Annotated[str, AfterValidator(store_url)] = ""
    """Object store for checkpoints and copies of models and data: ``s3://bucket/prefix`` or ``file:///directory``.

    Endpoint and credentials come from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from the role
    of the pod. Empty: nothing leaves the workspace.
    """
    keep_days: Annotated[int, Field(ge=0)] = 0
    """A daily run ends with `freshrank prune` of what is older than so many days and not needed; 0 = never."""
    dataset: Path | None = None
    """Data directory used by the DAG (which takes an ``s3://`` one too) and by feature_repo/ when none is named."""

    @property
    def triton_grpc_url(self) -> str:
        return f"{self.triton_host}:{self.triton_grpc_port}"


@cache
def settings() -> Settings:
    loaded = from_environment(Settings)
    return loaded.model_copy(update={"home": loaded.home.resolve()})


def from_environment(kind: type[S]) -> S:
    """``kind`` as the environment says; ConfigError names each variable that is wrong."""
    try:
        return kind()
    except SettingsError as error:
        raise ConfigError(_not_json(kind, error)) from None
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_problem(kind, str(each["loc"][0]), each["input"], each["msg"]) for each in error.errors())
        ) from None


def as_env_file(kind: type[BaseSettings]) -> Iterator[str]:
    """Lines of an env file: what each variable of ``kind`` means, then as it is set, or commented out with its default.

    Secrets are not shown. ConfigError names each variable that is wrong.
    """
    loaded, prefix = from_environment(kind), str(kind.model_config["env_prefix"])
    for name, field in kind.model_fields.items():
        yield from (f"# {line}" for line in dedent(field.description or "").splitlines() if line)
        is_set = name in loaded.model_fields_set
        yield f"{'' if is_set else '# '}{prefix}{name.upper()}={_shown(getattr(loaded, name), is_set)}"


def _shown(value: object, is_set: bool) -> str:
    if isinstance(value, SecretStr):
        return "a secret that is not shown" if is_set else value.get_secret_value()
    if isinstance(value, dict):
        return json.dumps(value)
    return "" if value is None else str(value)


def _not_json(kind: type[BaseSettings], error: SettingsError) -> str:
    named = re.search(r'field "(\w+)"', str(error))
    if named is None:
        return f"{kind.model_config['env_prefix']}*: {error}"
    received = os.environ.get(f"{kind.model_config['env_prefix']}{named[1].upper()}")
    return _problem(kind, named[1], received, 'expected JSON such as {"name": "value"}')


def unknown_variables(*kinds: type[BaseSettings]) -> list[str]:
    """FRESHRANK_ variables of the environment that no field of ``kinds`` reads, each with the nearest one that is."""
    known = {f"{kind.model_config['env_prefix']}{name.upper()}" for kind in kinds for name in kind.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith("FRESHRANK_") and name not in known)
    nearest = {name: get_close_matches(name, known, 1) for name in unknown}
    return [
        f"{name}: no setting reads it" + "".join(f"; did you mean {other}?" for other in nearest[name])
        for name in unknown
    ]


def _problem(kind: type[BaseSettings], name: str, received: object, expected: str) -> str:
    is_secret = name in kind.model_fields and kind.model_fields[name].annotation is SecretStr
    shown = "a secret" if is_secret else repr(received)
    if name in _NOT_REPEATED:
        shown = "a value that is not repeated here"
    return f"{kind.model_config['env_prefix']}{name.upper()}: received {shown}, {expected}"
