"""Alerts, dashboards and the autoscaler ask for what is really there."""

import json
import re
from pathlib import Path

import pytest
import yaml

from freshrank.serving.ranking.metrics import FAMILIES
from tests.helm.charts import CHART, helm, named, of_kind, rendered
from tests.helm.queries import (
    SCENARIO,
    adapter_rule,
    alerts,
    dashboard,
    grouped_labels,
    queried_metrics,
    queries,
    selectors,
)

OURS = {f"freshrank_ranking_{name}" for name in FAMILIES}
TRITONS = {"nv_inference_request_success", "nv_inference_queue_duration_us", "nv_inference_request_summary_us"}
"""test_chart_serves.py finds them in the answer of the real server."""
OTHERS = {
    "up",
    "kube_cronjob_created",
    "kube_cronjob_status_last_successful_time",
    "kube_deployment_status_replicas_ready",
    "kube_deployment_status_replicas_unavailable",
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
}
"""Of Prometheus itself, of kube-state-metrics and of kubelets."""
OF_A_TARGET = {"job", "namespace", "pod"}
OF_OBJECTS = {"cronjob", "deployment", "persistentvolumeclaim"}
OF_TRITON = {"model", "version", "quantile"}

for_each_query = pytest.mark.parametrize("asked", sorted(queries()))
for_each_alert = pytest.mark.parametrize("alert", [rule["alert"] for rule in alerts()])


def documented_labels() -> dict[str, set[str]]:
    """Metric -> labels, from the table of docs/serving.md."""
    text = (CHART.parent / "docs/serving.md").read_text().partition("\n## Metrics")[2]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|([^|]*)\|", text, re.MULTILINE)
    return {
        f"freshrank_ranking_{name}": {
            label.split()[0] for label in re.sub(r"\([^)]*\)", "", labels).split(",") if label.strip()
        }
        for names, labels in rows
        for name in re.findall(r"`(\w+)`", names)
    }


def test_the_documentation_lists_every_counter() -> None:
    """The labels that queries may use are those of that table."""
    assert documented_labels().keys() == OURS


def test_every_metric_asked_for_is_one_that_someone_exports() -> None:
    """Ours by the code, Triton's by the real server, the rest by name."""
    assert queried_metrics() <= OURS | TRITONS | OTHERS


def test_a_metric_that_is_asked_for_nowhere_is_no_metric_of_tritons() -> None:
    """The list that is checked against the real server is the list in use."""
    assert queried_metrics() >= TRITONS


@for_each_query
def test_labels_are_those_that_the_metrics_have(asked: str) -> None:
    """A label that does not exist matches nothing, and an alert on it never fires."""
    for selector in selectors(queries()[asked]):
        known = documented_labels().get(selector.name, OF_TRITON | OF_OBJECTS) | OF_A_TARGET
        assert {matcher.name for matcher in selector.matchers.matchers} <= known
    known = set().union(*documented_labels().values()) | OF_A_TARGET | OF_TRITON | OF_OBJECTS
    assert grouped_labels(queries()[asked]) <= known


def test_text_that_is_no_promql_is_noticed() -> None:
    """The parser these tests rely on refuses a query with a bracket missing."""
    with pytest.raises(ValueError, match=r"unexpected|unclosed|end of input"):
        selectors("sum(rate(up[5m])")


@for_each_alert
def test_an_alert_watches_its_own_release_only(alert: str) -> None:
    """Two releases under one Prometheus do not speak for each other."""
    (rule,) = [each for each in alerts() if each["alert"] == alert]
    for selector in selectors(rule["expr"]):
        matched = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        assert matched["namespace"] == "default"
        (named_by,) = matched.keys() & {"job", *OF_OBJECTS}
        expected = {"cronjob": "freshrank-backup", "persistentvolumeclaim": "freshrank-home"}
        assert matched[named_by].startswith(expected.get(named_by, "freshrank-triton"))


@for_each_alert
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: str) -> None:
    """Severity, how long it must last, what happened and where to look."""
    (rule,) = [each for each in alerts() if each["alert"] == alert]
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["for"]
    assert rule["annotations"].keys() == {"summary", "description"}


def test_the_job_of_the_alerts_is_what_the_service_monitor_makes() -> None:
    """Prometheus calls the job after the Service; one Service is selected, which names unready replicas too."""
    (monitor,) = of_kind(rendered(SCENARIO), "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (service,) = [s for s in of_kind(rendered(SCENARIO), "Service") if wanted <= s["metadata"]["labels"].items()]
    assert service["spec"]["publishNotReadyAddresses"] is True
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    jobs = {
        matcher.value
        for rule in alerts()
        for selector in selectors(rule["expr"])
        for matcher in selector.matchers.matchers
        if matcher.name == "job"
    }
    assert jobs == {service["metadata"]["name"]}


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule"])
def test_objects_of_the_prometheus_operator_have_its_form(kind: str) -> None:
    """Version and the keys that its resource definition knows; labels for its selector."""
    (item,) = of_kind(rendered(SCENARIO), kind)
    assert item["apiVersion"] == "monitoring.coreos.com/v1"
    assert item["metadata"]["labels"]["release"] == "prometheus"
    keys = {"ServiceMonitor": {"selector", "namespaceSelector", "endpoints"}, "PrometheusRule": {"groups"}}[kind]
    assert item["spec"].keys() == keys
    for group in item["spec"].get("groups", []):
        assert group.keys() == {"name", "rules"}
        assert all(rule.keys() == {"alert", "expr", "for", "labels", "annotations"} for rule in group["rules"])


def test_without_an_operator_nothing_of_it_is_rendered() -> None:
    """The default release installs where no Prometheus and no Grafana is."""
    assert not [item for item in rendered("default") if item["kind"] in ("ServiceMonitor", "PrometheusRule")]
    assert not [item for item in of_kind(rendered("default"), "ConfigMap") if "dashboards" in item["metadata"]["name"]]


def test_without_kube_state_metrics_no_alert_asks_for_it() -> None:
    """Whether anything answers is then asked of Prometheus' own scrape."""
    objects = rendered(SCENARIO, "monitoring.alerts.kubeStateMetrics=false")
    (rules,) = of_kind(objects, "PrometheusRule")
    asked = [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert len(asked) == len(alerts()) - 2
    assert not [expression for expression in asked if "kube_" in expression]


def test_nothing_answers_is_no_alarm_before_the_first_publication() -> None:
    """Nor are missing replicas: both ask whether any replica has been ready before."""
    ready = 'kube_deployment_status_replicas_ready{deployment="freshrank-triton",namespace="default"}'
    for name in ("FreshrankNothingAnswers", "FreshrankReplicasMissing"):
        (rule,) = [each for each in alerts() if each["alert"] == name]
        assert rule["expr"].endswith(f"and on () max(max_over_time({ready}[30d])) > 0")


def test_the_alert_of_volumes_watches_those_of_the_release() -> None:
    """The workspace, and Redis' where it is inside the chart; it is left out where nobody scrapes kubelets."""

    def asked(*overrides: str) -> list[str]:
        (rules,) = of_kind(rendered(SCENARIO, *overrides), "PrometheusRule")
        return [r["expr"] for g in rules["spec"]["groups"] for r in g["rules"] if r["alert"] == "FreshrankVolumeFull"]

    (external,), (internal,) = asked(), asked('redis.mode="internal"')
    assert 'persistentvolumeclaim=~"freshrank-home"' in external
    assert 'persistentvolumeclaim=~"freshrank-home|data-freshrank-redis-0"' in internal
    assert not asked("monitoring.alerts.volumeStats=false")
    (redis,) = of_kind(rendered(SCENARIO, 'redis.mode="internal"'), "StatefulSet")
    (claim,) = redis["spec"]["volumeClaimTemplates"]
    assert f"{claim['metadata']['name']}-{redis['metadata']['name']}-0" == "data-freshrank-redis-0"


def test_the_age_of_a_backup_is_watched_where_one_is_scheduled() -> None:
    """In seconds; one that never succeeded is as old as its CronJob."""
    (rule,) = [each for each in alerts() if each["alert"] == "FreshrankBackupMissing"]
    assert rule["expr"].rpartition("> ")[2].strip() == str(36 * 3600)
    without = of_kind(rendered(SCENARIO, 'storage.backupSchedule=""'), "PrometheusRule")
    assert "FreshrankBackupMissing" not in json.dumps(without)


@pytest.mark.parametrize(
    "threshold", ["degradedShare", "failedShare", "coldShare", "unknownShare", "defaultsRise", "volumeFreeShare"]
)
def test_a_threshold_is_a_value(threshold: str) -> None:
    """What is set stands in exactly one alert."""
    (rules,) = of_kind(rendered(SCENARIO, f"monitoring.alerts.{threshold}=0.123"), "PrometheusRule")
    asked = [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert len([expression for expression in asked if "0.123" in expression]) == 1


def test_grafana_finds_the_dashboard_by_its_label() -> None:
    """The ConfigMap holds the very file of the chart."""
    item = named(rendered(SCENARIO), "ConfigMap", "freshrank-dashboards")
    assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(item["data"]["serving.json"]) == dashboard()
    assert {Path(name).suffix for name in item["data"]} == {".json"}


def test_the_dashboard_works_on_any_prometheus_and_release() -> None:
    """Source, namespace and release are variables; every panel says what it shows, in which unit."""
    assert [variable["name"] for variable in dashboard()["templating"]["list"]] == ["datasource", "namespace", "job"]
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert '{job="$job",namespace="$namespace"' in target["expr"]


def test_the_autoscaler_asks_for_the_metric_that_the_adapter_makes() -> None:
    """By the same name, per pod; a release in another namespace reads its own pods."""
    scaler = named(rendered(SCENARIO), "HorizontalPodAutoscaler", "freshrank-triton")["spec"]
    (pods,) = [metric["pods"] for metric in scaler["metrics"] if metric["type"] == "Pods"]
    assert adapter_rule()["name"]["as"] == pods["metric"]["name"]
    assert adapter_rule()["resources"]["overrides"].keys() == {"namespace", "pod"}
    assert {selector.name for selector in selectors(adapter_rule()["seriesQuery"])} <= TRITONS


def test_alerts_of_another_release_have_other_names() -> None:
    """Groups are told apart by release and namespace."""
    run = helm("template", "second", str(CHART), "--namespace", "shop", "--set-json", "monitoring.alerts.enabled=true")
    (rules,) = of_kind([item for item in yaml.safe_load_all(run.stdout) if item], "PrometheusRule")
    assert [group["name"] for group in rules["spec"]["groups"]] == [
        "second-freshrank.shop.serving",
        "second-freshrank.shop.ranking",
    ]
    assert (
        'job="second-freshrank-triton-control",namespace="shop"'
        in rules["spec"]["groups"][0]["rules"][1]["expr"] + (rules["spec"]["groups"][0]["rules"][2]["expr"])
    )
