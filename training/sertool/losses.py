"""The neighbour loss of graph-regularised training (equation 2 of the paper)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return 1.0 - functional.cosine_similarity(a, b, dim=-1)


def _l1(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1)


def _l2(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": _cosine, "l1": _l1, "l2": _l2}
"""As in TensorFlow Neural Structured Learning: 1 - cosine similarity, sum of absolute and of squared differences."""


def neighbour_loss(samples: Tensor, neighbours: Tensor, weights: Tensor, distance: str = "cosine") -> Tensor:
    """Return the mean weighted distance of samples to their neighbours.

    The distances of one sample are averaged over its real neighbours, then over the samples that have any: a clip
    that the graph leaves isolated neither adds to the loss nor thins it out. With one neighbour a sample this is the
    reduction of TensorFlow Neural Structured Learning (sum over non-zero weights).

    Args:
        samples: embeddings (B, D).
        neighbours: embeddings of their neighbours (B, n, D); the values where the weight is 0 do not matter as long
            as they are finite.
        weights: weight of each neighbour (B, n); 0 where there is none.
        distance: a key of :data:`DISTANCES`.

    Returns:
        a scalar; 0 when no sample has a neighbour.

    Example:
        >>> import torch
        >>> samples = torch.tensor([[1.0, 1.0], [3.0, 4.0]])
        >>> neighbours = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])
        >>> float(neighbour_loss(samples, neighbours, torch.tensor([[1.0], [1.0]]), "l1"))
        3.5
    """
    distances = DISTANCES[distance](samples[:, None], neighbours) * weights
    count = (weights != 0).sum(1)
    means = distances.sum(1) / count.clamp(min=1)
    return means.sum() / (count > 0).sum().clamp(min=1)
