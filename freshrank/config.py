"""What is trained, judged and shipped: one typed tree, serialised as JSON, one pipeline parameter per section."""

from collections.abc import Mapping
from datetime import date, timedelta
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from freshrank.dates import days

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


def _ascending(edges: tuple[float, ...]) -> tuple[float, ...]:
    if any(low >= high for low, high in pairwise(edges)):
        raise ValueError("expected bucket edges in ascending order, each once")
    return edges


Ascending = AfterValidator(_ascending)
AGE_BUCKETS = (1.0, 7.0, 28.0)
"""Days since creation at which the buckets of an item's age end; one more holds the older ones."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WindowConfig(Section):
    """How many days are trained on, calibrated on and judged, ending the day before the run's date."""

    train_days: Positive = 27
    """Days that weights are learned from."""
    calibration_days: Positive = 1
    """Days after those, on which Platt scaling is fitted."""
    evaluation_days: Positive = 1
    """The last days, on which the gate compares challenger and champion."""

    def split(self, run_date: date) -> "Split":
        """On day D with the defaults: train up to D-3, calibrate on D-2, judge D-1."""
        evaluation = run_date - timedelta(days=self.evaluation_days)
        calibration = evaluation - timedelta(days=self.calibration_days)
        train = calibration - timedelta(days=self.train_days)
        one = timedelta(days=1)
        return Split(
            train=tuple(days(train, calibration - one)),
            calibration=tuple(days(calibration, evaluation - one)),
            evaluation=tuple(days(evaluation, run_date - one)),
        )


class Split(Section):
    """Disjoint days in time order: training before calibration before evaluation."""

    train: tuple[date, ...]
    calibration: tuple[date, ...]
    evaluation: tuple[date, ...]


class Severity(StrEnum):
    BLOCKING = "blocking"
    """A failure stops the run before training."""
    WARNING = "warning"


def _severity(value: object) -> object:
    if value not in (*Severity, "off"):
        raise PydanticCustomError("severity", "expected 'blocking', 'warning' or 'off'")
    return value


class ValidationConfig(Section):
    """How far a day may deviate from the days before it, and what a failed expectation leads to."""

    trailing_days: Positive = 7
    """Days before the validated one that make the reference; those the log lacks are left out."""
    warn_factor: Annotated[float, Field(gt=1)] = 2.0
    block_factor: Annotated[float, Field(gt=1)] = 5.0
    """A value must lie within ``reference / factor .. reference * factor``: volume and positive rates; the share of
    fresh items (a launch may raise it) and positives of the late hours are blocked downwards only."""
    warn_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9
    block_coverage: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of filled values, as a part of the reference's share."""
    min_cohort: Positive = 20
    """Coverage of fewer rows is judged by an exact test; where the reference has fewer it is shown and not judged."""
    min_positives: Positive = 1
    """Positives that each action must have on the day."""
    min_known_items: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Least share of impressions whose item is in the items table."""
    age_buckets: Annotated[tuple[float, ...], Ascending] = AGE_BUCKETS
    """Content coverage is judged in each of these by itself."""
    late_hours: Annotated[float, Field(gt=0, lt=24)] = 6.0
    """The end of the day, whose labels a join that runs too early has not seen yet."""
    severity: dict[str, Annotated[Severity | Literal["off"], BeforeValidator(_severity)]] = {}
    """By name of an expectation what its failure leads to, in place of what it is made for; off: it is left out. One
    with two bounds (a warning before the block) gets this severity for both."""


class ModelConfig(Section):
    """Sizes of the ranker (paper, figure 5)."""

    item_id_dim: Positive = 16
    """Width of an item id's embedding."""
    categorical_dim: Positive = 8
    """Width of the embedding of every other categorical value."""
    min_count: Positive = 3
    """Values seen less often in training share the trained row for new and rare values."""
    sequence_layers: Annotated[int, Field(ge=1)] = 1
    """Transformer blocks over the user's sequence."""
    sequence_heads: Positive = 2
    """Attention heads of each; they share ``sequence_dim``."""
    sequence_dim: Positive = 32
    """Width of a token."""
    group_dim: Positive = 32
    """Width every feature group is summarised to before the crossing."""
    cross_layers: Annotated[int, Field(ge=1)] = 2
    """Layers of DCNv2."""
    cross_rank: Positive = 32
    """Rank of each layer's weight matrix."""
    mlp: tuple[Positive, ...] = (128, 64)
    """Hidden widths of the interaction module's MLP; the last is the width of z."""
    experts: Positive = 4
    """Of MMoE; every action weighs them with a gate of its own."""
    expert_dim: Positive = 32
    """Width of each expert."""
    head_dim: Positive = 16
    """Hidden width of the head of each action."""
    dropout: Probability = 0.0
    """In the transformer and in the interaction module's MLP, while training."""
    item_age: Literal["raw", "capped", "none"] = "raw"
    """How an item's age enters the ranker: standardised days, days capped at ``fresh_days``, or not at all.

    Where warm items share a birthday their age is a calendar, and ``raw`` extrapolates from it (docs/decisions.md).
    """


class ResidualConfig(Section):
    """y = F([z; x_nh]) (eq. 3): x_nh is reduced to ``dim`` by one layer."""

    dim: Positive = 16


class ScoreRegConfig(Section):
    """Squared difference of warm and cold mean predictions (eq. 6), times ``weight`` (lambda_2)."""

    weight: Annotated[float, Field(gt=0)] = 0.1


class MixupConfig(Section):
    """Manifold mixup after I (eq. 7-9), loss times ``weight`` (lambda_1), lambda ~ Beta(alpha, alpha)."""

    alpha: Annotated[float, Field(gt=0)] = 0.2
    weight: Annotated[float, Field(gt=0)] = 0.2


class FeatureDropoutConfig(Section):
    """History reads as missing with ``probability``: per row for items, per user and batch for users."""

    probability: Annotated[float, Field(gt=0, le=1)] = 0.3
    history: Literal["item", "user", "all"] = "item"


class AldiConfig(Section):
    """A student tower of x_nh answers for cold items; its losses times their weights are added to the objective."""

    history: Literal["none", "user"] = "none"
    """What the student sees beside x_nh: nothing (the paper's section 4.2.2), or the user's history as well, as the
    students of Huang et al. predict from the user's trained vector: a user of a cold item need not be cold."""
    hidden: tuple[Positive, ...] = (192, 80)
    """Of the student; with these it adds about 29% to the default ranker on KuaiRand (the paper: 28.89%)."""
    student_weight: Annotated[float, Field(gt=0)] = 1.0
    """Of the cross-entropy of the student's own predictions."""
    rating_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the alignment of the student's predictions with the teacher's."""
    ranking_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the alignment of the order in which both rank pairs."""
    half_known: Annotated[float, Field(gt=0)] = 10.0
    """Impressions in the longest window at which the teacher has half its weight."""


class HistoryMaskingConfig(Section):
    """History masking: some rows of a batch show their item as it would have looked when it was fresh."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the rows that are masked."""
    unseen: Probability = 0.4
    """Share of the masked rows with no impression at all, as for an item that was just created."""
    keep: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.001, 0.05)
    """Bounds of the log-uniform share of its impressions that a masked item keeps."""


class SiblingPriorConfig(Section):
    """An item's siblings (the schema's ``history.siblings``) say what it may be expected to do: their rates, without
    its own, shrunk to the rate of all, are features that a new item has too."""

    columns: tuple[str, ...] | None = None
    """Which entries of ``history.siblings`` are read; None: all."""


class MetaEmbeddingConfig(Section):
    """Items without an id row of their own get one generated from their content; g has one hidden layer."""

    hidden: Positive = 16
    alignment_weight: Annotated[float, Field(ge=0)] = 0.1
    """Of the squared distance of what is generated for known items from their trained embedding; 0 switches it off."""
    share: Probability = 0.3
    """Of item ids hidden in training beside ``training.new_item_probability``: the rows the generator learns from."""


class PretrainingConfig(Section):
    """The item's content embeddings are trained on the items of the training days before the first epoch."""

    objective: Literal["vime", "contrastive"] = "vime"
    steps: Positive = 100
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    hidden: Positive = 32
    """Width of the encoder that is thrown away afterwards."""
    mask: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """vime: share of fields corrupted; contrastive: share of fields the first view lacks, the second lacks the rest."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """contrastive only."""
    correlated: bool = True
    """contrastive only: fields that tell much of each other are masked together."""


class TechniquesConfig(Section):
    """None means off, and off is bit-identical to the technique never having existed."""

    residual: ResidualConfig | None = None
    score_reg: ScoreRegConfig | None = None
    mixup: MixupConfig | None = None
    feature_dropout: FeatureDropoutConfig | None = None
    aldi: AldiConfig | None = None
    history_masking: HistoryMaskingConfig | None = None
    sibling_prior: SiblingPriorConfig | None = None
    meta_embedding: MetaEmbeddingConfig | None = None
    pretraining: PretrainingConfig | None = None


PLAIN = TechniquesConfig()
"""Every technique off."""


class TrainingConfig(Section):
    epochs: Positive = 1
    batch_size: Positive = 1024
    min_steps: Positive = 100
    """Steps an epoch has at least: on a small log the batch size is halved until it has."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    new_item_probability: Probability = 0.05
    """Share of item ids replaced by the new-item row, so that the row is trained."""
    window_rows: Annotated[int, Field(ge=1000)] = 2_000_000
    """Impressions held and shuffled together; more are read as a stream, with a second window being made ready."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 500
    """Steps between checkpoints, from which a killed training resumes; 0 = no checkpoints."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    """With torch.compile. Which of both pays on a machine, `freshrank bench train` measures."""

    @field_validator("precision", "compile", mode="before")
    @classmethod
    def _of_older_releases(cls, value: object, info: ValidationInfo) -> object:
        """Their "auto" measured what is fastest, and what lies in bundles says so; now it is the default."""
        return cls.model_fields[str(info.field_name)].default if value == "auto" else value


class CalibrationConfig(Section):
    """Platt scaling per action on the calibration days."""

    min_positives: Positive = 10
    """Positives of each action without which no calibration is fitted."""
    exposure: Literal["as_is", "parity"] = "as_is"
    """parity: one constant on the logits of fresh items gives them their share of the top slots
    (export/exposure_parity.py)."""
    top: Positive = 3
    """How many slots of a list parity is about."""
    max_fresh_shift: Annotated[float, Field(ge=0)] = 0.25
    """Bound on parity's constant, in logits either way: exposure is corrected only as far as calibration allows."""


class EvaluationConfig(Section):
    k: Positive = 3
    """How many slots Hits@k and NDCG@k look at."""
    lists: Literal["request", "user"] = "request"
    """What is ranked together: a request, or all a user saw on the evaluation days (logs without request ids)."""
    min_candidates: Positive = 4
    """Shorter lists are not ranked; their rows count in log loss, areas and calibration."""
    age_buckets: Annotated[tuple[float, ...], Ascending] = AGE_BUCKETS
    """Edges in days between the slices by item age."""
    exposure_buckets: Annotated[tuple[int, ...], Ascending] = (0, 10, 100, 1000)
    """Edges between the slices by impressions since birth."""
    warm_up_buckets: Annotated[tuple[int, ...], Ascending] = (0, 3, 10, 30, 100, 300, 1000)
    """Upper ends, in impressions since birth, of the buckets of the warm-up curve; one more holds the rest."""
    warm_up_draws: Annotated[int, Field(ge=20)] = 200
    """Draws of items behind every interval of the warm-up curve and of the log loss of the threshold sweep."""
    fresh_thresholds: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Further ages in days below which an item counts as fresh, swept beside the schema's ``fresh_days``.

    None: half and double of it; an empty list: no further one.
    """
    bootstrap: Annotated[int, Field(ge=20)] = 1000
    """Draws of lists behind every interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Coverage of the intervals."""
    ece_bins: Positive = 15
    """Equal-mass bins of the expected calibration error."""
    seed: int = 0
    """Of all draws, and of how ties in a list are broken."""


class GateConfig(Section):
    """Bounds a challenger must meet against the served model; evaluation/gate.py says what each outcome leads to."""

    fresh_margin: Annotated[float, Field(ge=0)] = 0.0
    """Fresh Hits@k may be lower than the champion's by at most this (absolute, point estimate).

    At 0 a challenger as good as the champion passes every second day; above 0 daily retraining may ratchet fresh
    quality down by this much a day.
    """
    overall_margin: Annotated[float, Field(ge=0)] = 0.02
    """The lower end of the interval of the difference in overall Hits@k must exceed minus this value (absolute)."""
    max_ece: Probability = 0.10
    """On fresh and on warm rows, per action."""
    max_calibration_ratio: Annotated[float, Field(gt=1)] = 2.0
    """Mean prediction / observed rate on fresh and on warm rows must lie within [1 / this, this], per action: an
    absolute bound on ECE says nothing about an action of 1% of rows."""
    max_score_gap: Probability = 0.30
    """Bound on |mean warm - mean fresh| / mean warm of predictions on positives, per action."""
    max_pr_auc: Probability = 0.99
    """No engagement ranker is this good on unseen rows: a higher value means that a label has leaked."""
    min_lists: Positive = 100
    """Lists that hold an action with utility; fewer prove nothing about all items."""
    min_fresh_lists: Positive = 30
    """Lists that hold such an action on a fresh item."""
    min_positives: Positive = 10
    """Rows with an action that its calibration and score gap must rest on, per slice."""
    max_parameter_increase: Annotated[float, Field(ge=0)] = 0.05


class RunConfig(Section):
    """Everything that decides which model a day produces and whether it serves."""

    recipe: str = "baseline"
    windows: WindowConfig = WindowConfig()
    validation: ValidationConfig = ValidationConfig()
    model: ModelConfig = ModelConfig()
    techniques: TechniquesConfig = TechniquesConfig()
    training: TrainingConfig = TrainingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()


def parse_sections(parameters: Mapping[str, str]) -> dict[str, Any]:
    """``parameters`` of a process elsewhere: those named like a section of :class:`RunConfig` hold it as JSON."""
    sections = {name: type(value) for name, value in RunConfig() if isinstance(value, Section)}
    return {
        name: sections[name].model_validate_json(text) if name in sections else text
        for name, text in parameters.items()
    }


def age_names(edges: tuple[float, ...]) -> list[str]:
    """``0-1``, ``1-7``, ``7+`` for the ends (1, 7)."""
    inner = [f"{low:g}-{high:g}" for low, high in zip((0.0, *edges), edges, strict=False)]
    return [*inner, f"{edges[-1]:g}+" if edges else "0+"]


def exposure_names(edges: tuple[int, ...]) -> list[str]:
    """``0``, ``1-10``, ``11+`` for the upper ends (0, 10)."""
    lows = [0, *(edge + 1 for edge in edges)]
    inner = [f"{low}" if low == high else f"{low}-{high}" for low, high in zip(lows, edges, strict=False)]
    return [*inner, f"{lows[-1]}+"]
