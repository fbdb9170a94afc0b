"""The loss: masked BCE, ScoreReg, Mixup and the alignment of ALDI's student (equations 3 to 9)."""

import functools
import logging

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from freshrank.config import AldiConfig, TechniquesConfig
from freshrank.features.vocabulary import FIRST_KNOWN, NEW
from freshrank.models.ranker import Ranker, Representation
from freshrank.techniques import aldi
from freshrank.techniques.meta_embedding import alignment
from freshrank.techniques.mixup import mixup
from freshrank.techniques.score_reg import score_reg
from freshrank.training.batches import Batch as Batch

log = logging.getLogger(__name__)


def masked_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over actions of the mean binary cross-entropy of the observed labels; labels may be soft. A scalar."""
    observed = ~torch.isnan(labels)
    target = torch.where(observed, labels, torch.zeros_like(labels))
    losses = binary_cross_entropy_with_logits(logits, target, reduction="none") * observed
    return (losses.sum(0) / observed.sum(0).clamp(min=1)).sum()


def objective(
    ranker: Ranker, batch: Batch, techniques: TechniquesConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_BCE + lambda_1 L_BCE(mixed) + lambda_2 L_MMD (eq. 11) + the student's losses, and its parts before weighting.

    ``generator`` is mixup's. A further technique is a further part with its weight.
    """
    representation = ranker.represent(batch.inputs)
    logits = ranker.prediction(representation.z_bar).float()
    parts = {"bce": (1.0, masked_bce(logits, batch.labels))}
    if techniques.mixup:
        z_mix, y_mix = mixup(representation.z_bar, batch.labels, techniques.mixup.alpha, generator)
        parts["mixup"] = techniques.mixup.weight, masked_bce(ranker.prediction(z_mix).float(), y_mix)
    if techniques.score_reg:
        parts["score_reg"] = techniques.score_reg.weight, score_reg(torch.sigmoid(logits), batch.cold)
    if techniques.aldi:
        parts |= _student_parts(ranker, batch, representation, logits, techniques.aldi)
    if techniques.meta_embedding and techniques.meta_embedding.alignment_weight:
        weight = techniques.meta_embedding.alignment_weight
        parts["alignment"] = weight, _alignment(ranker, batch.inputs["item_id"], representation.x_item)
    loss = functools.reduce(torch.add, (weight * part for weight, part in parts.values()))
    return loss, {name: part for name, (_, part) in parts.items()}


def _student_parts(
    ranker: Ranker, batch: Batch, representation: Representation, teacher: Tensor, config: AldiConfig
) -> dict[str, tuple[float, Tensor]]:
    assert ranker.student is not None
    student = ranker.student(representation.x_student).float()
    impressions = batch.inputs["item_numeric"][:, ranker.impressions_column]
    weight = aldi.teacher_weight(impressions, batch.cold, config.half_known)
    rating = aldi.rating_alignment(student, teacher, weight)
    ranking = aldi.ranking_alignment(student, teacher, weight, batch.inputs["user_index"])
    return {
        "student": (config.student_weight, masked_bce(student, batch.labels)),
        "rating": (config.rating_weight, rating),
        "ranking": (config.ranking_weight, ranking),
    }


def _alignment(ranker: Ranker, ids: Tensor, content: Tensor) -> Tensor:
    assert ranker.id_generator is not None
    shared = ranker.item_ids(torch.full_like(ids[:1], NEW))
    generated = shared + ranker.id_generator.generate(content)
    return alignment(generated, ranker.item_ids(ids), ids >= FIRST_KNOWN)
