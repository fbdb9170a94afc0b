"""Counters in memory, of the interface that Triton's have."""

from typing import Any


class Metric:
    """One counter; like Triton's, it never goes down."""

    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, amount: float) -> None:
        assert amount >= 0
        self.value += amount


class Family:
    """Counters of one name."""

    def __init__(self, families: "Families", name: str) -> None:
        self.families = families
        self.name = name

    def Metric(self, labels: dict[str, str]) -> Metric:
        metric = Metric()
        key = self.name, frozenset(labels.items())
        assert key not in self.families.metrics
        self.families.metrics[key] = metric
        self.families.made[key] = self.name
        return metric


class Families:
    """All families by name."""

    def __init__(self) -> None:
        self.metrics: dict[Any, Metric] = {}
        self.made: dict[Any, str] = {}
        self.descriptions: dict[str, str] = {}

    def __call__(self, name: str, description: str) -> Family:
        self.descriptions[name] = description
        return Family(self, name)

    def value(self, name: str, **labels: object) -> float:
        key = f"freshrank_ranking_{name}", frozenset((label, str(value)) for label, value in labels.items())
        return self.metrics[key].value
