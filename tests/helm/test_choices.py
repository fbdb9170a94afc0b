"""What whoever installs the release may choose, and which choices the chart refuses or warns of."""

import json
import re
import subprocess
from typing import Any

import kubernetes_validate
import pytest

from tests.helm.charts import (
    CHART,
    Object,
    component_of,
    container_of,
    containers,
    named,
    notes,
    of_kind,
    pod_of,
    pods,
    refusal,
    rendered,
)

WHERE_PODS_ARE_MADE = {"triton": ["triton"], "feast": ["feast"], "redis": ["redis"], "features": ["backup", "restore"]}
"""Part of the values -> components whose pods it speaks of."""
OTHER_JOBS = ["materialize", "daily", "import"]
INTERNAL = 'redis.mode="internal"'
BUCKET = ('storage.url="s3://bucket"',)
NODES = "kubeflow.training.nodes=2"

for_each_part = pytest.mark.parametrize("part", WHERE_PODS_ARE_MADE)


# --- the feature server


def test_a_release_without_the_feature_server_has_nothing_of_it() -> None:
    """No object speaks of it, and no policy lets it in."""
    objects = rendered("production", "feast.enabled=false", INTERNAL)
    assert not [item for item in objects if "feast" in json.dumps(item["metadata"])]
    selected = json.dumps([policy["spec"] for policy in of_kind(objects, "NetworkPolicy")])
    assert '"app.kubernetes.io/component": "triton"' in selected
    assert "feast" not in selected


def test_nothing_else_changes_without_the_feature_server() -> None:
    """Triton, Redis, the jobs and what Airflow and the pipeline are told stay as they were."""
    kinds = {"Deployment", "StatefulSet", "CronJob", "ConfigMap", "Service", "PodDisruptionBudget"}
    before, after = (
        [item for item in rendered("production", INTERNAL, f"feast.enabled={enabled}") if item["kind"] in kinds]
        for enabled in ("true", "false")
    )
    assert after == [item for item in before if not item["metadata"]["name"].endswith("-feast")]
    assert len(before) == len(after) + 3


# --- what pods may ask for


EGRESS = ("networkPolicy.egress.enabled=true", 'networkPolicy.egress.to=[{"cidr":"10.1.0.0/16","ports":[6379,443]}]')


def test_pods_ask_whom_they_like_unless_told_otherwise() -> None:
    """A policy that keeps pods in is switched on by whoever knows their addresses; Redis asks nobody in any case."""
    keeping = [policy for policy in of_kind(rendered("default"), "NetworkPolicy") if "egress" in policy["spec"]]
    assert [policy["metadata"]["name"] for policy in keeping] == ["freshrank-redis"]


def test_pods_that_are_kept_in_reach_names_redis_triton_and_what_is_listed() -> None:
    """All pods of the release but Redis, those of jobs included."""
    objects = rendered("production", INTERNAL, *EGRESS)
    spec = named(objects, "NetworkPolicy", "freshrank-egress")["spec"]
    (but,) = spec["podSelector"]["matchExpressions"]
    assert (but["operator"], but["values"]) == ("NotIn", ["redis"])
    for pod in pods(objects):
        assert spec["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert but["key"] in pod["metadata"]["labels"]
    names, redis, triton, listed = spec["egress"]
    assert {(each["protocol"], each["port"]) for each in names["ports"]} == {("UDP", 53), ("TCP", 53)}
    for rule, component in ((redis, "redis"), (triton, "triton")):
        (peer,) = rule["to"]
        selector = peer["podSelector"]["matchLabels"]
        assert selector.items() <= pod_of(objects, component)["metadata"]["labels"].items()
        assert {each["port"] for each in rule["ports"]} <= open_ports(objects, component)
    assert listed["to"] == [{"ipBlock": {"cidr": "10.1.0.0/16"}}]
    assert [each["port"] for each in listed["ports"]] == [6379, 443]
    for policy in of_kind(objects, "NetworkPolicy"):
        kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)


def open_ports(objects: list[Object], component: str) -> set[int]:
    return {port["containerPort"] for port in container_of(objects, component)["ports"]}


# --- pods as a platform wants them


AFFINITY = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "pool", "operator": "In", "values": ["ml"]}]}]
        }
    }
}
EXTRA_ENV: list[Object] = [
    {"name": "HTTPS_PROXY", "value": "http://proxy:3128"},
    {"name": "LICENCE", "valueFrom": {"secretKeyRef": {"name": "licence", "key": "key"}}},
    {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
]


def with_knobs(part: str) -> list[Object]:
    knobs: dict[str, Any] = {
        "podLabels": {"team": "ranking"},
        "podAnnotations": {"sidecar.istio.io/inject": "false"},
        "affinity": AFFINITY,
        "priorityClassName": "business",
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "ml", "operator": "Exists"}],
        "extraEnv": EXTRA_ENV,
    }
    return rendered("production", INTERNAL, *(f"{part}.{name}={json.dumps(value)}" for name, value in knobs.items()))


@for_each_part
def test_labels_annotations_and_places_of_pods_are_values(part: str) -> None:
    """They are added to the pods of that part alone, to what those have anyway."""
    objects = with_knobs(part)
    for pod in pods(objects):
        of_this_part = component_of(pod) in WHERE_PODS_ARE_MADE[part] + OTHER_JOBS * (part == "features")
        assert (pod["metadata"]["labels"].get("team") == "ranking") is of_this_part
        assert ("sidecar.istio.io/inject" in pod["metadata"].get("annotations", {})) is of_this_part
        assert (pod["spec"].get("affinity") == AFFINITY) is of_this_part
        assert (pod["spec"].get("priorityClassName") == "business") is of_this_part
        assert (pod["spec"].get("nodeSelector") == {"disk": "ssd"}) is of_this_part
        assert ("tolerations" in pod["spec"]) is of_this_part
    before = pod_of(rendered("production", INTERNAL), WHERE_PODS_ARE_MADE[part][0])["metadata"]["labels"]
    assert before.items() <= pod_of(objects, WHERE_PODS_ARE_MADE[part][0])["metadata"]["labels"].items()


@for_each_part
def test_variables_of_a_pod_are_values(part: str) -> None:
    """Each of its containers has them beside its own, by value or by reference."""
    for container in containers(with_knobs(part)):
        names = [entry["name"] for entry in container["env"]]
        assert len(names) == len(set(names))
        added = [entry for entry in container["env"] if entry in EXTRA_ENV]
        assert added in ([], EXTRA_ENV)
    for component in WHERE_PODS_ARE_MADE[part]:
        spec = pod_of(with_knobs(part), component)["spec"]
        assert all(EXTRA_ENV[0] in each["env"] for each in spec.get("initContainers", []) + spec["containers"])


@for_each_part
def test_pods_with_all_of_that_are_what_kubernetes_accepts(part: str) -> None:
    """The objects fit the strict schema."""
    for item in with_knobs(part):
        if item["kind"] in ("Deployment", "StatefulSet", "CronJob"):
            kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    "override",
    [
        'triton.podLabels={"app.kubernetes.io/component":"feast"}',
        'triton.podLabels={"freshrank/publisher":"true"}',
        'redis.extraEnv=[{"name":"REDISCLI_AUTH","value":"x"}]',
        'triton.extraEnv=[{"name":"FRESHRANK_REDIS_URL","value":"x"}]',
        'feast.extraEnv=[{"name":"BOTH","value":"x","valueFrom":{"fieldRef":{"fieldPath":"spec.nodeName"}}}]',
        'feast.affinity={"podAfinity":{}}',
        'home.size="5ki"',
    ],
)
def test_what_would_collide_with_the_charts_own_or_with_kubernetes_is_refused(override: str) -> None:
    """Selectors, the publisher's label and variables that are set already stay the chart's."""
    assert override.split(".")[1].partition("=")[0] in refusal(override)


# --- values that fit the schema and are wrong


@pytest.mark.parametrize(
    "overrides, field, received, expected",
    [
        (
            ["triton.autoscaling.enabled=true", "triton.autoscaling.minReplicas=7"],
            "triton.autoscaling.minReplicas",
            "7",
            "triton.autoscaling.maxReplicas, which is 6",
        ),
        (['redis.maxMemory="2gb"'], "redis.maxMemory", "2gb", "redis.resources.limits.memory, which is 1Gi"),
        (['redis.maxMemory="900mb"'], "redis.maxMemory", "900mb", "four fifths"),
        (["features.memoryGiB=8.5"], "features.memoryGiB", "8.5", "features.resources.limits.memory, which is 8Gi"),
        (['home.dataset="s3://bucket/shop"'], "home.dataset", "s3://bucket/shop", "a folder below home.path"),
        (['home.dataset="/data/shop"'], "home.dataset", "/data/shop", "below /var/lib/freshrank"),
        (['home.dataset="/var/lib/freshrank/shop"'], "home.dataset", "/var/lib/freshrank/shop", "such as shop"),
        (['home.dataset="data/../../x"'], "home.dataset", "data/../../x", "lead upwards"),
        (['import.source="s3://bucket/shop"'], "import.source", "s3://bucket/shop", "import.existingClaim"),
        (['kubeflow.host="ml-pipeline-ui"'], "kubeflow.host", "ml-pipeline-ui", "http://ml-pipeline-ui.kubeflow.svc"),
        (['kubeflow.host="http://kfp/pipeline"'], "kubeflow.host", "http://kfp/pipeline", "kubeflow.uiHost"),
        ([NODES], "kubeflow.training.nodes", "2", "set kubeflow.host"),
        (["kubeflow.training.gpus=1"], "kubeflow.training.gpus", "1", "set kubeflow.host"),
        (['kubeflow.namespace="team"'], "kubeflow.namespace", "team", "set kubeflow.host"),
        (['triton.sharedMemory="9Gi"'], "triton.sharedMemory", "9Gi", "triton.resources.limits.memory, which is 8Gi"),
        (['home.path="/tmp"'], "home.path", "/tmp", "neither above nor below /tmp"),
        (['home.path="/dev"'], "home.path", "/dev", "/dev/shm"),
        (['home.path="/opt/freshrank/home/"'], "home.path", "/opt/freshrank/home/", "/opt/freshrank"),
        (['home.path="/opt/venv/home"'], "home.path", "/opt/venv/home", "/opt/venv, which is the code of the images"),
        (['storage.url="file:///mnt/copies"'], "storage.url", "file:///mnt/copies", "s3://bucket/prefix"),
        (
            ['storage.url="file:///var/lib/freshrank/../x"'],
            "storage.url",
            "file:///var/lib/freshrank/../x",
            "home.path",
        ),
        (
            ['kubeflow.host="http://ml-pipeline-ui.kubeflow.svc"', 'networkPolicy.publisherNamespaces=["team"]'],
            "networkPolicy.publisherNamespaces",
            '["team"]',
            "kubeflow among them",
        ),
        (['storage.backupSchedule="0 2 * * *"', *BUCKET], "storage.backupSchedule", "0 2 * * *", "home.dataset"),
        (['import.schedule="0 2 * * *"'], "import.schedule", "0 2 * * *", "import.source"),
        (['import.source="incoming"'], "import.source", "incoming", "home.dataset"),
        (['import.existingClaim="export"'], "import.existingClaim", "export", "home.dataset"),
        (['import.source="shop/"', 'home.dataset="shop"'], "import.source", "shop/", "another folder"),
        (
            ['serviceAccount.name="team"', 'serviceAccount.annotations={"a":"b"}'],
            "serviceAccount.annotations",
            '{"a":"b"}',
            "annotate it yourself",
        ),
        ([EGRESS[0], 'redis.mode="external"'], "networkPolicy.egress.to", "[]", "cidr"),
        ([EGRESS[0], *BUCKET], "networkPolicy.egress.to", "[]", "cidr"),
        (
            [NODES, 'kubeflow.host="https://kubeflow.example.com"'],
            "kubeflow.host",
            "https://kubeflow.example.com",
            "http://ml-pipeline-ui.NAMESPACE.svc",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_what_mends_it(
    overrides: list[str], field: str, received: str, expected: str
) -> None:
    """Field, value received and what was expected are in the message."""
    message = refusal(*overrides)
    assert f"{field}: received {received}, expected" in message
    assert expected in message


@pytest.mark.parametrize(
    "part, amount, asked, limit",
    [
        ("triton", "cpu", "4500m", "4"),
        ("feast", "memory", "2049Mi", "2Gi"),
        ("redis", "cpu", "2", "1"),
        ("features", "memory", "9G", "8Gi"),
        ("kubeflow.steps", "memory", "8.5Gi", "8Gi"),
    ],
)
def test_nothing_asks_for_more_than_it_may_take(part: str, amount: str, asked: str, limit: str) -> None:
    """Kubernetes would refuse such a pod after the installation, or the pipeline its steps the next night."""
    message = refusal(f'{part}.resources.requests.{amount}="{asked}"', scenario="gpu")
    assert f"{part}.resources.requests.{amount}: received {asked}, expected at most" in message
    assert f"which is {limit}" in message


@pytest.mark.parametrize(
    "overrides",
    [
        ['triton.resources.requests.cpu="4000m"', 'triton.resources.requests.memory="8192Mi"'],
        ['feast.resources.requests.cpu="3"', "feast.enabled=false"],
        ['redis.resources.requests.cpu="3"', 'redis.mode="external"'],
        ['triton.sharedMemory="8Gi"'],
        ['home.path="/tmpdata"'],
        ['home.path="/opt/freshrank-home"'],
        ['storage.url="file:///var/lib/freshrank/copies"'],
        ["triton.autoscaling.enabled=true", "triton.autoscaling.minReplicas=6"],
        ["triton.autoscaling.minReplicas=7"],
        ['redis.maxMemory="819mb"'],
        ['redis.maxMemory="2gb"', 'redis.mode="external"'],
        ['redis.maxMemory="1600mb"', 'redis.resources.limits.memory="2.1G"'],
        ['kubeflow.host="http://ml-pipeline-ui.kubeflow.svc"', "networkPolicy.enabled=false"],
        ['kubeflow.host="http://ml-pipeline-ui.default.svc"'],
        [EGRESS[0]],
        ["features.memoryGiB=8"],
        ["features.memoryGiB=20", 'features.resources.limits.memory="24576Mi"'],
    ],
)
def test_a_value_at_its_bound_is_accepted(overrides: list[str]) -> None:
    """Equal is not above, units are compared and not numbers, and what is switched off is not judged."""
    assert rendered("default", *overrides)


def test_a_slash_behind_the_host_of_kubeflow_does_no_harm() -> None:
    """As browsers copy it; everything is rendered as without it."""
    host = "http://ml-pipeline-ui.kubeflow.svc.cluster.local"
    assert rendered("gpu", f'kubeflow.host="{host}/"') == rendered("gpu", f'kubeflow.host="{host}"')


@pytest.mark.parametrize(
    "host, profile, namespace",
    [
        ("http://ml-pipeline-ui.kubeflow.svc.cluster.local", "", "kubeflow"),
        ("http://ml-pipeline.pipelines.svc:8888", "", "pipelines"),
        ("http://ml-pipeline-ui.kubeflow.svc.cluster.local", "ranking-team", "ranking-team"),
        ("https://kubeflow.example.com", "ranking-team", "ranking-team"),
    ],
)
def test_the_right_to_start_a_trainjob_is_given_where_the_steps_run(host: str, profile: str, namespace: str) -> None:
    """In the profile; without profiles Kubeflow runs the steps in its own namespace, whatever the release's is."""
    admitted = f'networkPolicy.publisherNamespaces=["{namespace}"]'
    objects = rendered("default", NODES, admitted, f'kubeflow.host="{host}"', f'kubeflow.namespace="{profile}"')
    assert named(objects, "Role", "freshrank-train")["metadata"]["namespace"] == namespace
    binding = named(objects, "RoleBinding", "freshrank-train")
    assert binding["metadata"]["namespace"] == namespace
    account = "default-editor" if profile else "pipeline-runner"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]


# --- what may be right, and is said


@pytest.mark.parametrize(
    "scenario, overrides, warning",
    [
        ("kind", ["triton.replicas=2"], "ReadWriteOnce"),
        ("kind", ["triton.autoscaling.enabled=true"], "ReadWriteOnce"),
        ("kind", [], None),
        ("kind", ["triton.replicas=2", 'home.existingClaim="mine"'], None),
        ("production", ["monitoring.serviceMonitor.enabled=false"], "monitoring.alerts.enabled"),
        ("production", ["monitoring.serviceMonitor.enabled=false"], "targetQueueMilliseconds"),
        ("production", [], None),
        (
            "default",
            [],
            "images.freshrank.repository=freshrank/freshrank and images.triton.repository=freshrank/triton",
        ),
        ("production", ['images.triton.repository="triton"'], "images.triton.repository=triton:"),
        ("production", ['images.triton.repository="localhost/triton"'], None),
        ("production", ['images.triton.repository="registry:5000/triton"'], None),
    ],
)
def test_a_doubtful_choice_is_said_and_not_refused(scenario: str, overrides: list[str], warning: str | None) -> None:
    """One node may have all replicas, and someone else may scrape; whoever installs hears what else it would mean."""
    warnings = [part for part in notes(scenario, *overrides).split("\n\n") if part.startswith("WARNING")]
    assert [text for text in warnings if warning in text] if warning else not warnings


@pytest.mark.parametrize(
    "overrides, there",
    [
        ([], True),
        (['kubeflow.host="https://pipelines.example.com"'], True),
        (['kubeflow.host="http://ml-pipeline-ui.default.svc"'], False),
    ],
)
def test_what_the_steps_need_in_another_namespace_is_said_by_name(overrides: list[str], there: bool) -> None:
    """Claim and Secrets belong to a namespace; whoever installs the release makes them where the steps run."""
    said = notes("gpu", *overrides).partition("There must be as well:")[2].partition("Clients")[0].split()
    for name in ("freshrank-home,", "freshrank-triton-control", "freshrank-redis"):
        assert (name in said) is there


def test_who_changes_a_setting_hears_that_airflow_must_be_restarted() -> None:
    """The same command stands in the notes and in the procedures: no checksum of this chart restarts Airflow's pods."""
    command = "rollout restart deployment,statefulset --selector 'release=airflow,component in (scheduler,triggerer)'"
    assert f"kubectl -n default {command}" in notes("default")
    page = (CHART.parent / "docs/cluster.md").read_text()
    assert f"kubectl {command}" in page
    for section in ("Lose the bucket", "Lose the workspace", "Rotate a secret"):
        assert "](#restart-airflow)" in page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    "conditions, ends",
    [("SuccessCriteriaMet Complete", True), ("FailureTarget Failed", True), ("FailureTarget", False)],
)
def test_waiting_for_a_workspace_put_back_ends_when_its_job_fails_too(conditions: str, ends: bool) -> None:
    """The very line of docs/cluster.md, in a shell whose kubectl reports these conditions of a Job."""
    (line,) = re.findall(r"^until kubectl get job .*$", (CHART.parent / "docs/cluster.md").read_text(), re.MULTILINE)
    script = f"kubectl() {{ echo {conditions}; }}; sleep() {{ exit 9; }}; {line}"
    assert subprocess.run(["sh", "-c", script], check=False, timeout=10).returncode == (0 if ends else 9)


# --- the quick start


def test_the_quick_start_names_images_jobs_and_values_that_there_are() -> None:
    """Images given to kind are those of the pods; jobs have a mould in that very release, whose pods may publish."""
    text = (CHART / "README.md").read_text().partition("\n## ")[0]
    (install,) = re.findall(r"^helm install .*$", text, re.MULTILINE)
    overrides = [f'{name}="{value}"' for name, value in re.findall(r"--set ([\w.]+)=(\S+)", install)]
    objects = rendered("kind", *overrides)
    (loaded,) = re.findall(r"^kind load docker-image (.*)$", text, re.MULTILINE)
    assert set(loaded.split()) == {c["image"] for c in containers(objects) if c["imagePullPolicy"] == "Never"}
    moulds = {job["metadata"]["name"] for job in of_kind(objects, "CronJob")}
    assert set(re.findall(r"--from=cronjob/(\S+)", text)) == {"freshrank-daily"} <= moulds
    assert pod_of(objects, "daily")["metadata"]["labels"]["freshrank/publisher"] == "true"
