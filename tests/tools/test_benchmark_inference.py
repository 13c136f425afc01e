"""The benchmark's own stream in torch computes what the network does, and its figures follow from the times."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from benchmark_inference import Cost, TorchStream
from random_networks import noise

from sertool.networks import build_network


@pytest.mark.parametrize("name", ["resnet9", "cnn6", "mobilenet15"])
def test_the_stream_in_torch_computes_the_networks_features(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, 4, "causal", 0.125).eval()
    stream = TorchStream(network)
    frames = noise(6 * stream.stride)
    with torch.inference_mode():
        expected = network.features(torch.from_numpy(frames)[None, None])
        logits = network.head(expected.mean(2))[0].numpy()
    states, features = stream.start(), []
    for first, last in ((0, 1), (1, 3), (3, 6)):
        new, states = stream.advance(frames[first * stream.stride : last * stream.stride], states)
        features.append(new)
    together = np.concatenate(features, axis=1)
    np.testing.assert_allclose(together, expected[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(stream.classify(together), logits, atol=1e-5)


def test_loads_are_cpu_seconds_for_a_second_of_audio() -> None:
    cost = Cost("cnn6", "onnx int8", stride=16, window=25.6, hop=2.56, two_hops=5.12)
    assert cost.ratios == pytest.approx((10, 5))
    assert cost.loads["window"] == pytest.approx([0.1, 0.05])
    assert cost.loads["stream"] == pytest.approx([0.01, 0.01])
    slow = Cost("resnet9", "onnx int8", stride=32, window=25.6, hop=5.12, two_hops=7.0)
    assert slow.loads["stream"][0] is None, "no feature is complete that often"
    assert slow.loads["stream"][1] == pytest.approx(0.01)
