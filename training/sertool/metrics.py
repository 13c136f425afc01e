"""Metrics of speech emotion recognition and their intervals over speakers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.frontend import FloatArray

IntArray = NDArray[np.int64]


def confusion_matrix(truth: IntArray, predicted: IntArray, classes: int) -> IntArray:
    """Count items by true class (rows) and predicted class (columns).

    Example:
        >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
        array([[1, 1],
               [0, 1]])
    """
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def unweighted_average_recall(confusion: IntArray) -> float:
    """Return the recall of each class averaged over the classes that occur (UAR).

    The recalls come from all items pooled, never averaged over batches or speakers: a class that a batch lacks would
    count as 0 there. Equal to ``sklearn.metrics.balanced_accuracy_score``.

    Args:
        confusion: (classes, classes), true classes in rows.

    Returns:
        UAR in [0, 1]; NaN when there are no items.

    Example:
        >>> unweighted_average_recall(np.array([[3, 1], [0, 2]]))
        0.875
    """
    return float(np.mean(_recalls(confusion))) if confusion.sum() else float("nan")


def accuracy(confusion: IntArray) -> float:
    """Return the share of correct items; NaN when there are none.

    Example:
        >>> accuracy(np.array([[3, 1], [0, 4]]))
        0.875
    """
    total = confusion.sum()
    return float(np.trace(confusion) / total) if total else float("nan")


def _recalls(confusion: IntArray) -> NDArray[np.float64]:
    counts = confusion.sum(axis=1)
    present = counts > 0
    recalls: NDArray[np.float64] = np.diag(confusion)[present] / counts[present]
    return recalls


def recall(confusion: IntArray, row: int) -> float:
    """Return the recall of one class; NaN when it does not occur.

    Example:
        >>> recall(np.array([[3, 1], [0, 2]]), 0)
        0.75
    """
    count = confusion[row].sum()
    return float(confusion[row, row] / count) if count else float("nan")


def speaker_interval(
    confusion_by_speaker: Sequence[IntArray],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    metric: Callable[[IntArray], float] = unweighted_average_recall,
) -> tuple[float, float]:
    """Return an interval of the UAR, or of another metric, by a percentile bootstrap that resamples speakers.

    Clips of one speaker resemble each other, so that resampling clips would promise too narrow an interval; the
    speaker is the sampling unit (see e.g. Bisani and Ney, 2004, on blocks). With fewer than about ten speakers the
    interval is itself rough.

    Args:
        confusion_by_speaker: one confusion matrix a speaker.
        level: share of the draws inside the interval.
        draws: number of resamples.
        seed: of the draws.
        metric: of a confusion matrix; draws of speakers for whom it is NaN are left out.

    Returns:
        lower and upper end; (NaN, NaN) for fewer than two speakers.
    """
    if len(confusion_by_speaker) < 2:
        return float("nan"), float("nan")
    matrices = np.stack(confusion_by_speaker)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(matrices), size=(draws, len(matrices)))
    values = [metric(matrices[draw].sum(axis=0)) for draw in chosen]
    tail = (1.0 - level) / 2.0
    low, high = np.nanquantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class ReliabilityBin:
    """The answers that were given with about one probability.

    Attributes:
        low: smallest probability of the bin, exclusive but for the first.
        high: greatest, inclusive.
        items: how many answers; the other two are 0 where there are none.
        confidence: mean probability of the answers.
        accuracy: share of right ones among them.
    """

    low: float
    high: float
    items: int
    confidence: float
    accuracy: float


def reliability(probabilities: NDArray[np.floating], truth: IntArray, bins: int = 10) -> list[ReliabilityBin]:
    """Compare how sure answers are with how often they are right (Guo et al., 2017).

    Args:
        probabilities: (N, classes).
        truth: (N,) positions of the true classes.
        bins: number of bins of equal width.

    Example:
        >>> sure = reliability(np.array([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1]]), np.array([0, 1, 1]), bins=5)[-1]
        >>> (sure.items, round(sure.confidence, 3), round(sure.accuracy, 3))
        (2, 0.9, 0.5)
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == truth
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    items = np.bincount(place, minlength=bins)
    filled = np.maximum(items, 1)
    mean_confidence = np.bincount(place, confidence, bins) / filled
    accuracies = np.bincount(place, right, bins) / filled
    return [
        ReliabilityBin(
            float(edges[i]), float(edges[i + 1]), int(items[i]), float(mean_confidence[i]), float(accuracies[i])
        )
        for i in range(bins)
    ]


def expected_calibration_error(probabilities: NDArray[np.floating], truth: IntArray, bins: int = 10) -> float:
    """Return by how much answers are right more or less often than they claim, on average over the items (ECE).

    Args:
        probabilities: (N, classes).
        truth: (N,) positions of the true classes.
        bins: see :func:`reliability`.

    Returns:
        ECE in [0, 1]; NaN when there are no items.

    Example:
        >>> round(expected_calibration_error(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1])), 3)
        0.4
    """
    if not len(truth):
        return float("nan")
    return sum(bin.items * abs(bin.accuracy - bin.confidence) for bin in reliability(probabilities, truth, bins)) / len(
        truth
    )


def negative_log_likelihood(probabilities: FloatArray, truth: IntArray) -> float:
    """Return the mean of ``-log p(true label)``, in nats; a probability of 0 counts as float32's smallest.

    Example:
        >>> round(negative_log_likelihood(np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 1])), 4)
        0.4904
    """
    given = probabilities[np.arange(len(truth)), truth].astype(np.float64)
    return float(-np.log(np.maximum(given, np.finfo(np.float32).tiny)).mean())
