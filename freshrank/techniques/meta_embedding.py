"""Id embeddings made from content, for items without a trained one (Pan et al., SIGIR 2019, "Warm up cold-start
advertisements").

The paper trains its generator by a second-order loss over pairs of mini-batches. Here it learns end to end from the
rows whose id is new or hidden (the cold phase) and, by a first-order loss, from the embeddings other items have been
trained to (:func:`alignment`).
"""

import torch
from torch import Tensor, nn


class IdGenerator(nn.Module):
    """Embedding of a new item = row of the new items + g(content).

    g ends in zeros: before training, every new item has the row of the new items, as without a generator. It passes no
    gradient to what made the content vector, which stays what the ranker makes of it.
    """

    def __init__(self, content_dim: int, id_dim: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, id_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(content_dim, hidden), nn.ReLU(), last)

    def generate(self, content: Tensor) -> Tensor:
        """g(content): [B, content_dim] -> [B, id_dim]."""
        generated: Tensor = self.layers(content.detach())
        return generated

    def forward(self, embedded: Tensor, content: Tensor, new: Tensor) -> Tensor:
        """What takes the place of ``embedded``; known items keep theirs.

        In another ranker: ``e = generator(table(item_id), content, item_id == NEW)``, with some ids of known items
        replaced by NEW in training.

        Args:
            embedded: rows of the id table, [B, id_dim]; of a new item, the row all new items share.
            content: [B, content_dim].
            new: True where the item has no row of its own, bool [B].
        """
        return torch.where(new.unsqueeze(-1), embedded + self.generate(content), embedded)


def alignment(generated: Tensor, trained: Tensor, known: Tensor) -> Tensor:
    """Mean squared distance of what is generated for known items from their trained embedding.

    In another training loop: ``loss = bce + 0.1 * alignment(table(NEW) + generator.generate(content), table(item_id),
    item_id != NEW)``.

    Args:
        generated: [B, d].
        trained: [B, d]; a constant here, no gradient reaches it.
        known: bool [B]; the other rows do not count.

    Returns:
        A scalar, the squared distance summed over d; exactly 0, with zero gradient, where no row is known.
    """
    weight = known.to(generated.dtype)
    distance = (generated - trained.detach()).square().sum(-1)
    return (distance * weight).sum() / weight.sum().clamp(min=1)
