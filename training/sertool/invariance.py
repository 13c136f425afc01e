"""Features that tell emotions but not who speaks, or not which corpus: an adversary whose gradient is reversed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.errors import UsageError
from sertool.augment import Mixture
from sertool.corpora.join import corpus_of
from sertool.corpora.manifest import Clip
from sertool.losses import labelled_cross_entropy
from sertool.recipe import Invariance

HIDDEN_UNITS = 64
"""Of the adversary, which is no linear map: what hides from one may be plain to the layers that follow."""

STEEPNESS = 10.0
"""Of the adversary's rise; equation 14 of Ganin et al. (2016) calls it gamma."""


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, features: Tensor, strength: float) -> Tensor:
        context.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -context.strength * gradients[0], None


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """Return the features as they are; their gradient comes back times ``-strength``.

    The gradient reversal layer of Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015.

    Example:
        >>> features = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> reverse_gradient(features, 0.5).sum().backward()
        >>> features.grad
        tensor([-0.5000, -0.5000])
    """
    reversed_later: Tensor = _Reversal.apply(features, strength)  # type: ignore[no-untyped-call]
    return reversed_later


def adversary_strength(done: float) -> float:
    """Return how much of the adversary's gradient the network feels: nothing at first, while it guesses, all at last.

    Equation 14 of Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016.

    Args:
        done: share of the training that lies behind, from 0 to 1.

    Example:
        >>> [round(adversary_strength(done), 3) for done in (0.0, 0.1, 0.5, 1.0)]
        [0.0, 0.462, 0.987, 1.0]
    """
    return math.tanh(STEEPNESS * done / 2)


class Adversary(nn.Module):
    """Tells speakers, or corpora, from the network's features, which learn to defeat it.

    Domain-adversarial training (Ganin et al., 2016). For emotion in speech: across corpora, Abdelwahab and Busso,
    "Domain Adversarial for Acoustic Emotion Recognition", IEEE/ACM TASLP 2018; across speakers, Li et al.,
    "Speaker-invariant Affective Representation Learning via Adversarial Training", ICASSP 2020. It needs no labels of
    emotion.

    Args:
        settings: what the features are to hide, and at what weight.
        clips: that are trained on (N,).
        channels: of the network's pooled features.

    Raises:
        UsageError: all clips are of one speaker, or of one corpus.
    """

    domains: Tensor

    def __init__(self, settings: Invariance, clips: Sequence[Clip], channels: int) -> None:
        super().__init__()
        domains = [clip.speaker if settings.to == "speaker" else corpus_of(clip) for clip in clips]
        names = sorted(set(domains))
        if len(names) < 2:
            advice = "; join several with: sertool corpus join" if settings.to == "corpus" else ""
            raise UsageError(
                f"invariance.to = {settings.to!r}: all training clips are of one {settings.to}, so there is nothing to "
                f"hide{advice}; or set invariance.weight to 0"
            )
        self._weight = settings.weight
        # What is made anew from the clips need not be kept to resume.
        truth = torch.tensor([[domain == name for name in names] for domain in domains], dtype=torch.float32)
        self.register_buffer("domains", truth, persistent=False)
        self.classifier = nn.Sequential(
            nn.Linear(channels, HIDDEN_UNITS), nn.ReLU(), nn.Linear(HIDDEN_UNITS, len(names))
        )

    def loss(self, rows: Tensor, mixture: Mixture | None, pooled: Tensor, done: float) -> Tensor:
        """Return the weighted cross entropy of the adversary, in float32.

        Args:
            rows: training clips in the batch (B,).
            mixture: of the batch, which mixes its speakers and corpora too.
            pooled: features of the network (B, channels).
            done: share of the training that lies behind.
        """
        truth = mixture.mix(self.domains[rows]) if mixture else self.domains[rows]
        answers = self.classifier(reverse_gradient(pooled.float(), adversary_strength(done)))
        return self._weight * labelled_cross_entropy(answers, truth)
