"""What a network is trained with: cross entropy, the paper's neighbour loss (equation 2) and distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def labelled_cross_entropy(logits: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of what is labelled in a batch.

    Args:
        logits: (B, classes).
        truth: share of each label (B, classes). A row sums to 1, to 0 for an unlabelled clip, and to the share of the
            labelled one for its mixture with an unlabelled one, which weighs as much less.
        label_smoothing: share of the truth that is spread over all labels.

    Returns:
        a scalar; 0 where nothing is labelled.

    Example:
        >>> truth = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # the second clip is unlabelled
        >>> round(float(labelled_cross_entropy(torch.tensor([[0.0, 0.0], [5.0, -5.0]]), truth)), 4)
        0.6931
    """
    weights = truth.sum(1)
    shares = truth / weights.clamp(min=torch.finfo(truth.dtype).tiny)[:, None]
    errors = functional.cross_entropy(logits, shares, reduction="none", label_smoothing=label_smoothing)
    return (errors * weights).sum() / weights.sum().clamp(min=torch.finfo(truth.dtype).tiny)


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


RELATION_TEMPERATURE = 0.1
"""Cosines are divided by this before they compete for a clip's attention: the smaller, the fewer clips count."""


def embedding_loss(mapped: Tensor, embeddings: Tensor) -> Tensor:
    """Return the mean cosine distance of a student's mapped features to the teacher's embeddings.

    Args:
        mapped: features of the student, mapped to the teacher's dimension (B, D).
        embeddings: of the teacher (B, D).

    Returns:
        a scalar from 0 to 2.

    Example:
        >>> float(embedding_loss(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), torch.tensor([[2.0, 2.0], [5.0, 0.0]])))
        0.5
    """
    return _cosine(mapped, embeddings).mean()


def relation_loss(features: Tensor, embeddings: Tensor, temperature: float = RELATION_TEMPERATURE) -> Tensor:
    """Return how differently student and teacher see which clips of a batch are alike.

    For each clip a softmax over its cosines to the other clips says how it shares its attention; the loss is the
    mean Kullback-Leibler divergence of the student's shares from the teacher's. Relations instead of points are
    distilled by Park et al., "Relational Knowledge Distillation", CVPR 2019; this form of them is that of Abbasi
    Koohpayegani et al., "CompRess", NeurIPS 2020, with the batch itself as the anchor points.

    Args:
        features: of the student (B, C).
        embeddings: of the teacher (B, D); D may differ from C.
        temperature: of both softmaxes.

    Returns:
        a scalar; 0 for fewer than three clips, which have nothing to choose between.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> float(relation_loss(embeddings, embeddings)), float(relation_loss(embeddings.roll(1, 0), embeddings)) > 1
        (0.0, True)
    """
    student, teacher = _attention(features, temperature), _attention(embeddings, temperature)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _attention(vectors: Tensor, temperature: float) -> Tensor:
    """Return the logarithm (B, B - 1) of the shares of each vector's attention to the others."""
    directions = functional.normalize(vectors, dim=1)
    others = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    cosines = (directions @ directions.T)[others].view(len(vectors), len(vectors) - 1)
    return functional.log_softmax(cosines / temperature, dim=1)


def opinion_loss(logits: Tensor, opinions: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence of a student's softened answers from the teacher's (Hinton et al., 2015, section 2).

    Args:
        logits: of the student (B, classes).
        opinions: probabilities (B, classes) from the teacher's logits, divided by the temperature too.
        temperature: the divergence is multiplied by its square, so that gradients stay as large as those of cross
            entropy whatever it is.

    Returns:
        a scalar; 0 where the student is of the teacher's opinion.

    Example:
        >>> opinions = torch.tensor([[0.75, 0.25]])
        >>> abs(float(opinion_loss(2 * opinions.log(), opinions, temperature=2.0))) < 1e-6
        True
    """
    answers = functional.log_softmax(logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(answers, opinions, reduction="batchmean")
