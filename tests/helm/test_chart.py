"""What the chart promises, asked of the objects that the real helm renders. No cluster is needed, none is claimed."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import kubernetes_validate
import pytest
import yaml

from freshrank.cli.pipeline import _server
from freshrank.errors import FreshrankError
from freshrank.features.store import write_feast_yaml
from freshrank.orchestration.kubeflow.placement import PUBLISHER_LABEL
from freshrank.orchestration.kubeflow.settings import ApiSettings, ClusterSettings
from freshrank.serving import control_token
from freshrank.serving.repository import ModelRepository
from freshrank.settings import Settings, settings
from freshrank.storage.workspace import Workspace
from tests.helm.charts import (
    CHART,
    Object,
    component_of,
    container_of,
    containers,
    helm,
    init_container_of,
    is_ready,
    named,
    of_kind,
    pod_of,
    pods,
    refusal,
    rendered,
    rendered_at,
    values_of,
)
from tests.tiny_log import log_schema

pytestmark = pytest.mark.integration

SCENARIOS = ["default", "kind", "gpu", "production"]
COMPONENTS = ["triton", "feast", "redis"]
KUBERNETES = ["1.29", kubernetes_validate.latest_version()]
GPU = "nvidia.com/gpu"
PUBLISHER = dict([PUBLISHER_LABEL])
AUTOSCALED = ("triton.autoscaling.enabled=true", "triton.autoscaling.targetQueueMilliseconds=10")
CUSTOM = {"ServiceMonitor", "PrometheusRule"}
"""Kinds of an operator that Kubernetes' own schemas do not know; test_monitoring.py checks them."""

in_every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is not a mapping with entries."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def rules(objects: list[Object], component: str) -> list[Object]:
    return list(named(objects, "NetworkPolicy", f"freshrank-{component}")["spec"]["ingress"])


def ports_open_to(objects: list[Object], component: str, peer: Object) -> set[int]:
    open_rules = [rule for rule in rules(objects, component) if peer in rule["from"]]
    return {port["port"] for rule in open_rules for port in rule["ports"]}


def default_values() -> Object:
    return dict(yaml.safe_load((CHART / "values.yaml").read_text()))


# --- the chart as a whole


@in_every_scenario
def test_helm_finds_nothing_to_complain_about(scenario: str) -> None:
    """`helm lint --strict` passes with the values of the scenario."""
    run = helm("lint", "--strict", str(CHART), *values_of(scenario))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("version", KUBERNETES)
@in_every_scenario
def test_every_object_is_what_kubernetes_accepts(scenario: str, version: str) -> None:
    """Each object fits the strict schema of the oldest supported and the newest known Kubernetes."""
    for item in (each for each in rendered(scenario) if each["kind"] not in CUSTOM):
        kubernetes_validate.validate(item, version, strict=True)


def test_every_values_file_in_ci_is_a_tested_scenario() -> None:
    """A new scenario cannot be added without being rendered here."""
    assert {path.name.removesuffix("-values.yaml") for path in CHART.glob("ci/*")} == set(SCENARIOS[1:])


def test_the_scenarios_install_triton_feast_and_redis() -> None:
    """The default release runs all three."""
    assert {component_of(pod) for pod in pods(rendered("default"))} == set(COMPONENTS)


def test_two_releases_share_a_namespace() -> None:
    """No object of one release has the name of an object of another."""
    run = helm("template", "second", str(CHART))
    second = [item for item in yaml.safe_load_all(run.stdout) if item]
    first_names = {(item["kind"], item["metadata"]["name"]) for item in rendered("default")}
    assert not first_names & {(item["kind"], item["metadata"]["name"]) for item in second}


@in_every_scenario
def test_what_trains_and_publishes_is_not_scheduled_by_the_chart(scenario: str) -> None:
    """That belongs to dags/: a CronJob is a mould, suspended unless a value schedules the import or the copy."""
    jobs = of_kind(rendered(scenario), "CronJob")
    scheduled = {job["metadata"]["name"] for job in jobs if not job["spec"]["suspend"]}
    assert scheduled == ({"freshrank-backup", "freshrank-import"} if scenario == "production" else set())
    unscheduled = rendered(scenario, 'storage.backupSchedule=""', 'import.schedule=""')
    assert all(job["spec"]["suspend"] is True for job in of_kind(unscheduled, "CronJob"))


@pytest.mark.parametrize("mould, schedule", [("backup", "30 2 * * *"), ("import", "30 0 * * *")])
def test_a_schedule_is_in_utc_and_one_job_at_a_time(mould: str, schedule: str) -> None:
    """As the days of the log are; two imports into one dataset would race."""
    spec = named(rendered("production"), "CronJob", f"freshrank-{mould}")["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["suspend"]) == (schedule, "Etc/UTC", False)
    assert spec["concurrencyPolicy"] == "Forbid"


@pytest.mark.parametrize(
    "overrides, source",
    [
        (['import.existingClaim="export"'], "/mnt/import"),
        (['import.existingClaim="export"', 'import.source="shop/log"'], "/mnt/import/shop/log"),
        (['import.source="incoming/shop"'], "/var/lib/freshrank/incoming/shop"),
    ],
)
def test_days_are_imported_from_a_claim_or_from_the_workspace(overrides: list[str], source: str) -> None:
    """Beside the days that are there; another's claim is read and never written, and its files keep their owner."""
    objects = rendered("default", 'home.dataset="data/shop"', *overrides)
    spec = pod_of(objects, "import")["spec"]
    (container,) = spec["containers"]
    assert container["command"][3:] == [source, "--out", "$(FRESHRANK_DATASET)", "--add"]
    claims = {volume["name"]: volume.get("persistentVolumeClaim") for volume in spec["volumes"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    if source.startswith("/mnt"):
        assert claims["import"] == {"claimName": "export", "readOnly": True}
        assert (mounts["import"]["mountPath"], mounts["import"]["readOnly"]) == ("/mnt/import", True)
    else:
        assert not {"import"} & (claims.keys() | mounts.keys())


def test_without_a_source_nothing_imports() -> None:
    """There is no mould that would have nothing to read."""
    names = [job["metadata"]["name"] for job in of_kind(rendered("default", 'home.dataset="data/shop"'), "CronJob")]
    assert names == ["freshrank-daily", "freshrank-materialize"]


def test_a_first_run_needs_no_airflow() -> None:
    """The mould `daily` may publish as a step of the pipeline may: by label, token and store."""
    pod = pod_of(rendered("production"), "daily")
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["freshrank", "run", "--data", "$(FRESHRANK_DATASET)"]
    assert pod["metadata"]["labels"].items() >= PUBLISHER.items()
    steps = json.loads(
        named(rendered("production"), "ConfigMap", "freshrank-pipeline")["data"]["FRESHRANK_CLUSTER_SECRET_ENV"]
    )
    references = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e}
    assert {name: f"{each['name']}:{each['key']}" for name, each in references.items()} == steps


def test_a_run_inside_the_cluster_starts_no_server_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image of the jobs has none; with the settings of the release nothing of this machine is even looked at."""
    with pytest.raises(FreshrankError), _server(Path("/no/dataset")):
        pass
    in_environment(monkeypatch, "settings")
    settings.cache_clear()
    with _server(Path("/no/dataset")):
        pass
    settings.cache_clear()


def test_only_jobs_that_use_the_bucket_have_an_identity_for_it() -> None:
    """Annotations of a workload identity are on an account of theirs; servers run under one without."""
    annotation = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/ranking"}
    objects = rendered("production", f"serviceAccount.annotations={json.dumps(annotation)}")
    given = {a["metadata"]["name"]: a["metadata"].get("annotations") for a in of_kind(objects, "ServiceAccount")}
    assert given == {"freshrank": None, "freshrank-jobs": annotation}
    users = {component_of(pod) for pod in pods(objects) if pod["spec"]["serviceAccountName"] == "freshrank-jobs"}
    assert users == {"backup", "restore", "daily"}


def test_an_account_of_yours_is_used_and_not_made() -> None:
    """Where accounts are given out by somebody else."""
    objects = rendered("production", 'serviceAccount.name="team"')
    assert [account["metadata"]["name"] for account in of_kind(objects, "ServiceAccount")] == ["freshrank"]
    assert pod_of(objects, "backup")["spec"]["serviceAccountName"] == "team"


def test_settings_given_to_pods_are_settings_that_freshrank_reads() -> None:
    """Every FRESHRANK_ variable is a field that something reads, so none is silently ignored."""
    known = {f"FRESHRANK_{name.upper()}" for name in Settings.model_fields}
    known |= {f"FRESHRANK_CLUSTER_{name.upper()}" for name in ClusterSettings.model_fields}
    known |= {f"FRESHRANK_KFP_{name.upper()}" for name in ApiSettings.model_fields}
    objects = rendered("production", 'home.dataset="datasets/shop"') + rendered("default")
    given = {key for item in of_kind(objects, "ConfigMap") for key in item["data"]}
    given |= {entry["name"] for container in containers(objects) for entry in container.get("env", [])}
    assert {name for name in given if name.startswith("FRESHRANK_")} <= known


NOT_BY_VALUES = {
    "triton_replicas": "the chart names its replicas by a host name; a list is for machines without one",
    "triton_control_token": "a secret: Airflow's values and the pipeline refer to the Secret",
    "redis_url": "a secret: every pod refers to the Secret",
    "features_engine": "no image of ours has what Spark needs: whoever builds one sets it there",
    "kfp_token": "a secret, of which Airflow's pods have a file instead",
    "kfp_request_seconds": "patience with an API, for who has a reason to set it on Airflow's pods",
    "kfp_retry_seconds": "as kfp_request_seconds",
    "kfp_settle_seconds": "as kfp_request_seconds",
}
"""Settings that no ConfigMap of the chart sets, each with the reason."""


def test_every_setting_can_be_set_by_values() -> None:
    """A setting that is new must get a value of the chart, or a reason here."""
    objects = rendered("production", 'kubeflow.tokenPath="/var/run/token"', 'kubeflow.caCert="/etc/team.pem"')
    given = {key.removeprefix("FRESHRANK_").lower() for item in of_kind(objects, "ConfigMap") for key in item["data"]}
    fields = set(Settings.model_fields) | {f"cluster_{name}" for name in ClusterSettings.model_fields}
    fields |= {f"kfp_{name}" for name in ApiSettings.model_fields}
    assert fields - given == NOT_BY_VALUES.keys()


@pytest.mark.parametrize(
    "override, variable, expected",
    [
        ("triton.ranking.itemCacheSeconds=5", "FRESHRANK_ITEM_CACHE_SECONDS", "5"),
        ("triton.ranking.onlineTimeoutSeconds=0.1", "FRESHRANK_ONLINE_TIMEOUT_SECONDS", "0.1"),
        ("triton.ranking.requestLogShare=0.02", "FRESHRANK_REQUEST_LOG_SHARE", "0.02"),
        ("triton.ranking.instances=7", "FRESHRANK_RANKING_INSTANCES", "7"),
        ("triton.replicaSeconds=60", "FRESHRANK_TRITON_REPLICA_SECONDS", "60"),
        ('storage.url="s3://bucket/prefix"', "FRESHRANK_STORAGE_URL", "s3://bucket/prefix"),
        ('storage.endpoint="https://objects.example.com"', "AWS_ENDPOINT_URL", "https://objects.example.com"),
        ("home.keepDays=45", "FRESHRANK_KEEP_DAYS", "45"),
        ("features.memoryGiB=1.5", "FRESHRANK_FEATURES_MEMORY_GIB", "1.5"),
        ("kubeflow.retries=0", "FRESHRANK_CLUSTER_RETRIES", "0"),
        ('kubeflow.steps.resources.limits.memory="32Gi"', "FRESHRANK_CLUSTER_STEP_MEMORY_LIMIT", "32Gi"),
        ("kubeflow.training.connectSeconds=60", "FRESHRANK_TRAIN_CONNECT_SECONDS", "60"),
        ('kubeflow.caCert="/etc/ssl/team.pem"', "FRESHRANK_KFP_CA_CERT", "/etc/ssl/team.pem"),
    ],
)
def test_a_value_becomes_its_setting(override: str, variable: str, expected: str) -> None:
    """What is set arrives as it was written."""
    maps = of_kind(rendered("default", override), "ConfigMap")
    assert [item["data"][variable] for item in maps if variable in item["data"]] == [expected]


@pytest.mark.parametrize("limit, instances", [("500m", "1"), ("4", "2"), ("7500m", "3"), ("16", "8")])
def test_processes_that_rank_are_counted_from_the_limit_of_the_pod(limit: str, instances: str) -> None:
    """Inside a pod Python sees the cores of the node; one process per two cores means those the pod may use."""
    cores = [f'triton.resources.{amount}.cpu="{limit}"' for amount in ("requests", "limits")]
    data = named(rendered("default", *cores), "ConfigMap", "freshrank-settings")
    assert data["data"]["FRESHRANK_RANKING_INSTANCES"] == instances


def in_environment(monkeypatch: pytest.MonkeyPatch, *config_maps: str) -> None:
    """What a pod with `envFrom` of these ConfigMaps of the production scenario has."""
    for name in config_maps:
        for key, value in named(rendered("production"), "ConfigMap", f"freshrank-{name}")["data"].items():
            monkeypatch.setenv(key, value)


def test_settings_in_the_config_maps_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings accepts the very strings that the pods get."""
    in_environment(monkeypatch, "settings", "pipeline")
    loaded = Settings()
    assert (loaded.online_store, loaded.runner, loaded.kfp_host, str(loaded.home)) == (
        "redis",
        "cluster",
        "http://ml-pipeline-ui.kubeflow.svc.cluster.local",
        "/var/lib/freshrank",
    )


def test_a_pipeline_started_with_the_config_map_runs_where_the_chart_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pods get image, claim, GPU and both secrets; the secrets by reference."""
    in_environment(monkeypatch, "pipeline")
    assert ClusterSettings().model_dump(exclude_unset=True) == {
        "image": "registry.example.com/team/freshrank:0.1.0",
        "namespace": "ranking-team",
        "service_account": "default-editor",
        "gpus": 1,
        "node_selector": {"nvidia.com/gpu.present": "true"},
        "cpu": "8",
        "memory": "64Gi",
        "home_claim": "freshrank-home",
        "secret_env": {
            "FRESHRANK_REDIS_URL": "freshrank-redis-managed:url",
            "FRESHRANK_TRITON_CONTROL_TOKEN": "freshrank-triton-control:token",
            "AWS_ACCESS_KEY_ID": "freshrank-bucket:accessKey",
            "AWS_SECRET_ACCESS_KEY": "freshrank-bucket:secretKey",
        },
        "gpu_resource": "nvidia.com/gpu",
        "retries": 2,
        "train_nodes": 0,
        "train_runtime": "torch-distributed",
        "train_hours": 12,
        "step_cpu_request": "1",
        "step_cpu_limit": "2",
        "step_memory_request": "2Gi",
        "step_memory_limit": "8Gi",
    }


@in_every_scenario
def test_kubernetes_injects_no_variables_of_its_own(scenario: str) -> None:
    """A Service named freshrank-triton would otherwise become FRESHRANK_TRITON_PORT=tcp://…"""
    assert all(pod["spec"]["enableServiceLinks"] is False for pod in pods(rendered(scenario)))


def test_a_changed_setting_restarts_the_pods_that_read_it() -> None:
    """The pod template carries a checksum of the settings."""
    changed = rendered("default", 'home.dataset="datasets/shop"')
    for component in ("triton", "feast"):
        before = pod_of(rendered("default"), component)["metadata"]["annotations"]
        assert pod_of(changed, component)["metadata"]["annotations"] != before


@pytest.mark.parametrize(
    "override", ["kubeflow.training.gpus=2", 'storage.url="s3://other"', 'storage.endpoint="https://objects.other"']
)
def test_where_training_runs_and_copies_lie_does_not_restart_what_serves(override: str) -> None:
    """The settings of the pipeline and of the bucket are not in the pods that serve."""
    changed = rendered("gpu", override)
    for component in COMPONENTS:
        assert pod_of(changed, component) == pod_of(rendered("default"), component)


# --- values


def test_an_unknown_key_is_refused() -> None:
    """A misspelt key is an error, at the top and in the depth."""
    assert "additional properties 'replicaz'" in refusal("triton.replicaz=3")
    assert "additional properties 'tritn'" in refusal("tritn={}")


@pytest.mark.parametrize(
    "override",
    [
        'triton.replicas="3"',
        "triton.gpus=0.5",
        "triton.gpus=-1",
        'networkPolicy.enabled="yes"',
        'networkPolicy.clientNamespaces="shop"',
        'redis.mode="memory"',
        'home.path="relative/path"',
        'home.dataset="with a space"',
        'home.project="My-Log"',
        'home.project=""',
        "home.project=null",
        "kubeflow.training.gpus=-1",
        'home.size="fifty gigabytes"',
        'kubeflow.host="http://name:password@pipelines"',
        "triton.resources.limits.memory=null",
        'triton.resources.limits={"cpu":"1","memory":"1Gi","nvidia.com/gpu":"1"}',
        'redis.existingSecret=""',
        'triton.control.existingSecret=""',
        'storage.url="s3://key:secret@bucket"',
        'storage.url="https://bucket"',
        'storage.backupSchedule="every night"',
        'import.schedule="0 25"',
        "triton.ranking.requestLogShare=1.5",
        "triton.ranking.onlineTimeoutSeconds=0",
        'triton.autoscaling.targetQueueMilliseconds="5"',
        'monitoring.serviceMonitor.interval="often"',
        "monitoring.alerts.degradedShare=2",
        "feast=null",
    ],
)
def test_a_value_of_the_wrong_form_is_refused(override: str) -> None:
    """The schema stops it before the cluster sees it, and names the place."""
    place = override.split("=")[0].split(".")[0]
    assert place in refusal(override)


@pytest.mark.parametrize("tag", ["latest", "latest-gpu", ""])
@pytest.mark.parametrize("image", ["freshrank", "triton", "redis"])
def test_a_moving_or_missing_tag_is_refused(image: str, tag: str) -> None:
    """Images are pinned, and whoever did not pin one is told why."""
    message = refusal(f'images.{image}.tag="{tag}"')
    assert (
        f"images.{image}.tag: received {tag}, expected a tag that stays" if tag else f"/images/{image}/tag"
    ) in message


def schemas_below(schema: Object) -> Iterator[Object]:
    """The schema itself and every one inside it."""
    yield schema
    inner = [part for key in ("properties", "definitions") for part in schema.get(key, {}).values()]
    for part in inner + ([schema["items"]] if "items" in schema else []):
        yield from schemas_below(part)


def test_the_schema_is_closed_everywhere() -> None:
    """No object accepts a key it does not know; labels and annotations are free, but text.

    `global` is Helm's, and what is inside the three kinds of affinity Kubernetes'.
    """
    whole = json.loads((CHART / "values.schema.json").read_text())
    assert whole["definitions"]["affinity"].pop("properties").keys() == {
        "nodeAffinity",
        "podAffinity",
        "podAntiAffinity",
    }
    assert "additionalProperties" not in whole["properties"].pop("global")
    objects = [schema for schema in schemas_below(whole) if schema.get("type") == "object"]
    assert objects
    assert all(schema["additionalProperties"] in (False, {"type": "string"}) for schema in objects)


def test_every_value_is_described_in_the_readme() -> None:
    """The table of helm/README.md names exactly the values there are."""
    described = set(re.findall(r"^\| `([\w.]+)` \|", (CHART / "README.md").read_text(), re.MULTILINE))
    grouped = {
        path.split(".resources.")[0] + ".resources" if ".resources." in path else path
        for path, _ in leaves(default_values())
    }
    assert described == grouped


# --- secrets


@in_every_scenario
def test_no_secret_is_made_by_the_chart(scenario: str) -> None:
    """Secrets exist before the release does; the chart holds their names only."""
    assert not of_kind(rendered(scenario), "Secret")


@in_every_scenario
def test_no_value_is_a_secret(scenario: str) -> None:
    """Keys that speak of secrets name a Secret, a key in one, or a file."""
    file = CHART / ("values.yaml" if scenario == "default" else f"ci/{scenario}-values.yaml")
    paths = [path for path, _ in leaves(yaml.safe_load(file.read_text()))]
    suspicious = [path for path in paths if re.search(r"password|token|secret|credential", path, re.IGNORECASE)]
    assert all(re.search(r"(existingSecret|pullSecrets|Key|Path)$", path) for path in suspicious)


@in_every_scenario
def test_secret_variables_come_by_reference(scenario: str) -> None:
    """A variable that carries a secret is read from a Secret."""
    for container in containers(rendered(scenario)):
        for entry in container.get("env", []):
            if re.search(r"PASSWORD|TOKEN|AUTH|REDIS_URL|ACCESS_KEY", entry["name"]):
                assert "secretKeyRef" in entry["valueFrom"]


@pytest.mark.parametrize("mode", ["internal", "external"])
def test_the_address_of_the_store_is_one_key_for_everyone(mode: str) -> None:
    """Pods of the chart and of the pipeline read the same key of the same Secret, wherever Redis is."""
    objects = rendered("default", f'redis.mode="{mode}"')
    secrets = json.loads(named(objects, "ConfigMap", "freshrank-pipeline")["data"]["FRESHRANK_CLUSTER_SECRET_ENV"])
    assert secrets["FRESHRANK_REDIS_URL"] == "freshrank-redis:url"
    for component in ("triton", "feast"):
        (url,) = [e for e in container_of(objects, component)["env"] if e["name"] == "FRESHRANK_REDIS_URL"]
        assert url["valueFrom"]["secretKeyRef"] == {"name": "freshrank-redis", "key": "url"}


# --- security of pods


@in_every_scenario
def test_no_pod_runs_as_root_or_talks_to_the_cluster(scenario: str) -> None:
    """User, seccomp profile and service account of every pod."""
    for pod in pods(rendered(scenario)):
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["serviceAccountName"] != "default"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()


@in_every_scenario
def test_no_container_can_gain_rights_or_write_its_image(scenario: str) -> None:
    """Capabilities, escalation and root file system of every container."""
    for container in containers(rendered(scenario)):
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["privileged"] is False


@in_every_scenario
def test_what_a_pod_can_write_is_bounded(scenario: str) -> None:
    """Volumes are claims or emptyDirs with a size limit; nothing of the host."""
    for pod in pods(rendered(scenario)):
        for volume in pod["spec"].get("volumes", []):
            assert "persistentVolumeClaim" in volume or volume["emptyDir"]["sizeLimit"]


@pytest.mark.parametrize("component", ["triton", "feast"])
def test_a_server_cannot_change_what_it_serves(component: str) -> None:
    """Both servers mount the workspace read-only, but for the folder of requests, which nothing is served from."""
    mounts = [m for m in container_of(rendered("default"), component)["volumeMounts"] if m["name"] == "home"]
    assert "/var/lib/freshrank" in [m["mountPath"] for m in mounts if m.get("readOnly")]
    writable = [m["mountPath"] for m in mounts if not m.get("readOnly")]
    assert writable == (["/var/lib/freshrank/requests/my_log"] if component == "triton" else [])


@in_every_scenario
def test_every_image_is_pinned(scenario: str) -> None:
    """Each image has a tag, and it is not latest."""
    for container in containers(rendered(scenario)):
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        assert tag
        assert "latest" not in tag


def test_an_image_can_be_pinned_to_its_content() -> None:
    """A digest is appended to the tag."""
    digest = "sha256:" + "0" * 64
    objects = rendered("default", f'images.triton.digest="{digest}"')
    assert container_of(objects, "triton")["image"].endswith(f"@{digest}")


@in_every_scenario
def test_every_container_says_what_it_needs_and_may_take(scenario: str) -> None:
    """CPU and memory have a request and a limit."""
    for container in containers(rendered(scenario)):
        for amounts in (container["resources"]["requests"], container["resources"]["limits"]):
            assert {"cpu", "memory"} <= amounts.keys()


# --- serving


@pytest.mark.parametrize("scenario, gpus", [("default", "0"), ("kind", "0"), ("gpu", "1"), ("production", "1")])
def test_a_gpu_is_asked_for_where_it_is_used(scenario: str, gpus: str) -> None:
    """The training step takes the GPU; the ranker is served on CPUs."""
    assert named(rendered(scenario), "ConfigMap", "freshrank-pipeline")["data"]["FRESHRANK_CLUSTER_GPUS"] == gpus
    assert not [container for container in containers(rendered(scenario)) if GPU in container["resources"]["limits"]]


def test_a_gpu_for_triton_is_of_its_server_alone() -> None:
    """triton.gpus is a limit of Triton's container and of no other."""
    taken = [c["name"] for c in containers(rendered("default", "triton.gpus=1")) if GPU in c["resources"]["limits"]]
    assert taken == ["triton"]


@contextmanager
def triton_with(loaded: set[str]) -> Iterator[int]:
    """A port that answers as Triton's model readiness endpoint does when `loaded` is loaded."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            model = self.path.removeprefix("/v2/models/").removesuffix("/ready")
            self.send_response(200 if model in loaded else 400)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def point_to(home: Path, version: int) -> Path:
    repository = ModelRepository(Workspace(home, "my_log").triton)
    repository.root.mkdir(parents=True)
    repository.pointer_path.write_text(json.dumps({"version": version}))
    return repository.pointer_path


@pytest.mark.parametrize(
    "loaded, ready",
    [
        ({"ranker/versions/2", "ranking"}, True),
        ({"ranker/versions/1", "ranking"}, False),
        ({"ranking"}, False),
        ({"ranker/versions/2"}, False),
        (set[str](), False),
    ],
)
def test_a_replica_is_ready_when_it_can_rank(loaded: set[str], ready: bool, tmp_path: Path) -> None:
    """The version that the pointer names must be loaded, not just any: another would be asked in vain."""
    point_to(tmp_path, version=2)
    with triton_with(loaded) as port:
        assert is_ready(tmp_path, port) == ready


def test_before_the_first_publication_no_replica_is_ready(tmp_path: Path) -> None:
    """Without a pointer there is nothing to rank with, whatever is loaded."""
    with triton_with({"ranker/versions/1", "ranking"}) as port:
        assert not is_ready(tmp_path, port)


@pytest.mark.parametrize("damage", ["", "{", '{"version": null}', "[]"], ids=["gone", "torn", "no version", "a list"])
def test_a_workspace_that_is_lost_leaves_a_replica_ready_while_its_version_is_loaded(
    damage: str, tmp_path: Path
) -> None:
    """The probe stands by the last version it saw; a pointer that is back counts at once."""
    home = tmp_path / "home"
    pointer = point_to(home, version=2)
    with triton_with({"ranker/versions/2", "ranking"}) as port:
        assert is_ready(home, port)
        pointer.write_text(damage) if damage else home.rename(tmp_path / "away")
        assert is_ready(home, port)
        with triton_with({"ranker/versions/1", "ranking"}) as other:
            assert not is_ready(home, other)
        if damage:
            pointer.write_text('{"version": 3}')
            assert not is_ready(home, port)


def test_a_replica_without_a_server_is_not_ready(tmp_path: Path) -> None:
    """A refused connection is a failed probe, not a passed one."""
    point_to(tmp_path, version=1)
    assert not is_ready(tmp_path, port=1)


def test_triton_serves_the_repository_that_publishing_writes() -> None:
    """The path of the chart is the path of Workspace and ModelRepository."""
    models = ModelRepository(Workspace(Path("/var/lib/freshrank"), "shop").triton).models
    assert f"--model-repository={models}" in container_of(rendered("default", 'home.project="shop"'), "triton")["args"]


@in_every_scenario
def test_long_running_containers_have_three_probes(scenario: str) -> None:
    """Slow start, temporary trouble and a hang are told apart."""
    for pod in (each for each in pods(rendered(scenario)) if each["spec"].get("restartPolicy") != "Never"):
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= pod["spec"]["containers"][0].keys()


def test_loading_may_take_as_long_as_the_values_say() -> None:
    """startupSeconds is the time before a starting server is killed."""
    probe = container_of(rendered("default", "triton.startupSeconds=900"), "triton")["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 900


@in_every_scenario
def test_an_update_never_lowers_the_number_of_ready_replicas(scenario: str) -> None:
    """Deployments add a replica before they take one away, and Triton's counts once it stays ready."""
    deployments = of_kind(rendered(scenario), "Deployment")
    assert len(deployments) == 2
    for deployment in deployments:
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert named(deployments, "Deployment", "freshrank-triton")["spec"]["minReadySeconds"] > 0


def test_an_update_may_take_as_long_as_loading_does() -> None:
    """Kubernetes reports an update as failed later than it would restart a slow replica."""
    spec = named(rendered("default", "triton.startupSeconds=3600"), "Deployment", "freshrank-triton")["spec"]
    assert spec["progressDeadlineSeconds"] > 3600 + spec["minReadySeconds"]


@pytest.mark.parametrize("component", ["triton", "feast"])
def test_a_drain_takes_one_replica_at_a_time(component: str) -> None:
    """A PodDisruptionBudget covers exactly the pods of the Deployment."""
    objects = rendered("production")
    budget = named(objects, "PodDisruptionBudget", f"freshrank-{component}")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == named(objects, "Deployment", f"freshrank-{component}")["spec"]["selector"]


def test_the_autoscaler_owns_the_number_of_replicas() -> None:
    """With autoscaling the Deployment names no number, so an upgrade does not undo a scale-up."""
    objects = rendered("default", *AUTOSCALED)
    assert "replicas" not in named(objects, "Deployment", "freshrank-triton")["spec"]
    scaler = named(objects, "HorizontalPodAutoscaler", "freshrank-triton")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 6)
    assert not of_kind(rendered("default"), "HorizontalPodAutoscaler")


def test_replicas_follow_the_queue_and_cpu_stands_in() -> None:
    """The larger of both answers counts; without a target for the queue there is CPU alone."""
    metrics = named(rendered("default", *AUTOSCALED), "HorizontalPodAutoscaler", "freshrank-triton")["spec"]["metrics"]
    assert [metric["type"] for metric in metrics] == ["Pods", "Resource"]
    assert metrics[0]["pods"]["target"] == {"type": "AverageValue", "averageValue": "10"}
    (only,) = named(rendered("default", AUTOSCALED[0]), "HorizontalPodAutoscaler", "freshrank-triton")["spec"][
        "metrics"
    ]
    assert only["type"] == "Resource"


def test_a_publication_reaches_every_replica() -> None:
    """The publisher asks a name that resolves to all replicas, at the port on which they listen."""
    data = named(rendered("production"), "ConfigMap", "freshrank-settings")["data"]
    service, namespace, _ = data["FRESHRANK_TRITON_REPLICAS_HOST"].split(".")
    control_token = named(rendered("production"), "Service", service)
    assert (control_token["spec"]["clusterIP"], control_token["metadata"]["namespace"]) == ("None", namespace)
    assert int(data["FRESHRANK_TRITON_GRPC_PORT"]) in [port["port"] for port in control_token["spec"]["ports"]]


def test_a_server_writes_requests_and_nothing_else_of_the_workspace() -> None:
    """Those for warm-up, and the request log: one folder, which the init container makes."""
    written = [m for m in triton_mounts() if not m.get("readOnly")]
    assert {m["mountPath"] for m in written} == {"/tmp", "/dev/shm", "/var/lib/freshrank/requests/my_log"}
    assert Workspace(Path("/var/lib/freshrank"), "my_log").requests == Path("/var/lib/freshrank/requests/my_log")
    (log,) = [m for m in written if "subPath" in m]
    assert log["subPath"] == "requests/my_log"


def triton_mounts(*overrides: str) -> list[Object]:
    return list(container_of(rendered("default", *overrides), "triton")["volumeMounts"])


# --- who reaches what


@in_every_scenario
def test_loading_a_model_needs_the_token_on_both_protocols(scenario: str) -> None:
    """Control and inference share Triton's ports, so its control API is restricted to a secret header, as locally."""
    arguments = container_of(rendered(scenario), "triton")["args"]
    for flag in ("--http-restricted-api=", "--grpc-restricted-protocol="):
        (value,) = [argument.removeprefix(flag) for argument in arguments if argument.startswith(flag)]
        interfaces, _, key = value.partition(":")
        assert tuple(interfaces.split(",")) == control_token.RESTRICTED
        assert key == f"{control_token.HEADER}=$(TRITON_CONTROL_TOKEN)"


@pytest.mark.parametrize("protocol, inference, other", [("grpc", 8001, 8000), ("http", 8000, 8001)])
def test_only_the_inference_port_is_open_to_the_namespace(protocol: str, inference: int, other: int) -> None:
    """Any pod of the namespace may rank; the other ports are the publisher's."""
    objects = rendered("default", f'triton.inferenceProtocol="{protocol}"')
    assert ports_open_to(objects, "triton", {"podSelector": {}}) == {inference}
    assert other in ports_open_to(objects, "triton", {"podSelector": {"matchLabels": PUBLISHER}})
    (port,) = named(objects, "Service", "freshrank-triton")["spec"]["ports"]
    assert (port["name"], port["port"]) == (protocol, inference)


def test_a_publisher_reaches_every_replica_even_before_it_is_ready() -> None:
    """The control Service is headless and lists replicas that have no model yet."""
    control_token = named(rendered("default"), "Service", "freshrank-triton-control")["spec"]
    assert control_token["clusterIP"] == "None"
    assert control_token["publishNotReadyAddresses"] is True
    client = named(rendered("default"), "Service", "freshrank-triton")["spec"]
    assert not client.get("publishNotReadyAddresses")


def test_a_client_that_balances_itself_finds_the_ready_replicas_and_no_control() -> None:
    """A headless Service names each replica that is ready, at the inference port alone."""
    for protocol, inference in (("grpc", 8001), ("http", 8000)):
        objects = rendered("default", f'triton.inferenceProtocol="{protocol}"')
        service = named(objects, "Service", "freshrank-triton-headless")["spec"]
        assert service["clusterIP"] == "None"
        assert not service.get("publishNotReadyAddresses")
        assert service["selector"] == named(objects, "Service", "freshrank-triton")["spec"]["selector"]
        assert [port["port"] for port in service["ports"]] == [inference]


def test_what_is_asked_on_a_connection_that_grows_too_old_is_answered() -> None:
    """A connection has an age and no period of grace: that would cut off a publication, which may take minutes."""
    arguments = [a for a in container_of(rendered("default"), "triton")["args"] if "connection" in a]
    assert arguments == ["--grpc-max-connection-age=300000"]


def test_other_namespaces_are_named_one_by_one() -> None:
    """Clients get the inference port, publishers also need their label, Prometheus gets metrics only."""
    objects = rendered("production")
    peers = {
        name: {
            "namespaceSelector": {
                "matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": [name]}]
            }
        }
        for name in ("storefront", "ranking-team", "monitoring")
    }
    assert ports_open_to(objects, "triton", peers["storefront"]) == {8001}
    assert ports_open_to(objects, "triton", peers["monitoring"]) == {8002}
    assert ports_open_to(objects, "triton", peers["ranking-team"]) == set()
    publisher = peers["ranking-team"] | {"podSelector": {"matchLabels": PUBLISHER}}
    assert ports_open_to(objects, "triton", publisher) == {8000, 8001, 8002}


@pytest.mark.parametrize("component", ["feast", "redis"])
def test_stores_are_not_open_to_the_namespace(component: str) -> None:
    """Feature server and Redis accept writes: only our pods and publishers reach them."""
    peers = [peer for rule in rules(rendered("default"), component) for peer in rule["from"]]
    assert all(peer["podSelector"]["matchLabels"] for peer in peers)


@pytest.mark.parametrize("component", ["triton", "feast", "redis"])
def test_a_policy_selects_the_pods_it_speaks_of(component: str) -> None:
    """The labels of a policy are labels of the pods, and of no other component's."""
    selector = named(rendered("default"), "NetworkPolicy", f"freshrank-{component}")["spec"]["podSelector"]
    matched = [
        component_of(pod)
        for pod in pods(rendered("default"))
        if selector["matchLabels"].items() <= pod["metadata"]["labels"].items()
    ]
    assert matched == [component]


@pytest.mark.parametrize("component", ["triton", "feast", "redis"])
def test_a_policy_opens_exactly_the_ports_that_are_listened_on(component: str) -> None:
    """No port of a pod is forgotten and none is open without a listener."""
    opened = {port["port"] for rule in rules(rendered("default"), component) for port in rule["ports"]}
    assert opened == {port["containerPort"] for port in container_of(rendered("default"), component)["ports"]}


@in_every_scenario
def test_services_point_at_ports_that_exist(scenario: str) -> None:
    """Each target port is a named port of the one pod the Service selects."""
    objects = rendered(scenario)
    for service in of_kind(objects, "Service"):
        pod = pod_of(objects, service["spec"]["selector"]["app.kubernetes.io/component"])
        names = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


# --- online store and feature store


def test_an_external_redis_leaves_no_redis_behind() -> None:
    """No object of Redis is rendered."""
    objects = rendered("default", 'redis.mode="external"')
    assert not [item for item in objects if item["metadata"]["name"].endswith("-redis")]


@pytest.fixture
def store_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The feature_store.yaml that the daily run writes into the workspace `tmp_path` on a cluster."""
    monkeypatch.setenv("FRESHRANK_ONLINE_STORE", "redis")
    monkeypatch.setenv("FRESHRANK_REDIS_URL", "redis:6379,db=0,password=hunter2")
    settings.cache_clear()
    workspace = Workspace(tmp_path, "my_log")
    write_feast_yaml(log_schema(), workspace)
    yield workspace.feast / "feature_store.yaml"
    settings.cache_clear()


def test_feast_serves_the_store_that_the_daily_run_writes(store_yaml: Path, tmp_path: Path) -> None:
    """It starts in the folder of feature_store.yaml, whose address of Redis is a reference to its environment."""
    container = container_of(rendered_at(tmp_path), "feast")
    assert container["command"][:4] == ["feast", "-c", str(store_yaml.parent), "serve"]
    reference = yaml.safe_load(store_yaml.read_text())["online_store"]["connection_string"]
    assert reference.rpartition(",")[2] in [f"${{{entry['name']}}}" for entry in container["env"]]


def test_feast_waits_for_the_registry_of_the_first_daily_run(store_yaml: Path, tmp_path: Path) -> None:
    """Feast would end at once without it; it is the file that feature_store.yaml names."""
    command = init_container_of(rendered_at(tmp_path), "feast")["command"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=0.3, check=True)
    registry = Path(yaml.safe_load(store_yaml.read_text())["registry"]["path"].removeprefix("sqlite:///"))
    registry.write_text("a registry")
    subprocess.run(command, timeout=5, check=True)


def test_a_lost_online_store_is_filled_by_one_job() -> None:
    """`kubectl create job --from` runs the command that writes the newest features, as a pod that may write them."""
    pod = pod_of(rendered("production"), "materialize")
    (container,) = pod["spec"]["containers"]
    assert container["command"][:3] == ["freshrank", "features", "build"]
    assert pod["metadata"]["labels"].items() >= PUBLISHER.items()
    given = named(rendered("production"), "ConfigMap", "freshrank-settings")["data"]
    assert container["command"][-1] == "$(FRESHRANK_DATASET)"
    assert given["FRESHRANK_DATASET"] == "/var/lib/freshrank/data/shop"


@pytest.mark.parametrize("mould", ["materialize", "import"])
def test_the_command_of_the_job_is_one_that_freshrank_has(mould: str) -> None:
    """Its command line asks for help without an error, and every option is one of it."""
    (container,) = pod_of(rendered("production"), mould)["spec"]["containers"]
    command = [sys.executable, "-m", *container["command"][:3], "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(word in run.stdout for word in container["command"] if word.startswith("--"))


def test_an_upgrade_of_the_chart_alone_does_not_restart_redis() -> None:
    """Its pod says nothing of the chart's version, and its image is pulled where ours are built."""
    (redis,) = of_kind(rendered("kind"), "StatefulSet")
    template = redis["spec"]["template"]
    assert template["metadata"]["labels"] == redis["spec"]["selector"]["matchLabels"]
    assert template["spec"]["containers"][0]["imagePullPolicy"] == "IfNotPresent"


@pytest.mark.parametrize("mould, words", [("backup", []), ("restore", ["--name", "shop"])])
def test_a_bucket_and_a_lost_volume_have_one_job_each(mould: str, words: list[str]) -> None:
    """A copy is made, or put back, by one command; without a bucket there are no such jobs."""
    (container,) = pod_of(rendered("production"), mould)["spec"]["containers"]
    assert container["command"] == ["freshrank", mould, *words, "--data", "$(FRESHRANK_DATASET)"]
    without = rendered("production", 'storage.url=""', 'storage.backupSchedule=""')
    names = {job["metadata"]["name"] for job in of_kind(without, "CronJob")}
    assert names == {"freshrank-daily", "freshrank-import", "freshrank-materialize"}


def test_the_training_step_may_start_jobs_of_several_nodes() -> None:
    """Its service account gets what a TrainJob takes, only where nodes are asked for."""
    objects = rendered("production", "kubeflow.training.nodes=2")
    assert named(objects, "ConfigMap", "freshrank-pipeline")["data"]["FRESHRANK_CLUSTER_TRAIN_NODES"] == "2"
    (role,), (binding,) = of_kind(objects, "Role"), of_kind(objects, "RoleBinding")
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "ranking-team"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "default-editor", "namespace": "ranking-team"}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    granted = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert granted == {
        ("trainjobs", "create"),
        ("trainjobs", "get"),
        ("trainjobs", "delete"),
        ("pods", "list"),
        ("pods/log", "get"),
    }
    assert not of_kind(rendered("production"), "Role")


def test_keys_of_the_bucket_reach_who_uses_it_and_nobody_else() -> None:
    """The pipeline and the job have them, by reference; servers do not."""
    holders = [c["name"] for c in containers(rendered("production")) if any("AWS" in e["name"] for e in c["env"])]
    assert holders == ["backup", "daily", "restore"]


def test_redis_never_forgets_a_feature_to_make_room() -> None:
    """An evicted feature would read as a cold item, so a full store refuses writes."""
    arguments = container_of(rendered("default"), "redis")["args"]
    assert arguments[arguments.index("--maxmemory-policy") + 1] == "noeviction"


@pytest.mark.parametrize("scenario", ["default", "kind"])
def test_redis_is_full_before_kubernetes_kills_it(scenario: str) -> None:
    """maxmemory leaves a fifth of the limit for buffers and the rewrite of the log."""
    container = container_of(rendered(scenario), "redis")
    arguments = container["args"]
    maximum = int(arguments[arguments.index("--maxmemory") + 1].removesuffix("mb"))
    limit = {"1Gi": 1024, "128Mi": 128}[container["resources"]["limits"]["memory"]]
    assert maximum <= 0.8 * limit


def test_models_outlive_the_release() -> None:
    """The claim the chart makes is kept on uninstall; an existing claim makes none."""
    claim = named(rendered("default"), "PersistentVolumeClaim", "freshrank-home")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not of_kind(rendered("production"), "PersistentVolumeClaim")
