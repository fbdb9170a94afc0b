"""The paper's figures: hand-made measurements give known findings; a small world is measured, drawn and resumed."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from freshrank.bench.paper.analysis import Drop, GradientNorms, ScoreGroup
from freshrank.bench.paper.claims import Outcome, SeedMean
from freshrank.bench.paper.figure_plots import png
from freshrank.bench.paper.figures import load_evidence
from freshrank.bench.paper.findings import (
    FigureData,
    ModelMeasurements,
    Results,
    ablation_ratio,
    extreme,
    figures,
    mean_delta,
    observed_rates,
    ratio_by_part,
)
from freshrank.cli.main import app
from freshrank.datasets.simulator import WorldConfig, simulate
from freshrank.schema import FeatureGroup
from freshrank.settings import settings

pytestmark = pytest.mark.integration

NAMES = ["2a", "2b", "2c", "6a", "6b", "6c", "7a", "7b"]
WORLD = WorldConfig(users=60, days=6, items_at_start=80, new_items_per_day=8, impressions_per_day=600)
PNG = b"\x89PNG\r\n\x1a\n"


def _drop(removed: str, group: FeatureGroup, delta: float, slice: str = "all") -> Drop:
    return Drop(removed=removed, group=group, slice=slice, action="click", full=0.6, delta=delta)


def _scores(warm: float, cold: float) -> list[ScoreGroup]:
    return [
        ScoreGroup(action="click", label=label, cold=side, rows=40 if label else 60, mean=mean, quantiles=(mean,) * 5)
        for label in (1, 0)
        for side, mean in ((False, warm), (True, cold))
    ]


def _measured(
    recipe: str, seed: int, ratio: float = 0.8, cold: float = 0.9, first: float = 0.7, loss: float = -0.01
) -> ModelMeasurements:
    """A model with one action whose non-historical gradients are ``ratio`` of the historical ones; seeds jitter."""
    jitter = 0.001 * seed
    gradients = [
        GradientNorms(
            step=step, groups={"item_content": ratio, "item_id": 1}, historical=1, non_historical=ratio + jitter
        )
        for step in (1, 6, 11)
    ]
    groups = [
        _drop("historical", FeatureGroup.HISTORICAL, -0.1 + jitter),
        _drop("non_historical", FeatureGroup.NON_HISTORICAL, -0.02),
    ]
    singles = [
        _drop("age", FeatureGroup.NON_HISTORICAL, loss - jitter),
        _drop("tab", FeatureGroup.NON_HISTORICAL, 0),
        _drop("ctr", FeatureGroup.HISTORICAL, -0.5),
    ]
    shares = [first + jitter, 1 - first - jitter]
    return ModelMeasurements(
        recipe=recipe,
        seed=seed,
        gradients=gradients,
        scores=_scores(1.0, cold + jitter),
        variance={"all": shares, "fresh": shares},
        by_group=groups,
        by_feature=singles,
    )


def _as_in_the_paper() -> dict[str, FigureData]:
    models = [
        measured
        for seed in range(3)
        for measured in (
            _measured("baseline", seed),
            _measured("residual", seed, ratio=0.9, loss=-0.03 - 0.002 * seed),
            _measured("score_reg", seed, cold=0.99),
            _measured("mixup", seed, first=0.6 + 0.002 * seed),
        )
    ]
    return {figure.name: figure for figure in figures(Results(models[::-1], ["click"]))}


@pytest.fixture(scope="module")
def drawn() -> dict[str, FigureData]:
    return _as_in_the_paper()


@pytest.mark.parametrize("name", NAMES)
def test_models_that_behave_as_the_paper_says_confirm_every_figure(drawn: dict[str, FigureData], name: str) -> None:
    """History matters five times as much, ratio 0.8 then 0.9, gap 10% then 1%, first component 70% then 60%."""
    assert drawn[name].claim.outcome is Outcome.HOLDS


@pytest.mark.parametrize(
    ("name", "recipe", "change"),
    [
        ("2b", "baseline", {"ratio": 1.2}),
        ("2c", "baseline", {"cold": 1.1}),
        ("6a", "residual", {"loss": 0.02}),
        ("6b", "residual", {"ratio": 0.5}),
        ("6c", "score_reg", {"cold": 0.7}),
        ("7a", "mixup", {"first": 0.9}),
        ("7b", "mixup", {"first": 0.9}),
    ],
)
def test_models_that_behave_otherwise_do_not(name: str, recipe: str, change: dict[str, float]) -> None:
    """One recipe changed; 0.002 per seed so that the difference is not a constant."""
    models = [
        _measured(other, seed)
        for seed in range(3)
        for other in ("baseline", "residual", "score_reg", "mixup")
        if other != recipe
    ]
    models += [_measured(recipe, seed, **{k: v + 0.002 * seed for k, v in change.items()}) for seed in range(3)]
    by_name = {figure.name: figure for figure in figures(Results(models, ["click"]))}
    assert by_name[name].claim.outcome is Outcome.FAILS


def test_the_first_figures_numbers_are_those_measured(drawn: dict[str, FigureData]) -> None:
    """-0.1, -0.099, -0.098 without history and -0.02 without the rest: mean ratio 0.20202."""
    table = drawn["2a"].table.filter(slice="all", action="click")
    means = dict(zip(table["quantity"], table["mean"], strict=True))
    assert means["historical removed"] == pytest.approx(-0.099)
    assert means["non_historical removed"] == pytest.approx(-0.02)
    assert means["ratio"] == pytest.approx((0.02 / 0.1 + 0.02 / 0.099 + 0.02 / 0.098) / 3)
    assert table["seeds"].to_list() == [3, 3, 3]


def test_the_ablation_ratio_has_no_value_where_history_is_of_no_use() -> None:
    """A ratio to a gain would read as a small loss."""
    groups = (FeatureGroup.HISTORICAL, FeatureGroup.NON_HISTORICAL)
    lost, gained = (
        [_drop(g.value, g, d) for g, d in zip(groups, deltas, strict=True)] for deltas in ((-0.1, -0.05), (0.01, -0.05))
    )
    assert ablation_ratio(lost, "all", "click") == pytest.approx(0.5)
    assert ablation_ratio(gained, "all", "click") is None
    assert ablation_ratio([], "all", "click") is None


def test_the_gradient_ratio_is_averaged_over_tenths_of_the_training() -> None:
    """Twelve measured steps in ten parts: the first two parts hold two each; three steps are three parts."""
    steps = [GradientNorms(step=s, groups={}, historical=1, non_historical=s) for s in range(1, 13)]
    assert ratio_by_part(steps) == [1.5, 3.5, 5, 6, 7, 8, 9, 10, 11, 12]
    assert ratio_by_part(steps[:3]) == [1, 2, 3]


def test_the_extreme_part_is_chosen_by_its_mean_over_seeds() -> None:
    """Parts (1, 3), (2, 2.2), (0, 1): highest mean 2.1 though one seed has 3 elsewhere; least 0.5."""
    per_seed = [[1, 2, 0], [3, 2.2, 1]]
    assert extreme(per_seed, max) == SeedMean.over([2, 2.2])
    assert extreme(per_seed, min) == SeedMean.over([0, 1])


def test_a_change_says_both_means_and_is_paired_by_seed() -> None:
    """Baseline gap 10%, 9.9%, 9.8%; ScoreReg half of each: no seed is compared with another."""
    models = [m for s in range(3) for m in (_measured("baseline", s), _measured("score_reg", s, cold=0.95))]
    change = Results(models[::-1], ["click"]).change(
        "score_reg", "gap", lambda m: 1 - m.scores[1].mean, "below", percent=True
    )
    assert str(change) == "gap 9.9% -> 4.9%, change -5.0 points (-5.0 to -5.0)"


def test_the_shift_of_figure_6a_is_the_mean_over_single_features_of_one_group() -> None:
    """-0.01 and 0 among the non-historical ones; the historical one counts on its own."""
    measured = _measured("baseline", 0)
    assert mean_delta(measured, FeatureGroup.NON_HISTORICAL, "click") == pytest.approx(-0.005)
    assert mean_delta(measured, FeatureGroup.HISTORICAL, "click") == pytest.approx(-0.5)
    assert mean_delta(measured, FeatureGroup.HISTORICAL, "save") is None


def test_observed_rates_stand_beside_the_score_gap() -> None:
    """40 positives and 60 negatives on both sides; an action never seen has none."""
    assert observed_rates(_scores(1, 1), ["click", "save"]) == (
        "Observed rates of the same rows: click 0.400 on warm items, 0.400 on cold ones; "
        "save unknown on warm items, unknown on cold ones."
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_drawn_from_its_table_alone_and_is_the_same_every_time(
    drawn: dict[str, FigureData], name: str
) -> None:
    """A PNG below 150 KB; the table read back from CSV gives the same bytes."""
    table = drawn[name].table
    picture = png(name, table)
    assert picture.startswith(PNG)
    assert len(picture) < 150_000
    assert png(name, pl.read_csv(table.write_csv().encode(), schema=table.schema)) == picture


# ---------------------------------------------------------------- a small world, for real


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One seed measured and drawn by the command, in a workspace of its own."""
    home = tmp_path_factory.mktemp("figures")
    simulate(home / "world", WORLD)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FRESHRANK_HOME", str(home / "home"))
        settings.cache_clear()
        _figures(home)
        yield home
    settings.cache_clear()


def _figures(home: Path) -> None:
    arguments = ["bench", "figures", "--data", str(home / "world"), "--seeds", "1", "--out", str(home / "out")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


def _kept(home: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_mtime_ns for path in (home / "home" / "steps" / "simulated" / "figures").iterdir()
    }


def test_the_command_writes_every_figure_its_numbers_and_a_page(home: Path) -> None:
    """CSV and PNG each, and the page names the outcome of each figure."""
    out = home / "out"
    page = (out / "figures.md").read_text()
    for name in NAMES:
        numbers = pl.read_csv(out / f"figure-{name}.csv")
        assert {"mean", "low", "high", "seeds"} <= set(numbers.columns)
        assert numbers["mean"].drop_nulls().len() > 0
        assert (out / f"figure-{name}.png").read_bytes().startswith(PNG)
        assert f"![{_title(page, name)}](figure-{name}.png)" in page
    assert page.count("one seed, no interval") >= len(NAMES)


def _title(page: str, name: str) -> str:
    return page.split(f"[{name}](#figure-{name}) | ")[1].split(" |")[0]


def test_a_second_call_trains_only_what_is_missing(home: Path) -> None:
    """One of four results is lost: it is measured again, with the same numbers; the others are not touched."""
    before = _kept(home)
    numbers = (home / "out" / "figure-7b.csv").read_bytes()
    lost = next(name for name in before if name.startswith("mixup-0-"))
    (home / "home" / "steps" / "simulated" / "figures" / lost).unlink()
    _figures(home)
    after = _kept(home)
    assert {name for name in after if after[name] != before[name]} == {lost}
    assert sorted(after) == sorted(before)
    assert (home / "out" / "figure-7b.csv").read_bytes() == numbers


def test_the_windows_of_a_short_log_use_all_of_it(home: Path) -> None:
    """Six days: three judged, one to calibrate, two to train on; no day serves twice."""
    split = load_evidence(home / "world", "sparse").split
    parts = (split.train, split.calibration, split.evaluation)
    assert [len(part) for part in parts] == [2, 1, 3]
    days = [day for part in parts for day in part]
    assert days == sorted(set(days))
