"""The networks: sizes counted on paper, causality, and one set of weights for both paddings."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from random_networks import settle
from torch import nn

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FrontEnd
from sertool.networks import (
    NETWORKS,
    Student,
    TimeReach,
    build_network,
    count_macs,
    count_parameters,
    predict,
    time_reach,
)
from sertool.networks.cnn6 import CNN6
from sertool.networks.context import TimeConv2d, TimeMaxPool2d
from sertool.recipe import PAPER_WINDOW_SAMPLES, SHORTEST_WINDOW_SAMPLES

pytestmark = pytest.mark.usefixtures("one_thread")

HALVINGS = {"vgg15": 5, "resnet9": 5, "cnn6": 4, "mobilenet15": 4}


@pytest.fixture(params=sorted(NETWORKS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def settled(name: str, time_padding: str) -> Student:
    """Return a network whose batch normalisation has seen data, so that it does more than pass values on."""
    torch.manual_seed(0)
    return settle(build_network(name, 7, time_padding), frames=32)


# --- sizes ---------------------------------------------------------------------------------------------------------


def convolution(kernel: int, inputs: int, outputs: int, groups: int = 1) -> int:
    """Parameters of a convolution without bias and of the four vectors of its batch normalisation."""
    return kernel * kernel * inputs * outputs // groups + 4 * outputs


def head(channels: int, classes: int) -> int:
    return channels * 256 + 256 + 256 * classes + classes


def parameters_on_paper(name: str, classes: int) -> int:
    if name == "cnn6":
        channels = [1, 64, 128, 256, 512]
        return sum(convolution(5, a, b) for a, b in pairwise(channels)) + head(512, classes)
    if name == "vgg15":
        channels = [1, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
        return sum(convolution(3, a, b) for a, b in pairwise(channels)) + head(512, classes)
    if name == "resnet9":
        blocks = sum(convolution(3, a, b) + convolution(3, b, b) + a * b for a, b in pairwise([64, 128, 256, 512]))
        return convolution(7, 1, 64) + blocks + head(512, classes)
    channels = [64, 128, 128, 256, 256, 512, 512]
    blocks = sum(convolution(3, a, a, groups=a) + convolution(1, a, b) for a, b in pairwise(channels))
    return convolution(3, 1, 64) + blocks + head(512, classes)


@pytest.mark.parametrize("classes", [2, 7])
def test_parameters_are_those_counted_on_paper(name: str, classes: int) -> None:
    assert count_parameters(build_network(name, classes)) == parameters_on_paper(name, classes)


@pytest.mark.parametrize(
    ("name", "millions"), [("vgg15", 14.86), ("resnet9", 4.96), ("cnn6", 4.44), ("mobilenet15", 0.67)]
)
def test_parameters_are_those_of_the_paper(name: str, millions: float) -> None:
    assert round(count_parameters(build_network(name, 7)) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "millions"), [("vgg15", 7226), ("resnet9", 281), ("cnn6", 3682), ("mobilenet15", 235)]
)
def test_macs_of_the_papers_window(name: str, millions: int) -> None:
    frames = FrontEnd().frames(PAPER_WINDOW_SAMPLES)
    assert round(count_macs(build_network(name, 7), frames) / 1e6) == millions


@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_width_is_half_of_every_channel_but_the_embeddings(name: str) -> None:
    whole = [layer for layer in build_network(name, 7).trunk.modules() if isinstance(layer, nn.Conv2d)]
    narrow = build_network(name, 7, width=0.5)
    half = [layer for layer in narrow.trunk.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in half] == [layer.out_channels // 2 for layer in whole]
    assert narrow(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    assert narrow.embed(torch.zeros(1, 1, 64, 64)).shape == (1, 256)


def test_macs_of_one_layer_worked_by_hand() -> None:
    # 5 x 5 x 8 / 2 products for each of 16 x 20 x 64 outputs.
    layer = TimeConv2d(8, 16, 5, time_padding="same", groups=2)
    assert count_macs(nn.Sequential(nn.Conv2d(1, 8, 1), layer), 20) == 8 * 20 * 64 + 100 * 16 * 20 * 64


def test_macs_of_cnn6_worked_by_hand() -> None:
    # Pooling halves both axes, rounding down, after each convolution.
    outputs = [373 * 64, 186 * 32, 93 * 16, 46 * 8]
    channels = pairwise([1, 64, 128, 256, 512])
    convolutions = sum(25 * a * b * size for (a, b), size in zip(channels, outputs, strict=True))
    assert count_macs(build_network("cnn6", 7), 373) == convolutions + 512 * 256 + 256 * 7


def test_counting_leaves_the_network_as_it_was(name: str) -> None:
    network = build_network(name, 7).train()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    count_macs(network, 64)
    assert network.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


# --- time ----------------------------------------------------------------------------------------------------------


def first_changed(network: Student, frame: int, frames: int) -> int:
    """Return the first feature that moves when the input changes from ``frame`` on."""
    torch.manual_seed(1)
    x = torch.randn(1, 1, frames, 64)
    other = torch.cat([x[:, :, :frame], torch.randn(1, 1, frames - frame, 64)], dim=2)
    with torch.no_grad():
        changed = (network.features(x) != network.features(other)).any(1)[0]
    return int(torch.nonzero(changed)[0])


def test_causal_features_do_not_wait_for_the_future(name: str) -> None:
    network = settled(name, "causal")
    step = 2 ** HALVINGS[name]
    for feature in (1, 2):
        # Feature k is complete with frame (k + 1) * step - 1: whatever follows leaves it as it was ...
        assert first_changed(network, feature * step, 3 * step) == feature
        # ... and that frame itself counts.
        assert first_changed(network, feature * step - 1, 3 * step) == feature - 1


def test_the_papers_padding_looks_ahead(name: str) -> None:
    step = 2 ** HALVINGS[name]
    assert first_changed(settled(name, "same"), 2 * step, 3 * step) < 2


def test_causal_features_of_a_beginning_are_the_beginning_of_the_features(name: str) -> None:
    network = settled(name, "causal")
    x = torch.randn(1, 1, 96, 64)
    with torch.no_grad():
        whole, beginning = network.features(x), network.features(x[:, :, :77])
    assert beginning.shape[2] == 77 // 2 ** HALVINGS[name]
    torch.testing.assert_close(beginning, whole[:, :, : beginning.shape[2]], rtol=1e-4, atol=1e-5)


CONTEXT = {"vgg15": 192, "resnet9": 160, "cnn6": 64, "mobilenet15": 48}
"""Receptive fields worked by hand (212, 179, 76 and 59 frames), less the stride that is the window's own first feature,
rounded up to whole strides."""


def test_the_reach_in_time_is_that_worked_by_hand(name: str) -> None:
    network = build_network(name, 7, "causal", width=0.125)
    assert time_reach(network) == TimeReach(2 ** HALVINGS[name], CONTEXT[name])
    assert network.training and network.trunk[0].weight.dtype == torch.float32


def test_features_depend_on_their_context_and_on_nothing_before_it(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, 7, "causal", 0.125).double().eval()
    stride, context = 2 ** HALVINGS[name], CONTEXT[name]
    signal = torch.randn(1, 1, stride + context + stride, 64, dtype=torch.float64)
    longer, shorter = signal.clone(), signal.clone()
    longer[:, :, :stride] = torch.randn(stride, 64)
    shorter[:, :, stride : 2 * stride] = torch.randn(stride, 64)
    with torch.no_grad():
        last = network.features(signal)[:, :, -1]
        assert torch.equal(network.features(longer)[:, :, -1], last)
        assert not torch.equal(network.features(shorter)[:, :, -1], last)
        cut = network.features(signal[:, :, stride:])[:, :, -1]
    torch.testing.assert_close(cut, last)


def test_a_network_that_remembers_for_ever_has_no_context() -> None:
    class Remembering(CNN6):
        def features(self, log_mel: torch.Tensor) -> torch.Tensor:
            return super().features(log_mel).cumsum(2)

    with pytest.raises(UsageError, match=r"^Remembering remembers more than 4096 frames, .*set training\.context = 0$"):
        time_reach(Remembering(7, "causal", 0.125))


@pytest.mark.parametrize("time_padding", ["same", "causal"])
@pytest.mark.parametrize("frames", [32, 33, 47, 63])
def test_windows_of_any_length(name: str, time_padding: str, frames: int) -> None:
    network = settled(name, time_padding)
    with torch.no_grad():
        features = network.features(torch.randn(1, 1, frames, 64))
        logits = network.head(features.mean(2))
    if time_padding == "causal":
        assert features.shape[2] == frames // 2 ** HALVINGS[name]
    assert features.shape[:2] == (1, 512) and features.shape[2] >= 1
    assert logits.shape == (1, 7) and torch.isfinite(logits).all()


def test_the_shortest_window_of_a_recipe_is_the_shortest_that_all_networks_take() -> None:
    frames = FrontEnd().frames(SHORTEST_WINDOW_SAMPLES)
    assert frames == 32  # which all take, see above
    assert FrontEnd().samples(frames) == SHORTEST_WINDOW_SAMPLES
    with pytest.raises(RuntimeError):
        settled("vgg15", "same")(torch.randn(1, 1, frames - 1, 64))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (7, 2), (1, 2), (1, 1)])
def test_causal_convolution_is_the_plain_one_shifted_into_the_past(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = TimeConv2d(2, 3, kernel, stride, time_padding="causal")
    x = torch.randn(1, 2, 20, 8)
    padded = torch.cat([torch.zeros(1, 2, kernel, 8), x], dim=2)
    expected = []
    for output in range(20 // stride):
        last = kernel + (output + 1) * stride  # one past the last frame that this output may see
        piece = padded[:, :, last - kernel : last]
        expected.append(nn.functional.conv2d(piece, layer.weight, stride=stride, padding=(0, kernel // 2)))
    torch.testing.assert_close(layer(x), torch.cat(expected, dim=2))


@pytest.mark.parametrize("kernel", [2, 3])
def test_causal_pooling_sees_the_past_alone(kernel: int) -> None:
    layer = TimeMaxPool2d(kernel, time_padding="causal")
    x = torch.rand(1, 1, 9, 1)
    padded = torch.cat([torch.zeros(kernel), x.flatten()])
    ends = [kernel + 2 * (output + 1) for output in range(4)]  # one past the last frame that an output may see
    expected = [padded[end - kernel : end].max() for end in ends]
    # One band beside silent ones: pooling over frequency changes nothing.
    wide = torch.cat([x, torch.zeros(1, 1, 9, 1)], dim=3)
    assert layer(wide).flatten().tolist() == pytest.approx(torch.stack(expected).tolist())


def test_weights_fit_either_padding(name: str) -> None:
    same, causal = settled(name, "same"), build_network(name, 7, "causal").eval()
    causal.load_state_dict(same.state_dict())
    assert count_parameters(same) == count_parameters(causal)
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(same(x), causal(x))


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_padding", ["same", "causal"])
def test_features_and_head_make_the_network(name: str, time_padding: str) -> None:
    network = settled(name, time_padding)
    x = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        pooled = network.features(x).mean(2)
        assert torch.equal(network.head(pooled), network(x))
        assert torch.equal(network.head.classify(network.embed(x)), network(x))


@pytest.mark.parametrize(
    ("name", "rectified"), [("vgg15", False), ("cnn6", False), ("resnet9", True), ("mobilenet15", True)]
)
def test_the_embedding_is_taken_where_the_reference_takes_it(name: str, rectified: bool) -> None:
    network = settled(name, "same")
    x = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        embedding = network.embed(x)
        fc1 = network.head.fc1(network.features(x).mean(2))
    assert (fc1 < 0).any()
    assert torch.equal(embedding, fc1.relu() if rectified else fc1)


def test_predict_gives_every_window_the_logits_it_has_alone(name: str) -> None:
    network = settled(name, "same")
    windows = torch.randn(3, 32, 64).numpy()
    with torch.no_grad():
        alone = torch.cat([network(torch.from_numpy(window)[None, None]) for window in windows])
    logits = predict(network, windows, batch_size=2)
    assert logits.dtype == "float32"
    torch.testing.assert_close(torch.from_numpy(logits), alone, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    torch.manual_seed(0)
    first = build_network(name, 7).state_dict()
    torch.manual_seed(0)
    second = build_network(name, 7).state_dict()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_an_unknown_network_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="network 'resnet' is unknown; did you mean 'resnet9'"):
        build_network("resnet", 7)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_shows_what_each_network_costs() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "sertool", "networks", "--classes", "4", "--seconds", "2", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    shown = json.loads(done.stdout)
    assert set(shown) == set(NETWORKS)
    network = build_network("cnn6", 4)
    assert shown["cnn6"] == {"parameters": count_parameters(network), "macs": count_macs(network, 124), "frames": 124}
