"""What only a cluster needs to be told: the API's address and where steps run."""

import logging
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from freshrank.errors import ConfigError
from freshrank.settings import Settings, settings, store_endpoint

_PROJECTED_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")

log = logging.getLogger(__name__)


class ApiSettings(BaseSettings):
    """How the API at ``FRESHRANK_KFP_HOST`` is spoken to, from environment variables ``FRESHRANK_KFP_<FIELD>``."""

    model_config = SettingsConfigDict(
        env_prefix="FRESHRANK_KFP_", extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )

    ui_host: str = ""
    """URL of Kubeflow's pages as people's browsers reach it, for links; ``FRESHRANK_KFP_HOST`` when empty."""
    token: SecretStr = SecretStr("")
    """Bearer token, from a Secret. A token that expires belongs into a file: ``token_path``."""
    token_path: Path | None = None
    """File with the bearer token, read anew for every request. Default: the one that a pod with a projected
    service-account token for Kubeflow Pipelines has, where it exists."""
    ca_cert: Path | None = None
    """File (PEM) with the certificate of the authority that signed the host's. Default: the well-known ones."""
    request_seconds: Annotated[float, Field(gt=0)] = 30
    """How long one request may take, a third of it to connect."""
    retry_seconds: Annotated[float, Field(ge=0)] = 120
    """How long a request that fails for a passing reason is repeated."""
    settle_seconds: Annotated[float, Field(ge=0)] = 2
    """How long after a run was created it is looked whether somebody created the same one at the same moment."""

    def token_file(self) -> Path | None:
        """Where the token is read from, if from a file."""
        if self.token_path is None and not self.token.get_secret_value() and _PROJECTED_TOKEN.exists():
            return _PROJECTED_TOKEN
        return self.token_path


log = logging.getLogger(__name__)
_NOT_FOR_STEPS = {"runner", "kfp_host", "dataset"}


def _cores(text: str) -> str:
    if text and not re.fullmatch(r"\d+(\.\d+)?|\d+m", text):
        raise ValueError("expected cores as Kubernetes writes them: 2, 0.5 or 500m; empty for none")
    return text


def _bytes(text: str) -> str:
    if text and not re.fullmatch(r"\d+(\.\d+)?([EPTGM]i?|Ki?)?", text):
        raise ValueError("expected memory as Kubernetes writes it: 16Gi or 500M; empty for none")
    return text


Cpu = Annotated[str, AfterValidator(_cores)]
Memory = Annotated[str, AfterValidator(_bytes)]


class ClusterSettings(BaseSettings):
    """Where the steps run, from environment variables ``FRESHRANK_CLUSTER_<FIELD>``; mappings are JSON."""

    model_config = SettingsConfigDict(env_prefix="FRESHRANK_CLUSTER_", extra="forbid", use_attribute_docstrings=True)

    image: str = ""
    """The image with freshrank that the steps run in; a dry run without it shows the components' own name for it."""
    namespace: str = ""
    """Profile on a multi-user installation of Kubeflow, empty on a single-user one."""
    service_account: str = ""
    """Of the steps; Kubeflow's own when empty."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Accelerators of the training step; with ``train_nodes``, of each node."""
    gpu_resource: str = "nvidia.com/gpu"
    """What Kubernetes calls such an accelerator."""
    node_selector: dict[str, str] = {}
    """Labels a node must carry for the training step."""
    cpu: Cpu = ""
    """Cores of the training step, request and limit; with ``train_nodes``, of each node. Empty: none."""
    memory: Memory = ""
    """Memory of the training step, request and limit; with ``train_nodes``, of each node. Empty: none."""
    step_cpu_request: Cpu = "1"
    """Cores of every other step, and of the one that waits for nodes that train; empty for none."""
    step_cpu_limit: Cpu = "2"
    """What one of them may use of a node's cores; empty for no limit."""
    step_memory_request: Memory = "2Gi"
    """Memory of every other step; empty for none."""
    step_memory_limit: Memory = "8Gi"
    """What one of them may hold before it is ended; empty for no limit."""
    home_claim: str = ""
    """PersistentVolumeClaim mounted at the workspace (``FRESHRANK_HOME``); none when empty."""
    secret_env: dict[str, str] = {}
    """Environment variable -> ``secret:key`` for every step; the value itself never enters the pipeline."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often Kubeflow starts a failed step again, but for validation, which would say the same."""
    train_nodes: Annotated[int, Field(ge=0)] = 0
    """Nodes that train together in a TrainJob of Kubeflow Trainer; 0 trains in the step's own pod, in one process."""
    train_runtime: str = "torch-distributed"
    """The ClusterTrainingRuntime of that TrainJob."""
    train_hours: Annotated[float, Field(gt=0)] = 12
    """After which Kubernetes ends it."""


ALL_SETTINGS: tuple[type[BaseSettings], ...] = (Settings, ApiSettings, ClusterSettings)
"""Whatever reads ``FRESHRANK_`` variables."""


def secret_reference(variable: str, reference: str) -> tuple[str, str]:
    """Secret and key of ``secret:key``; ConfigError where it is anything else."""
    name, separator, key = reference.partition(":")
    if not (name and separator and key):
        # What stands there may be the secret itself, so it is not repeated.
        raise ConfigError(f"FRESHRANK_CLUSTER_SECRET_ENV: {variable} is not of the form secret-name:key")
    return name, key


def step_environment() -> dict[str, str]:
    """What steps read of settings and store, but for secrets."""
    values = settings().model_dump(exclude=_NOT_FOR_STEPS)
    plain = {name: str(value) for name, value in values.items() if not isinstance(value, SecretStr) and value != ""}
    return _of_the_store() | {f"FRESHRANK_{name.upper()}": value for name, value in plain.items()}


def _of_the_store() -> dict[str, str]:
    """What an object store's client reads beside credentials, which travel as ``secret_env``."""
    if not settings().storage_url:
        return {}
    values = {"AWS_ENDPOINT_URL": store_endpoint(), "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION")}
    return {name: value for name, value in values.items() if value}
