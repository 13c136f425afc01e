"""Augmentation changes what it says and no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sertool.augment import Mixture, augmented, draw_mixture, mask, warp_frequency
from sertool.batches import Batch
from sertool.recipe import Augmentation


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_mask_hides_whole_stripes_and_nothing_else() -> None:
    inputs = torch.from_numpy(generator().normal(size=(200, 1, 40, 64)).astype(np.float32))
    masked = mask(inputs, 2, 8, 10, generator(1))
    hidden = (masked == 0)[:, 0]
    assert torch.equal(masked[masked != 0], inputs[masked != 0])
    bands, frames = hidden.all(1), hidden.all(2)
    assert torch.equal(hidden, bands[:, None] | frames[:, :, None])
    assert bands.sum(1).max() <= 16 and frames.sum(1).max() <= 20
    assert bands.any(0).all() and frames.any(0).all(), "every place is hidden at some time"


def test_a_stripe_wider_than_the_excerpt_fits_into_it() -> None:
    assert mask(torch.ones(50, 1, 4, 64), 1, 0, 24, generator()).shape == (50, 1, 4, 64)


@pytest.mark.parametrize("seed", range(4))
def test_warping_reads_the_band_at_a_multiple(seed: int) -> None:
    ramp = torch.arange(64.0).expand(8, 1, 3, 64)
    factor = np.exp(generator(seed).uniform(-0.2, 0.2, 8))
    expected = np.minimum(np.arange(64) * factor[:, None], 63)
    warped = warp_frequency(ramp, 0.2, generator(seed)).numpy()
    assert warped == pytest.approx(np.broadcast_to(expected[:, None, None], warped.shape), abs=1e-4)


def test_warping_by_nothing_changes_nothing() -> None:
    inputs = torch.randn(3, 1, 5, 64)
    assert torch.allclose(warp_frequency(inputs, 0.0, generator()), inputs)


def test_a_mixture_is_the_weighted_sum_with_its_partner() -> None:
    values = torch.tensor([[1.0], [3.0], [5.0]])
    assert Mixture(0.75, torch.tensor([1, 2, 0])).mix(values).flatten().tolist() == [1.5, 3.5, 4.0]


def test_mixtures_come_as_often_as_wished_and_cost_no_draw_when_not() -> None:
    random = generator()
    assert draw_mixture(4, 0.0, random) is None
    assert random.random() == generator().random()
    drawn = [draw_mixture(4, 0.3, random) is not None for _ in range(1000)]
    assert 240 < sum(drawn) < 360


def test_a_mixture_is_as_long_as_its_longer_clip() -> None:
    batch = Batch(torch.ones(2, 1, 8, 64), features=torch.tensor([1, 4]))
    mixed = augmented(batch, Augmentation(), Mixture(0.5, torch.tensor([1, 0])), generator())
    assert mixed.features is not None and mixed.features.tolist() == [4, 4]


def test_the_papers_recipe_changes_nothing() -> None:
    batch = Batch(torch.randn(2, 1, 8, 64), skip=3)
    random = generator()
    same = augmented(batch, Augmentation(), None, random)
    assert torch.equal(same.inputs, batch.inputs) and (same.skip, same.features) == (3, None)
    assert random.random() == generator().random()
