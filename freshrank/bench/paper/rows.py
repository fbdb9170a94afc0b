"""The rows of table 1 as data: what each switches on, and the settings `freshrank bench tune` tries for it.

A row is one entry here. ``overrides`` are sections of :class:`RunConfig` as nested dictionaries; an empty one, as in
``{"techniques": {"mixup": {}}}``, takes the paper's values.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from freshrank.config import EvaluationConfig, RunConfig, TechniquesConfig, WindowConfig
from freshrank.datasets.kuairand import PROTOCOLS
from freshrank.errors import ConfigError
from freshrank.storage.files import read_json

Overrides = dict[str, Any]
BASELINE, COMBINED, ORACLE = "baseline", "masking+siblings", "oracle"
BOOST, COMBINED_BOOST = "constant-boost", "masking+siblings+boost"
BOOSTED = {BASELINE: BOOST, COMBINED: COMBINED_BOOST}
"""The rows whose predictions are also judged with one constant added to all fresh logits, and what they are then."""
LABELS = {BOOST: "Baseline + constant boost", COMBINED_BOOST: "(4) & (5) + constant boost", ORACLE: "Oracle baseline"}
"""Rows that are not trained under the protocol: predictions of the baseline moved, and the baseline on other rows."""
MAIN_PROTOCOL = "sparse"
CANDIDATES = 6
"""Settings tried per row: as many for the baseline as for everybody else."""
TUNED = Path(__file__).with_name("tuned.json")
EVIDENCE_WINDOWS = WindowConfig(train_days=10, calibration_days=1, evaluation_days=3)
EVIDENCE_EVALUATION = EvaluationConfig(lists="user", age_buckets=(), exposure_buckets=())


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    label: str
    overrides: Overrides
    candidates: tuple[Overrides, ...]
    """Laid over ``overrides``; the first is empty: the paper's (or our default) values."""
    like: str | None = None
    """The row whose tuned settings it takes, instead of being tuned itself."""

    def __post_init__(self) -> None:
        if not self.like and (len(self.candidates) != CANDIDATES or self.candidates[0]):
            raise ConfigError(
                f"row '{self.name}': received {len(self.candidates)} candidates, expected {CANDIDATES}, "
                "the first of them empty; every row gets the same number of trials"
            )

    @property
    def techniques(self) -> set[str]:
        return set(self.overrides.get("techniques", {}))


def techniques(**settings: dict[str, Any]) -> Overrides:
    """``{"techniques": settings}``, the form all rows but the baseline have."""
    return {"techniques": settings}


def _grid(**values: dict[str, list[Any]]) -> list[Overrides]:
    """All combinations of the named fields of the named techniques."""
    fields = [(technique, field, tried) for technique, by_field in values.items() for field, tried in by_field.items()]
    combined = []
    for chosen in product(*(tried for _, _, tried in fields)):
        settings: dict[str, dict[str, Any]] = {}
        for (technique, field, _), value in zip(fields, chosen, strict=True):
            settings.setdefault(technique, {})[field] = value
        combined.append(techniques(**settings))
    return combined


_BASELINE = [
    {"training": {"batch_size": 512, "learning_rate": rate}, "model": {"item_age": age}}
    for age, rate in (("raw", 4e-3), ("capped", 4e-3), ("none", 4e-3), ("none", 2e-3), ("none", 8e-3))
]
_DROPOUT = [
    techniques(feature_dropout={"probability": share, "history": history})
    for share, history in ((0.1, "item"), (0.5, "item"), (0.7, "item"), (0.3, "all"), (0.5, "all"))
]
_ALDI = [
    techniques(aldi=change)
    for change in (
        {"history": "user"},
        {"rating_weight": 0.3, "ranking_weight": 0.3},
        {"rating_weight": 3.0, "ranking_weight": 3.0},
        {"half_known": 100.0},
        {"history": "user", "rating_weight": 0.3, "ranking_weight": 0.3},
    )
]
_RESIDUAL = _grid(residual={"dim": [4, 8, 24, 32, 48]})
_SCORE_REG = _grid(score_reg={"weight": [0.01, 0.03, 0.3, 1.0, 3.0]})
_MIXUP = [
    techniques(mixup={"alpha": alpha, "weight": weight})
    for alpha, weight in ((0.2, 0.05), (0.2, 0.5), (0.2, 1.0), (1.0, 0.2), (1.0, 1.0))
]
_RESIDUAL_SCORE_REG = [
    *_grid(residual={"dim": [16]}, score_reg={"weight": [0.03, 0.3, 1.0]}),
    *_grid(residual={"dim": [32]}, score_reg={"weight": [0.1, 0.3]}),
]
_RESIDUAL_MIXUP = [
    *_grid(residual={"dim": [16]}, mixup={"weight": [0.05, 0.5, 1.0]}),
    *_grid(residual={"dim": [32]}, mixup={"weight": [0.2, 0.5]}),
]
_SCORE_REG_MIXUP = [
    *_grid(score_reg={"weight": [0.3]}, mixup={"weight": [0.05, 0.2, 0.5]}),
    *_grid(score_reg={"weight": [0.03, 1.0]}, mixup={"weight": [0.2]}),
]
_ALL = [
    *_grid(score_reg={"weight": [0.3]}, mixup={"weight": [0.05, 0.2, 0.5]}),
    *_grid(score_reg={"weight": [0.03, 1.0]}, mixup={"weight": [0.2]}),
]


_CAPPED: Overrides = {"model": {"item_age": "capped"}}
"""For rows that deliberately show fresh items, so that their age is a number the ranker has seen in training."""
_PARITY: Overrides = {"calibration": {"exposure": "parity"}}
_MASKING = _grid(history_masking={"share": [0.3, 0.5], "unseen": [0.2, 0.6]})
_MASKING.append(techniques(history_masking={"share": 0.7}))
_SIBLINGS = [
    techniques(sibling_prior={"columns": columns})
    for columns in (
        ["author_id"],
        ["tag"],
        ["author_id", "tag", "music_id"],
        ["tag", "video_duration", "tag+video_duration"],
        ["author_id", "tag", "tag+video_duration"],
    )
]
_META = _grid(meta_embedding={"share": [0.1, 0.5], "alignment_weight": [0.0, 0.3]})
_META.append(techniques(meta_embedding={"hidden": 32}))
_PRETRAINING = [
    techniques(pretraining=change)
    for change in (
        {"mask": 0.15},
        {"mask": 0.5},
        {"steps": 50},
        {"learning_rate": 3e-3},
        {"mask": 0.5, "learning_rate": 3e-3},
    )
]


def _row(name: str, label: str, overrides: Overrides, candidates: Iterable[Overrides]) -> Row:
    return Row(name, label, overrides, ({}, *candidates))


_EVERY = (
    _row(BASELINE, "Baseline", {}, _BASELINE),
    _row("feature-dropout", "Feature Dropout", techniques(feature_dropout={}), _DROPOUT),
    _row("aldi", "ALDI", techniques(aldi={}), _ALDI),
    _row("residual", "Residual (1)", techniques(residual={}), _RESIDUAL),
    _row("score-reg", "ScoreReg (2)", techniques(score_reg={}), _SCORE_REG),
    _row("mixup", "Mixup (3)", techniques(mixup={}), _MIXUP),
    _row("residual+score-reg", "(1) & (2)", techniques(residual={}, score_reg={}), _RESIDUAL_SCORE_REG),
    _row("residual+mixup", "(1) & (3)", techniques(residual={}, mixup={}), _RESIDUAL_MIXUP),
    _row("score-reg+mixup", "(2) & (3)", techniques(score_reg={}, mixup={}), _SCORE_REG_MIXUP),
    _row("all-three", "(1) & (2) & (3)", techniques(residual={}, score_reg={}, mixup={}), _ALL),
    _row("pretraining-vime", "Pretraining, VIME", techniques(pretraining={"objective": "vime"}), _PRETRAINING),
    _row(
        "pretraining-contrastive",
        "Pretraining, contrastive",
        techniques(pretraining={"objective": "contrastive"}),
        _PRETRAINING,
    ),
    _row("meta-embedding", "Meta-Embedding", techniques(meta_embedding={}), _META),
    _row("sibling-prior", "Sibling prior (4)", techniques(sibling_prior={}), _SIBLINGS),
    _row("history-masking", "History masking (5)", _CAPPED | techniques(history_masking={}), _MASKING),
    _row(
        "masking+all-three",
        "(1) & (2) & (3) & (5)",
        _CAPPED | techniques(residual={}, score_reg={}, mixup={}, history_masking={}),
        _MASKING,
    ),
    _row(
        "masking+meta+siblings",
        "Meta-Embedding & (4) & (5)",
        _CAPPED | techniques(sibling_prior={}, history_masking={}, meta_embedding={"share": 0.0}),
        _MASKING,
    ),
    _row(COMBINED, "(4) & (5)", _CAPPED | techniques(sibling_prior={}, history_masking={}), _MASKING),
    Row("parity", "Baseline, exposure parity", _PARITY, (), like=BASELINE),
    Row(
        "masking+siblings+parity",
        "(4) & (5), exposure parity",
        _CAPPED | techniques(sibling_prior={}, history_masking={}) | _PARITY,
        (),
        like=COMBINED,
    ),
)
ROWS = {row.name: row for row in _EVERY if row.techniques <= set(TechniquesConfig.model_fields)}
"""By name, in the table's order; a row whose technique this version lacks is not listed."""


def chosen(names: list[str] | None) -> list[Row]:
    """The named rows in the table's order, the baseline always among them; all for None."""
    unknown = sorted(set(names or []) - set(ROWS) - set(LABELS))
    if unknown:
        raise ConfigError(f"--rows: received {unknown}, expected some of {list(ROWS)}")
    return [row for row in ROWS.values() if names is None or row.name in {BASELINE, *names}]


def config_of(
    row: Row, seed: int, *layers: Overrides, windows: WindowConfig = EVIDENCE_WINDOWS, lists: str = "user"
) -> RunConfig:
    """The row's configuration with ``layers`` laid over it, for one seed."""
    tree = RunConfig(recipe=row.name, windows=windows, evaluation=EVIDENCE_EVALUATION).model_dump(mode="json")
    for layer in (row.overrides, *layers, {"training": {"seed": seed}, "evaluation": {"lists": lists}}):
        tree = laid_over(tree, layer)
    return RunConfig.model_validate(tree)


def laid_over(tree: Any, layer: Any) -> Any:
    """``tree`` with the leaves of ``layer`` replaced; a section that was None becomes the layer's."""
    if not isinstance(layer, dict) or not isinstance(tree, dict):
        return layer
    return tree | {name: laid_over(tree.get(name), value) for name, value in layer.items()}


def tuned(protocol: str, path: Path = TUNED) -> dict[str, Overrides]:
    """Winners of `freshrank bench tune` by row, under ``protocol`` or what stands for it; empty without any."""
    winners: dict[str, dict[str, Overrides]] = read_json(path) if path.exists() else {}
    return winners.get(tuned_under(protocol, path), {})


def tuned_under(protocol: str, path: Path = TUNED) -> str:
    """``protocol``, or the main one for a protocol of the same data that was not tuned itself."""
    known = read_json(path) if path.exists() else {}
    return MAIN_PROTOCOL if protocol in PROTOCOLS and protocol not in known else protocol


def layers_of(row: Row, winners: dict[str, Overrides]) -> tuple[Overrides, ...]:
    """The baseline's winning settings hold for all rows, the row's own come on top."""
    base, name = winners.get(BASELINE, {}), row.like or row.name
    return (base,) if name == BASELINE else (base, winners.get(name, {}))
