"""Augmentation of normalised log-Mel batches, where it costs next to nothing and needs no audio.

Everything draws from a generator that is given, so that an epoch's draws follow from its number alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sertool.batches import Batch
from sertool.recipe import Augmentation

MIXUP_SHAPE = 0.3
"""Of the Beta distribution that a mixture's share is drawn from (Zhang et al., 2018, take 0.1 to 0.4)."""


def mask(inputs: Tensor, count: int, bands: int, frames: int, random: np.random.Generator) -> Tensor:
    """Set stripes of each item to 0, the mean after normalisation (SpecAugment: Park et al., 2019, unwarped in time).

    Args:
        inputs: (B, 1, T, mel_bands).
        count: stripes across frequency, and as many across time.
        bands: most bands that a stripe hides.
        frames: most frames that a stripe hides.
        random: source of the draws.

    Returns:
        (B, 1, T, mel_bands), new where anything is hidden.

    Example:
        >>> masked = mask(torch.ones(1, 1, 50, 64), 1, 8, 10, np.random.default_rng(0))
        >>> bool((masked == 0).any()), float(masked.mean()) > 0.6
        (True, True)
    """
    shown = torch.ones_like(inputs)
    for axis, most in ((3, bands), (2, frames)):
        length = inputs.shape[axis]
        place = torch.arange(length, device=inputs.device).view([-1 if axis == other else 1 for other in range(4)])
        for _ in range(count):
            width = random.integers(0, min(most, length) + 1, len(inputs))
            first = (random.random(len(inputs)) * (length - width + 1)).astype(np.int64)
            begin, end = _column(first, inputs), _column(first + width, inputs)
            shown = shown * ~((place >= begin) & (place < end))
    return inputs * shown


def warp_frequency(inputs: Tensor, strength: float, random: np.random.Generator) -> Tensor:
    """Stretch or squeeze the mel axis of each item, as shorter or longer vocal tracts do (Jaitly and Hinton, 2013).

    Args:
        inputs: (B, 1, T, mel_bands).
        strength: the factor is drawn from exp(-strength) to exp(strength); 0 leaves everything as it is.
        random: source of the draws.

    Returns:
        (B, 1, T, mel_bands): band ``k`` reads band ``k * factor``, interpolated; beyond the last band, the last.
    """
    bands = inputs.shape[3]
    factor = _column(np.exp(random.uniform(-strength, strength, len(inputs))), inputs)
    source = (torch.arange(bands, device=inputs.device) * factor).clamp(max=bands - 1)
    below = source.floor().clamp(max=bands - 2)
    lower = below.long().expand(inputs.shape)
    between = (source - below).to(inputs.dtype)
    return inputs.gather(3, lower) * (1 - between) + inputs.gather(3, lower + 1) * between


@dataclass(frozen=True)
class Mixture:
    """Pairs of items of a batch, added up (mixup: Zhang et al., 2018).

    Attributes:
        share: of each item itself, in [0, 1].
        partner: int64 (B,), the position of the other, on the CPU.
    """

    share: float
    partner: Tensor

    def mix(self, values: Tensor) -> Tensor:
        """Return ``share * values + (1 - share) * values[partner]`` for float values (B, ...)."""
        return self.share * values + (1 - self.share) * values[self.partner]


def draw_mixture(items: int, chance: float, random: np.random.Generator) -> Mixture | None:
    """Draw whether a batch is mixed and, if so, a share from Beta(0.3, 0.3) and a partner for each item.

    Example:
        >>> mixture = draw_mixture(4, 1.0, np.random.default_rng(0))
        >>> mixture.mix(torch.ones(4, 2)).tolist() == torch.ones(4, 2).tolist()
        True
    """
    if not chance or random.random() >= chance:
        return None
    return Mixture(float(random.beta(MIXUP_SHAPE, MIXUP_SHAPE)), torch.from_numpy(random.permutation(items)))


def augmented(batch: Batch, settings: Augmentation, mixture: Mixture | None, random: np.random.Generator) -> Batch:
    """Return a batch as a recipe's augmentation changes it."""
    inputs, features = batch.inputs, batch.features
    if settings.warp:
        inputs = warp_frequency(inputs, settings.warp, random)
    if settings.masks:
        inputs = mask(inputs, settings.masks, settings.mask_bands, settings.mask_frames, random)
    if mixture:
        inputs = mixture.mix(inputs)
        # Where the shorter clip is over, the longer one goes on over its zeros.
        features = features if features is None else torch.maximum(features, features[mixture.partner])
    return Batch(inputs.contiguous(memory_format=torch.channels_last), batch.skip, features)


def _column(values: NDArray[Any], inputs: Tensor) -> Tensor:
    """Return one value an item, to be compared with an axis of the inputs."""
    return torch.from_numpy(values).to(inputs.device).view(-1, 1, 1, 1)
