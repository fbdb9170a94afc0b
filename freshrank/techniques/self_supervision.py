"""Self-supervised pretraining of content embeddings on the items alone, before the first label is looked at.

Two objectives: detecting and reconstructing corrupted fields (Yoon et al. 2020, "VIME"), and recognising an item by two
views of its content (Yao et al., CIKM 2021, "Self-supervised learning for large-scale item recommendations"). Only the
embeddings are kept; what is trained beside them is thrown away.

An item is a list of fields: an integer field (categories, [B] or [B, width]) is an embedding's, a float field
(numbers, vectors) is a number's; row i of every field is item i. ``embed`` turns fields into one vector [B, d_f] each.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, normalize

Fields = Sequence[Tensor]
Embed = Callable[[Fields], Sequence[Tensor]]


class Objective(Protocol):
    """A loss of items, with modules of its own."""

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def __call__(self, embed: Embed, fields: Fields, generator: torch.Generator | None) -> Tensor: ...


class Vime(nn.Module):
    """Which fields were corrupted, and what the original was: one encoder, one head for each question.

    Loss = cross-entropy of the mask + mean reconstruction loss of the fields. An integer field is reconstructed by
    choosing among the values of the batch (the choices are the embeddings themselves), a float field by its vector.
    """

    def __init__(self, widths: Sequence[int], hidden: int, share: float) -> None:
        super().__init__()
        self.widths, self.share = list(widths), share
        self.encoder = nn.Sequential(nn.Linear(sum(widths), hidden), nn.ReLU())
        self.mask = nn.Linear(hidden, len(widths))
        self.reconstruct = nn.Linear(hidden, sum(widths))

    def forward(self, embed: Embed, fields: Fields, generator: torch.Generator | None = None) -> Tensor:
        """A scalar."""
        corrupted, changed = corrupt(fields, self.share, generator)
        hidden = self.encoder(torch.cat(list(embed(corrupted)), dim=-1))
        mask_loss = binary_cross_entropy_with_logits(self.mask(hidden), changed.to(hidden.dtype))
        guesses = self.reconstruct(hidden).split(self.widths, dim=-1)
        reconstruction_losses = [reconstruction(*one) for one in zip(guesses, fields, embed(fields), strict=True)]
        return mask_loss + torch.stack(reconstruction_losses).mean()


class Contrastive(nn.Module):
    """Two views of each item, whose masked fields complement each other, through one encoder; :func:`info_nce`.

    ``information`` [F, F] masks fields together that tell much of each other (the paper's correlated feature masking);
    without it they are drawn alone.
    """

    def __init__(
        self, widths: Sequence[int], hidden: int, share: float, temperature: float, information: Tensor | None = None
    ) -> None:
        super().__init__()
        self.share, self.temperature, self.information = share, temperature, information
        self.encoder = nn.Sequential(nn.Linear(sum(widths), hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self, embed: Embed, fields: Fields, generator: torch.Generator | None = None) -> Tensor:
        """A scalar; 0 where the batch is a single item."""
        vectors = embed(fields)
        masked = masked_fields(len(vectors), self.share, generator, self.information)
        first, second = (
            self.encoder(torch.cat([x * visible for x, visible in zip(vectors, view, strict=True)], dim=-1))
            for view in ((~masked).tolist(), masked.tolist())
        )
        return info_nce(first, second, self.temperature)


def corrupt(fields: Fields, share: float, generator: torch.Generator | None = None) -> tuple[list[Tensor], Tensor]:
    """Each field of each item, with probability ``share``, becomes that of another, random item.

    Returns:
        (corrupted fields, changed): changed is bool [B, F], False as well where the other item has the same value.
    """
    size, device = len(fields[0]), fields[0].device
    drawn = (torch.rand(size, len(fields), generator=generator) < share).to(device)
    donors = torch.stack([torch.randperm(size, generator=generator) for _ in fields], dim=1).to(device)
    corrupted = [
        torch.where(drawn[:, f].reshape(-1, *(1,) * (x.dim() - 1)), x[donors[:, f]], x) for f, x in enumerate(fields)
    ]
    return corrupted, torch.stack([_differs(a, b) for a, b in zip(fields, corrupted, strict=True)], dim=1)


def reconstruction(guess: Tensor, field: Tensor, vector: Tensor) -> Tensor:
    """How far ``guess`` [B, d] is from the field [B, ..] embedded as ``vector`` [B, d]; a scalar.

    An integer field: cross-entropy of choosing its value among those of the batch, scored by ``guess @ vector``. A
    float field: mean squared difference from the vector, which is held constant.
    """
    if field.is_floating_point():
        return mse_loss(guess, vector.detach())
    place = _numbered(field)
    rows = torch.arange(len(field), device=field.device)
    example = place.new_zeros(int(place.max()) + 1).scatter_reduce(0, place, rows, "amin", include_self=False)
    return cross_entropy(guess @ vector[example].T, place)


def masked_fields(
    count: int, share: float, generator: torch.Generator | None = None, information: Tensor | None = None
) -> Tensor:
    """Which of ``count`` fields one view lacks, bool [count]: a ``share`` of them, at least one and never all.

    With ``information`` [count, count] a random field and those that share the most with it.
    """
    lacking = min(max(1, round(share * count)), max(1, count - 1))
    order = torch.randperm(count, generator=generator)
    if information is not None:
        nearness = information[order[0]].clone()
        nearness[order[0]] = torch.inf
        order = nearness.argsort(descending=True, stable=True)
    masked = torch.zeros(count, dtype=torch.bool)
    masked[order[:lacking]] = True
    return masked


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of finding each row's other view among all of the batch, by cosine / temperature; a scalar.

    first, second: [B, d], row i of both of item i.
    """
    scores = normalize(first, dim=-1) @ normalize(second, dim=-1).T / temperature
    return cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def mutual_information(fields: Fields, bins: int = 8) -> Tensor:
    """How much fields tell of each other, in nats: [F, F] on the CPU; float fields by ``bins`` equally full bins."""
    codes = [_codes(x.cpu(), bins) for x in fields]
    single = torch.stack([_entropy(code) for code in codes])
    joint = torch.zeros(len(codes), len(codes))
    for i, a in enumerate(codes):
        for j, b in enumerate(codes[: i + 1]):
            joint[i, j] = joint[j, i] = _entropy(a * (b.max() + 1) + b)
    return (single[:, None] + single[None, :] - joint).clamp(min=0)


def pretrain(
    objective: Objective,
    embed: Embed,
    fields: Fields,
    embeddings: Iterable[nn.Parameter],
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Train ``embeddings`` (what ``embed`` looks up) and the objective's own modules; the losses, one per step.

    In front of another training loop: ``pretrain(Vime([8, 8, 2], 32, 0.3), embed, fields, table.parameters(), 150,
    128, 0.01)``, where ``fields`` holds one row per item, of items known by the end of the training window only.
    """
    optimizer = torch.optim.Adam([*embeddings, *objective.parameters()], lr=learning_rate, fused=True)
    losses = []
    for rows in _batches(len(fields[0]), batch_size, steps, generator):
        rows = rows.to(fields[0].device)
        loss = objective(embed, [x[rows] for x in fields], generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def _batches(items: int, size: int, steps: int, generator: torch.Generator | None) -> Iterable[Tensor]:
    """Every item once before any comes again; full batches, where there are that many items."""
    size = min(size, items)
    rounds = -(-steps * size // items)
    order = torch.cat([torch.randperm(items, generator=generator) for _ in range(rounds)])
    batches: Sequence[Tensor] = order[: steps * size].split(size)
    return batches


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Rows that differ, bool [B]; NaN equals NaN."""
    different = (a != b) & ~(a.isnan() & b.isnan())
    return different.reshape(len(a), -1).any(1)


def _codes(field: Tensor, bins: int) -> Tensor:
    """Values as numbers from 0 on, int64 [B]."""
    if field.is_floating_point():
        flat = field.reshape(len(field), -1)[:, 0].contiguous()
        edges = flat.nanquantile(torch.linspace(0, 1, bins + 1)[1:-1]) if flat.isfinite().any() else flat[:0]
        return torch.where(flat.isnan(), bins, torch.bucketize(flat, edges))
    return _numbered(field)


def _numbered(field: Tensor) -> Tensor:
    """Equal values of an integer field [B] or [B, width] as equal numbers from 0 on, int64 [B]."""
    single = field.numel() == len(field)  # much faster than rows are
    numbers: Tensor = torch.unique(
        field.flatten() if single else field, dim=None if single else 0, return_inverse=True
    )[1]
    return numbers


def _entropy(codes: Tensor) -> Tensor:
    counts: Tensor = torch.unique(codes, return_counts=True)[1]
    share = counts / len(codes)
    return -(share * share.log()).sum()
