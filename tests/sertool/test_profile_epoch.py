"""The profile of an epoch: its operations are those that a forward and a backward pass take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from profile_epoch import measure

from sertool.networks import build_network, count_macs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_operations_are_three_times_those_of_a_window(tones: Any) -> None:
    recipe = tones.recipe(training__epochs=3, network__name="resnet9", network__width=0.25)
    measured = measure(recipe)
    network = build_network("resnet9", 3, width=recipe.network.width)
    window = 2 * count_macs(network, frames=(recipe.data.window_samples - 512) // 256 + 1)
    clips = 48  # of four of the six speakers
    # Gradients by weights and by inputs cost as much as the pass itself each; the first layer needs no latter.
    assert 1e9 * measured["billion operations an epoch"] == pytest.approx(3 * window * clips, rel=0.1)
    assert 0 < measured["of these, batches and augmentation"] < measured["seconds an epoch"]
    assert measured["share of peak"] == pytest.approx(
        measured["billion operations a second"] / measured["peak, billion operations a second"]
    )
