"""Metrics of speech emotion recognition and their intervals over speakers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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


def speaker_interval(
    confusion_by_speaker: Sequence[IntArray], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return an interval of the UAR by a percentile bootstrap that resamples speakers.

    Clips of one speaker resemble each other, so that resampling clips would promise too narrow an interval; the
    speaker is the sampling unit (see e.g. Bisani and Ney, 2004, on blocks). With fewer than about ten speakers the
    interval is itself rough.

    Args:
        confusion_by_speaker: one confusion matrix a speaker.
        level: share of the draws inside the interval.
        draws: number of resamples.
        seed: of the draws.

    Returns:
        lower and upper end of the UAR; (NaN, NaN) for fewer than two speakers.
    """
    if len(confusion_by_speaker) < 2:
        return float("nan"), float("nan")
    matrices = np.stack(confusion_by_speaker)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(matrices), size=(draws, len(matrices)))
    values = [unweighted_average_recall(matrices[draw].sum(axis=0)) for draw in chosen]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)
