"""What a student is taught by its teacher: the targets, and what a training step makes of them.

The teacher's view of the training clips is their embeddings, as ``sertool embed`` made them. Its opinion of their
labels is that of small heads on the embeddings, each trained on speakers other than those it judges: a head knows its
own training clips by heart, and would only repeat their labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor, nn

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FloatArray
from sertool.augment import Mixture
from sertool.corpora.manifest import Clip, Manifest
from sertool.corpora.splits import Fold
from sertool.losses import embedding_loss, opinion_loss, relation_loss
from sertool.recipe import Distillation, Recipe
from sertool.teacher.embed import load_embeddings

HEADS = 10
"""At most so many heads share the training speakers out among them: with up to ten, each judges one speaker."""

HEAD_STRENGTH = 0.01
"""Weight of a head's errors against its squared weights (scikit-learn's C): embeddings have more dimensions than a
small corpus has clips."""


@dataclass(frozen=True)
class TeacherView:
    """How a teacher sees the training clips.

    Attributes:
        vectors: float32 (D,) of each clip, which may be mapped from disk.
        mean: float64 (D,), over these clips.
        deviation: float64 (D,), of the vectors; 1 where they never change.
        record: for the run folder: ``teacher``, ``seen`` (speakers of the fold whom it was trained on, by part; None
            where nobody knows) and ``sha256`` of its embeddings of these clips.
    """

    vectors: Sequence[FloatArray]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    record: dict[str, Any]

    @classmethod
    def of(cls, vectors: Sequence[FloatArray], record: dict[str, Any]) -> TeacherView:
        """Measure how vectors (N, D) are distributed, one by one: they may be more than memory holds."""
        start = np.zeros(len(vectors[0]))
        mean = sum((vector.astype(np.float64) for vector in vectors), start) / len(vectors)
        variance = sum((np.square(vector - mean) for vector in vectors), start) / len(vectors)
        return cls(vectors, mean, np.where(variance == 0, 1, np.sqrt(variance)), record)

    def standardised(self, rows: Iterable[int]) -> FloatArray:
        """Return the vectors of some clips, float32 (n, D), with mean 0 and deviation 1 over all clips.

        Embeddings of speech models share a large common part, which would drown what tells clips apart. A dimension
        that never changes is 0.

        Example:
            >>> TeacherView.of(np.array([[1, 5, 3], [3, 5, 7]], np.float32), {}).standardised([0, 1]).tolist()
            [[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0]]
        """
        exact = (np.stack([self.vectors[row] for row in rows]) - self.mean) / self.deviation
        return exact.astype(np.float32)


def load_view(recipe: Recipe, manifest: Manifest, fold: Fold, rows: Sequence[int], allow_seen: bool) -> TeacherView:
    """Read the embeddings of the training clips; those of all others are left alone.

    Args:
        recipe: names the embeddings' folder.
        manifest: the corpus.
        fold: that is trained.
        rows: of the training clips in the manifest.
        allow_seen: take a teacher that was trained on speakers of the split.

    Raises:
        UsageError: no embeddings folder, one that lacks a training clip, or a teacher that was trained on a speaker of
            the split.
        SerError: a damaged folder.
        AudioError: the file of a clip is missing.
    """
    embeddings = load_embeddings(recipe.distillation.embeddings)
    seen = embeddings.seen_speakers(manifest, fold)
    if not allow_seen:
        embeddings.refuse_seen(seen, recipe.data.parts, recipe.data.fold)
    vectors = embeddings.rows_of(replace(manifest, clips=tuple(manifest.clips[row] for row in rows)))
    digest = hashlib.sha256()
    for vector in vectors:
        digest.update(vector.tobytes())
    record = {
        "teacher": embeddings.teacher,
        "seen": None if embeddings.heard_audio is None else seen,
        "sha256": digest.hexdigest(),
    }
    return TeacherView.of(vectors, record)


def out_of_fold_logits(vectors: FloatArray, clips: Sequence[Clip], labels: Sequence[str]) -> FloatArray:
    """Return what heads on the embeddings answer, each asked only about speakers it was not trained on.

    Args:
        vectors: float32 (N, D), standardised embeddings of the clips.
        clips: that are trained on (N,); heads learn from those with a label, and judge all.
        labels: in the order of the logits.

    Returns:
        float32 (N, classes) logits.

    Raises:
        UsageError: a label that no other speakers have than those a head is to judge.
    """
    truth = np.array([labels.index(clip.label) if clip.label else -1 for clip in clips])
    logits = np.empty((len(clips), len(labels)), np.float32)
    speakers = sorted({clip.speaker for clip in clips})
    for number in range(min(HEADS, len(speakers))):
        group = speakers[number::HEADS]
        judged = np.array([clip.speaker in group for clip in clips])
        taught = ~judged & (truth >= 0)
        if missing := sorted(set(range(len(labels))) - set(truth[taught])):
            raise UsageError(
                f"distillation.logit_weight: only {', '.join(group)} can teach {labels[missing[0]]!r}, so no head that "
                "was trained on other speakers knows it; set it to 0, or train on more speakers"
            )
        weights, biases = fit_head(vectors[taught], truth[taught], len(labels))
        logits[judged] = vectors[judged] @ weights + biases
    return logits


def fit_head(
    vectors: FloatArray, truth: NDArray[np.int64], classes: int, strength: float = HEAD_STRENGTH
) -> tuple[FloatArray, FloatArray]:
    """Fit multinomial logistic regression whose labels all weigh the same, however many clips each has.

    The minimum of ``strength`` times the weighted sum of cross entropies plus half the sum of squared weights, which is
    scikit-learn's ``LogisticRegression(C=strength, class_weight="balanced")``.

    Args:
        vectors: float32 (N, D).
        truth: (N,) classes, each of which occurs.
        classes: how many there are.
        strength: of the errors against the penalty.

    Returns:
        weights float32 (D, classes) and biases (classes,).

    Example:
        >>> weights, biases = fit_head(np.array([[-1.0], [1.0]], np.float32), np.array([0, 1]), 2)
        >>> np.argmax(np.array([[-3.0], [3.0]]) @ weights + biases, axis=1).tolist()
        [0, 1]
    """
    inputs = np.column_stack([vectors, np.ones(len(vectors))]).astype(np.float64)  # the last weight is the bias
    wanted = np.eye(classes)[truth]
    counts = np.bincount(truth, minlength=classes)
    importance = strength * (len(truth) / (classes * counts))[truth][:, None]

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(-1, classes)
        penalised = np.vstack([weights[:-1], np.zeros(classes)])
        log_shares = log_softmax(inputs @ weights, axis=1)
        loss = 0.5 * np.sum(penalised**2) - np.sum(importance * wanted * log_shares)
        gradient = penalised + inputs.T @ (importance * (np.exp(log_shares) - wanted))
        return float(loss), gradient.ravel()

    start = np.zeros(inputs.shape[1] * classes)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    weights = found.x.reshape(-1, classes).astype(np.float32)
    return weights[:-1], weights[-1]


class Distiller(nn.Module):
    """The teacher in a training step.

    Args:
        settings: the weights of the terms.
        view: of the training clips.
        clips: these clips.
        labels: in the order of the logits.
        channels: of the student's pooled features.

    Attributes:
        projection: maps pooled features to embeddings; learnt with the student, and thrown away with the training.

    Raises:
        UsageError: see :func:`out_of_fold_logits`.
    """

    opinions: Tensor

    def __init__(
        self, settings: Distillation, view: TeacherView, clips: Sequence[Clip], labels: Sequence[str], channels: int
    ) -> None:
        super().__init__()
        logits = np.zeros((len(clips), len(labels)), np.float32)
        if settings.logit_weight:
            logits = out_of_fold_logits(view.standardised(range(len(clips))), clips, labels)
        self._settings = settings
        self._view = view
        # What is made anew from the embeddings need not be kept to resume.
        opinions = torch.from_numpy(logits / settings.temperature).softmax(1)
        self.register_buffer("opinions", opinions, persistent=False)
        self.projection = nn.Linear(channels, len(view.mean))

    def loss(self, rows: Tensor, mixture: Mixture | None, pooled: Tensor, logits: Tensor) -> Tensor:
        """Return the weighted sum of what the recipe distils, in float32.

        Args:
            rows: training clips in the batch (B,).
            mixture: of the batch, which mixes its targets too.
            pooled: features of the student (B, channels).
            logits: of the student (B, classes).
        """
        settings = self._settings
        embeddings = torch.from_numpy(self._view.standardised(rows.tolist())).to(pooled.device)
        opinions = self.opinions[rows]
        if mixture:
            embeddings, opinions = mixture.mix(embeddings), mixture.mix(opinions)
        pooled, total = pooled.float(), torch.zeros((), device=pooled.device)
        if settings.embedding_weight:
            total = total + settings.embedding_weight * embedding_loss(self.projection(pooled), embeddings)
        if settings.relation_weight:
            total = total + settings.relation_weight * relation_loss(pooled, embeddings)
        if settings.logit_weight:
            total = total + settings.logit_weight * opinion_loss(logits.float(), opinions, settings.temperature)
        return total
