"""Named configurations; `freshrank run --recipe NAME`, `--set section.field=value` for a single change."""

import json
from typing import Any

from pydantic import ValidationError

from freshrank.config import (
    AldiConfig,
    CalibrationConfig,
    FeatureDropoutConfig,
    HistoryMaskingConfig,
    MetaEmbeddingConfig,
    MixupConfig,
    ModelConfig,
    PretrainingConfig,
    ResidualConfig,
    RunConfig,
    ScoreRegConfig,
    SiblingPriorConfig,
    TechniquesConfig,
    TrainingConfig,
)
from freshrank.errors import ConfigError

RESIDUAL, SCORE_REG, MIXUP = ResidualConfig(), ScoreRegConfig(), MixupConfig()
TECHNIQUES = {
    "warmer-for-less": TechniquesConfig(residual=RESIDUAL, score_reg=SCORE_REG, mixup=MIXUP),
    "baseline": TechniquesConfig(),
    "residual": TechniquesConfig(residual=RESIDUAL),
    "score-reg": TechniquesConfig(score_reg=SCORE_REG),
    "mixup": TechniquesConfig(mixup=MIXUP),
    "residual-score-reg": TechniquesConfig(residual=RESIDUAL, score_reg=SCORE_REG),
    "residual-mixup": TechniquesConfig(residual=RESIDUAL, mixup=MIXUP),
    "score-reg-mixup": TechniquesConfig(score_reg=SCORE_REG, mixup=MIXUP),
    "feature-dropout": TechniquesConfig(feature_dropout=FeatureDropoutConfig()),
    "aldi": TechniquesConfig(aldi=AldiConfig()),
    "aldi-user": TechniquesConfig(aldi=AldiConfig(history="user")),
    "history-masking": TechniquesConfig(history_masking=HistoryMaskingConfig()),
    "sibling-prior": TechniquesConfig(sibling_prior=SiblingPriorConfig()),
    "meta-embedding": TechniquesConfig(meta_embedding=MetaEmbeddingConfig()),
    "pretraining-vime": TechniquesConfig(pretraining=PretrainingConfig(objective="vime")),
    "pretraining-contrastive": TechniquesConfig(pretraining=PretrainingConfig(objective="contrastive")),
}
"""The rows of the paper's table 1, ALDI with a student that knows the user, and switches beyond the paper."""

YOUNG = RunConfig(
    recipe="masking-siblings",
    model=ModelConfig(item_age="capped"),
    techniques=TechniquesConfig(
        history_masking=HistoryMaskingConfig(share=0.3, unseen=0.6), sibling_prior=SiblingPriorConfig()
    ),
    training=TrainingConfig(batch_size=512, learning_rate=4e-3),
    calibration=CalibrationConfig(exposure="parity"),
)
"""History masking and siblings' rates, settings as tuned on KuaiRand, fresh items with their share of the top slots."""
RECIPES = {YOUNG.recipe: YOUNG} | {
    name: RunConfig(recipe=name, techniques=techniques) for name, techniques in TECHNIQUES.items()
}
DEFAULT_RECIPE = YOUNG.recipe


def recipe(name: str = DEFAULT_RECIPE, overrides: list[str] | None = None) -> RunConfig:
    """The named recipe with ``section.field=value`` overrides (values are JSON, or plain text)."""
    if name not in RECIPES:
        raise ConfigError(f"recipe: received {name!r}, expected one of {sorted(RECIPES)}")
    tree = RECIPES[name].model_dump(mode="json")
    for override in overrides or []:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{where}: received {problem['input']!r}, {problem['msg'].lower()}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    *parents, leaf = path.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        node = {} if node is None else node
    if not separator or not isinstance(node, dict) or (parents and leaf not in node):
        known = sorted(node) if isinstance(node, dict) else []
        raise ConfigError(f"--set {override}: expected section.field=value, with a field of {known}")
    node[leaf] = _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def named(sections: dict[str, Any]) -> str:
    """Name of the recipe whose ``sections`` these are (as JSON), ``custom`` where it is none.

    Those of an older release are compared as this one reads them.
    """
    try:
        config = RunConfig.model_validate(sections)
    except ValidationError:
        return "custom"
    for name, known in RECIPES.items():
        if all(getattr(known, section) == getattr(config, section) for section in sections):
            return name
    return "custom"
