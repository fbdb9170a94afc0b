"""Aligning distillation for cold items (Huang et al., SIGIR 2023; compared in the paper, section 4.2.2).

A student that sees non-historical features only answers for cold items. It learns from labels and from the teacher,
the ranker itself, on warm items: what the teacher predicts (rating) and in which order (ranking), counted by how well
the teacher knows the item. The teacher learns nothing from the student.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


class Student(nn.Module):
    """A tower of its own from x_nh to one logit per action; it passes no gradient to what made x_nh."""

    def __init__(self, x_nh_dim: int, actions: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [x_nh_dim, *hidden]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
        self.tower = nn.Sequential(*layers, nn.Linear(widths[-1], actions))

    def forward(self, x_nh: Tensor) -> Tensor:
        """x_nh [B, d_nh] -> logits [B, A]."""
        logits: Tensor = self.tower(x_nh.detach())
        return logits


def answer(teacher: Tensor, student: Tensor, cold: Tensor) -> Tensor:
    """What is served, [B, A]: the student's logits where ``cold`` (bool [B]), else the teacher's."""
    return torch.where(cold.unsqueeze(-1), student, teacher)


def teacher_weight(impressions: Tensor, cold: Tensor, half: float) -> Tensor:
    """Weight of the teacher, [B]: n / (n + half) after n impressions of a warm item, 0 on a cold one."""
    return torch.where(cold, 0.0, impressions / (impressions + half))


def rating_alignment(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean divergence of the student's probabilities from the teacher's, summed over actions.

    In another training loop: ``loss = bce + bce(student, y) + a * rating_alignment(student, teacher, weight)
    + b * ranking_alignment(student, teacher, weight)``.

    Args:
        student: logits [B, A].
        teacher: logits [B, A]; a constant here, no gradient reaches it.
        weight: [B], not negative; 0 where the teacher is no guide (cold items).

    Returns:
        A scalar; exactly 0, with zero gradient, where all weights are 0 or the two agree.
    """
    return _mean(_divergence(student, teacher.detach()), weight)


def ranking_alignment(student: Tensor, teacher: Tensor, weight: Tensor, lists: Tensor | None = None) -> Tensor:
    """As :func:`rating_alignment` of "this row before the next one", P = sigmoid of the difference of their logits.

    Args:
        lists: int [B]; only neighbours of one list (a user's, a request's) are compared. Without it every row is
            compared with the next, which in a shuffled batch is a random one.
    """
    teacher, nearest = teacher.detach(), weight * weight.roll(-1)
    if lists is not None:
        nearest = nearest * (lists == lists.roll(-1))
    return _mean(_divergence(student - student.roll(-1, 0), teacher - teacher.roll(-1, 0)), nearest)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of two Bernoulli distributions given by their logits."""
    target = torch.sigmoid(teacher)
    cross, own = (binary_cross_entropy_with_logits(x, target, reduction="none") for x in (student, teacher))
    return cross - own


def _mean(losses: Tensor, weight: Tensor) -> Tensor:
    total = weight.sum()
    total = torch.where(total > 0, total, 1.0)  # a tiny floor would overflow in the gradient of a loss with a weight
    return (losses * weight.unsqueeze(-1)).sum() / total
