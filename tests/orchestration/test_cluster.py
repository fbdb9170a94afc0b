"""The cluster's pipeline differs from the local one only in where steps run; submitting twice starts one run."""

import json
import threading
from collections.abc import Iterator
from copy import deepcopy
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from components.tasks import IMAGE
from freshrank.errors import ConfigError, PipelineFailed
from freshrank.orchestration.cluster import ClusterSettings, compile_package, submit, wait
from freshrank.recipes import recipe
from freshrank.settings import settings

RUN_DATE = date(2024, 1, 7)
CLUSTER = {
    "FRESHRANK_CLUSTER_IMAGE": "registry.example/freshrank:2",
    "FRESHRANK_CLUSTER_GPUS": "1",
    "FRESHRANK_CLUSTER_NODE_SELECTOR": '{"pool": "gpu"}',
    "FRESHRANK_CLUSTER_MEMORY": "16Gi",
    "FRESHRANK_CLUSTER_HOME_CLAIM": "freshrank-home",
    "FRESHRANK_CLUSTER_SECRET_ENV": '{"FRESHRANK_REDIS_URL": "freshrank-redis:url"}',
    "FRESHRANK_REDIS_URL": "redis:6379,password=hunter2",
}


@pytest.fixture
def cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterSettings:
    for name, value in CLUSTER.items():
        monkeypatch.setenv(name, value)
    return ClusterSettings()


def compiled(path: Path, cluster: ClusterSettings | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's specification, and its Kubernetes part (empty where there is none)."""
    compile_package(path, cluster)
    spec, *platform = yaml.safe_load_all(path.read_text())
    executors = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
    return spec, executors


def without_placement(spec: dict[str, Any]) -> dict[str, Any]:
    """``spec`` less image, environment, resources and retries."""
    bare = deepcopy(spec)
    for executor in bare["deploymentSpec"]["executors"].values():
        for allowed in ("image", "env", "resources"):
            executor["container"].pop(allowed, None)
    dags = [bare["root"], *(component for component in bare["components"].values() if "dag" in component)]
    for dag in dags:
        for task in dag["dag"]["tasks"].values():
            task.pop("retryPolicy", None)
    return bare


def test_only_placement_differs_between_laptop_and_cluster(cluster: ClusterSettings, tmp_path: Path) -> None:
    """Same steps, same code, same graph, same gate."""
    local, local_platform = compiled(tmp_path / "local.yaml", None)
    remote, remote_platform = compiled(tmp_path / "cluster.yaml", cluster)
    assert without_placement(local) == without_placement(remote)
    assert local_platform == {}
    assert set(remote_platform) == set(remote["deploymentSpec"]["executors"])


def test_every_step_runs_in_the_configured_image(cluster: ClusterSettings, tmp_path: Path) -> None:
    """One image for all steps."""
    spec, _ = compiled(tmp_path / "cluster.yaml", cluster)
    images = {executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()}
    assert images == {"registry.example/freshrank:2"}


def test_only_training_asks_for_the_gpu_and_its_node(cluster: ClusterSettings, tmp_path: Path) -> None:
    """The other steps would hold an accelerator idle."""
    spec, platform = compiled(tmp_path / "cluster.yaml", cluster)
    executors = spec["deploymentSpec"]["executors"]
    resources = {name: executor["container"].get("resources") for name, executor in executors.items()}
    assert resources.pop("exec-train")["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert set(resources.values()) == {None}
    selectors = {name: part["nodeSelector"]["labels"] for name, part in platform.items() if "nodeSelector" in part}
    assert selectors == {"exec-train": {"pool": "gpu"}}


def test_secrets_travel_by_reference(cluster: ClusterSettings, tmp_path: Path) -> None:
    """Every step is told which key of which Secret to read; the value is nowhere in the package."""
    _, platform = compiled(tmp_path / "cluster.yaml", cluster)
    assert "hunter2" not in (tmp_path / "cluster.yaml").read_text()
    for part in platform.values():
        (secret,) = part["secretAsEnv"]
        assert secret["keyToEnv"] == [{"envVar": "FRESHRANK_REDIS_URL", "secretKey": "url"}]


@pytest.mark.parametrize(("claim", "mounts"), [("", 0), ("freshrank-home", 6)])
def test_a_volume_is_mounted_only_when_asked_for(
    cluster: ClusterSettings, tmp_path: Path, claim: str, mounts: int
) -> None:
    """Without a claim the steps exchange artifacts through the object store alone."""
    _, platform = compiled(tmp_path / "cluster.yaml", cluster.model_copy(update={"home_claim": claim}))
    paths = [mount["mountPath"] for part in platform.values() for mount in part.get("pvcMount", [])]
    assert paths == [str(settings().home)] * mounts


def test_a_deterministic_step_is_not_retried(cluster: ClusterSettings, tmp_path: Path) -> None:
    """Validation gives the same answer to the same data; the others may have lost their node."""
    spec, _ = compiled(tmp_path / "cluster.yaml", cluster)
    retried = {name for name, task in spec["root"]["dag"]["tasks"].items() if "retryPolicy" in task}
    assert retried == {"train", "calibrate", "evaluate"}


def test_without_an_image_a_dry_run_shows_the_components_own_and_a_submission_is_refused(
    home: Path, world: Path
) -> None:
    """The components' own image exists in no registry: good enough to read, not to run."""
    assert f"image: {IMAGE}" in str(submit(world, RUN_DATE, recipe(), dry_run=True))
    with pytest.raises(ConfigError, match="FRESHRANK_CLUSTER_IMAGE"):
        submit(world, RUN_DATE, recipe())


def test_a_secret_given_by_value_is_refused_without_repeating_it(cluster: ClusterSettings, tmp_path: Path) -> None:
    """Whoever put the secret itself there must not find it in a log."""
    wrong = cluster.model_copy(update={"secret_env": {"FRESHRANK_REDIS_URL": "hunter2"}})
    with pytest.raises(ConfigError, match="secret-name:key") as failure:
        compile_package(tmp_path / "pipeline.yaml", wrong)
    assert "hunter2" not in str(failure.value)


def test_a_dry_run_compiles_and_contacts_nothing(cluster: ClusterSettings, world: Path) -> None:
    """No host is configured here, so any contact would fail."""
    submission = submit(world, RUN_DATE, recipe(), dry_run=True)
    assert submission.run_id is None
    assert submission.arguments["run_date"] == "2024-01-07"
    assert "not submitted" in str(submission)


def test_the_name_of_a_run_is_its_idempotency_key(cluster: ClusterSettings, world: Path) -> None:
    """The same question has the same name; another config or date has another."""
    first, again = (submit(world, RUN_DATE, recipe(), dry_run=True).run_name for _ in range(2))
    other = submit(world, RUN_DATE, recipe("baseline"), dry_run=True).run_name
    earlier = submit(world, RUN_DATE - timedelta(days=1), recipe(), dry_run=True).run_name
    assert first == again
    assert len({first, other, earlier}) == 3


class PipelinesApi(ThreadingHTTPServer):
    """The few answers of the Kubeflow Pipelines API that submitting and waiting need, over real HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: PipelinesApi

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path.endswith("/runs"):
            self._answer({"runs": self._named(parse_qs(url.query)["filter"][0])})
        elif "/runs/" in url.path:
            self._answer(next(run for run in self.server.runs if run["run_id"] == url.path.split("/")[-1]))
        else:
            self._answer({"experiment_id": "e", "multi_user": False, "experiments": [{"experiment_id": "e"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/runs"):
            body |= {"run_id": f"run-{len(self.server.runs)}", "state": "PENDING"}
            self.server.runs.append(body)
        self._answer(body | {"experiment_id": "e"})

    def _named(self, text: str) -> list[dict[str, Any]]:
        (predicate,) = json.loads(text)["predicates"]
        return [run for run in self.server.runs if run["display_name"] == predicate["string_value"]]

    def _answer(self, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def api(cluster: ClusterSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipelinesApi]:
    with PipelinesApi() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("FRESHRANK_KFP_HOST", f"http://127.0.0.1:{server.server_port}")
        settings.cache_clear()
        yield server
        server.shutdown()


pytestmark = pytest.mark.filterwarnings("ignore:This client only works:FutureWarning")


def test_submitting_twice_starts_one_run(api: PipelinesApi, world: Path) -> None:
    """A retried Airflow task finds the run it started before it was killed."""
    first, second = (submit(world, RUN_DATE, recipe()) for _ in range(2))
    assert first.run_id == second.run_id == "run-0"
    assert len(api.runs) == 1


def test_a_failed_run_is_started_again(api: PipelinesApi, world: Path) -> None:
    """Only a run that can still succeed stands in the way of a new one."""
    submit(world, RUN_DATE, recipe())
    api.runs[0]["state"] = "FAILED"
    assert submit(world, RUN_DATE, recipe()).run_id == "run-1"


def test_waiting_ends_with_the_run(api: PipelinesApi, world: Path) -> None:
    """Success returns; failure names the step and where its log is."""
    run_id = submit(world, RUN_DATE, recipe()).run_id
    assert run_id is not None
    api.runs[0]["state"] = "SUCCEEDED"
    wait(run_id, timedelta(seconds=5))
    api.runs[0] |= {"state": "FAILED", "run_details": {"task_details": [{"display_name": "train", "state": "FAILED"}]}}
    with pytest.raises(PipelineFailed, match=r"step 'train' failed.*/runs/details/run-0"):
        wait(run_id, timedelta(seconds=5))


def test_waiting_has_an_end(api: PipelinesApi, world: Path) -> None:
    """A run that hangs fails the task that waits for it."""
    run_id = submit(world, RUN_DATE, recipe()).run_id
    assert run_id is not None
    with pytest.raises(PipelineFailed, match="still PENDING"):
        wait(run_id, timedelta(seconds=0), poll_seconds=0.01)


def test_submitting_without_a_host_says_what_to_set(cluster: ClusterSettings, world: Path) -> None:
    """kfp itself would look for a cluster around it."""
    with pytest.raises(ConfigError, match="FRESHRANK_KFP_HOST"):
        submit(world, RUN_DATE, recipe())
