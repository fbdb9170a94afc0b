"""What the chart asks Prometheus: alerts, dashboards, the metric of the autoscaler."""

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import yaml

from tests.helm.charts import CHART, Object, named, of_kind, rendered

SCENARIO = "production"


def alerts(scenario: str = SCENARIO) -> list[Object]:
    (rules,) = of_kind(rendered(scenario), "PrometheusRule")
    return [rule for group in rules["spec"]["groups"] for rule in group["rules"]]


def dashboard() -> Object:
    return dict(json.loads((CHART / "dashboards/serving.json").read_text()))


def adapter_rule() -> Object:
    (rule,) = yaml.safe_load(named(rendered(SCENARIO), "ConfigMap", "freshrank-queue-metric")["data"]["config.yaml"])[
        "rules"
    ]
    return dict(rule)


def queries() -> dict[str, str]:
    """PromQL by what asks it."""
    panels = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    }
    template = adapter_rule()["metricsQuery"]
    filled = template.replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="default",pod=~"a|b"')
    return {rule["alert"]: rule["expr"] for rule in alerts()} | panels | {"autoscaler": filled}


def selectors(query: str) -> list[Any]:
    """Every vector selector of ``query``; ValueError where it is no PromQL."""
    return list(_selectors(promql_parser.parse(query)))


def _selectors(node: Any) -> Iterator[Any]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "args", "param", "vector_selector", "vs"):
        child = getattr(node, name, None)
        for each in child if isinstance(child, list) else [child]:
            if each is not None:
                yield from _selectors(each)


def queried_metrics() -> set[str]:
    return {selector.name for query in queries().values() for selector in selectors(query)}


def grouped_labels(query: str) -> set[str]:
    """The labels that ``query`` groups, joins or names in its legend by."""
    groups = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query)
    return {label.strip() for labels in groups for label in labels.split(",") if label.strip()}
