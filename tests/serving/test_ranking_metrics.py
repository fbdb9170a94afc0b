"""What `ranking` counts, with numbers a person can add up."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metric_families import Families
from ranking_world import RankingWorld

from freshrank.serving.ranking.metrics import DEFAULTS_EVERY, RankingMetrics
from freshrank.serving.ranking.ranked import Ranked
from freshrank.serving.ranking.service import RankingService
from freshrank.settings import settings


@pytest.fixture
def ranked(world: RankingWorld) -> Ranked:
    """User 1 and candidates 1, 2 and one nobody knows."""
    ranker = world.served_ranker()
    service = RankingService(world.repository, settings().home, lambda version, blocks: ranker.run(blocks))
    (answer,) = service.rank([{"user_id": np.array([[1]]), "item_ids": np.array([[1, 2, 10_000_000]])}])
    assert isinstance(answer, Ranked)
    return answer


def test_requests_candidates_and_probabilities_are_counted_per_version_and_kind(
    world: RankingWorld, ranked: Ranked
) -> None:
    """Two known candidates, warm at this age, and an unknown one: two and one, and the sums of their probabilities."""
    families = Families()
    metrics = RankingMetrics(families)
    encoder = world.served_ranker().encoder
    for _ in range(2):
        metrics.answered(ranked, encoder)
    metrics.refused("refused")
    metrics.stages(1, {"encode": 0.25})
    version = int(ranked.answer["model_version"][0])
    assert families.value("requests_total", outcome="ok", version=version) == 2
    assert families.value("requests_total", outcome="refused", version=0) == 1
    assert families.value("candidates_total", kind="warm", version=version) == 4
    assert families.value("candidates_total", kind="unknown", version=version) == 2
    clicks = ranked.answer["probabilities"][:, 0]
    total = families.value("probability_sum", action="click", kind="warm", version=version)
    assert total == pytest.approx(2 * clicks[:2].sum(), rel=1e-5)
    assert families.value("stage_seconds_total", stage="encode", version=1) == 0.25


def test_defaults_are_counted_per_feature_and_weighed_for_what_is_skipped(world: RankingWorld, ranked: Ranked) -> None:
    """The unknown item lacks its category: 1 of 3; in the first of every eight requests, times eight."""
    families = Families()
    metrics = RankingMetrics(families)
    for _ in range(DEFAULTS_EVERY):
        metrics.answered(ranked, world.served_ranker().encoder)
    labels: dict[str, Any] = {"feature": "category", "arm": 0}
    assert families.value("values_total", **labels) == 3 * DEFAULTS_EVERY
    assert families.value("defaults_total", **labels) == 1 * DEFAULTS_EVERY


def test_counters_of_versions_that_answered_long_ago_are_dropped(world: RankingWorld, ranked: Ranked) -> None:
    """Of twelve daily versions the last eight are still counted, so a server that runs for months does not grow."""
    families = Families()
    metrics, encoder = RankingMetrics(families), world.served_ranker().encoder
    for version in range(1, 13):
        daily = replace(ranked, answer=ranked.answer | {"model_version": np.array([version])})
        metrics.answered(daily, encoder)
    versions = {dict(labels).get("version") for _, labels in metrics._metrics}
    assert versions == {None} | {str(version) for version in range(5, 13)}


def test_a_new_version_makes_few_counters(world: RankingWorld, ranked: Ranked) -> None:
    """What there is per feature is not per version: Triton keeps half a kilobyte of every counter that ever was."""
    families = Families()
    metrics, encoder = RankingMetrics(families), world.served_ranker().encoder
    made = []
    for version in range(1, 4):
        metrics.answered(replace(ranked, answer=ranked.answer | {"model_version": np.array([version])}), encoder)
        made.append(len(metrics._metrics))
    assert made[2] - made[1] == made[1] - made[0] < 12


def test_counting_is_cheap_beside_the_ranking(world: RankingWorld, ranked: Ranked) -> None:
    """500 candidates; the request in eight with its defaults included."""
    rows = np.arange(500) % 3
    per_candidate = {"probabilities", "score", "cold", "known"}
    answer = {name: value[rows] if name in per_candidate else value for name, value in ranked.answer.items()}
    users = ("user_cat", "user_multi", "user_num", "user_emb", "sequence")
    inputs = {name: b if name.startswith(users) else b[rows] for name, b in ranked.inputs.items()}
    wide = Ranked("", 1, ranked.item_ids[rows], ranked.at, {}, answer, inputs)
    metrics, ranker = RankingMetrics(Families()), world.served_ranker()

    def seconds(work: Callable[[], object]) -> float:
        work()
        started = time.process_time()
        for _ in range(10 * DEFAULTS_EVERY):
            work()
        return time.process_time() - started

    counting = seconds(lambda: metrics.answered(wide, ranker.encoder))
    assert counting < seconds(lambda: ranker.run(wide.inputs)), "the graph of this tiny ranker alone"


def test_a_family_is_made_once_and_described() -> None:
    """All under one prefix; the same counter for the same labels."""
    families = Families()
    metrics = RankingMetrics(families)
    metrics.refused("failed")
    metrics.refused("failed")
    assert Counter(families.made.values()) == Counter({"freshrank_ranking_requests_total": 1})
    assert all(families.descriptions.values())
