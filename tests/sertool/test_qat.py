"""Quantisation-aware training: it rounds what the exporter quantises, as the exporter does, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FloatArray
from sertool.export.onnx import to_onnx
from sertool.export.quantize import quantize
from sertool.networks import Student, build_network
from sertool.qat import RoundedComputation

pytestmark = pytest.mark.usefixtures("one_thread")


def windows() -> list[FloatArray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(frames, 64)).astype(np.float32) for frames in (64, 64, 32, 64)]


def settled(name: str) -> Student:
    torch.manual_seed(0)
    network = build_network(name, 4, "causal", 0.125).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        for _ in range(20):
            network(torch.from_numpy(np.stack([windows()[0], windows()[1]]))[:, None])
    return network.eval()


@pytest.fixture(scope="module", params=["resnet9", "mobilenet15"])
def pair(request: pytest.FixtureRequest) -> tuple[Student, ModelProto]:
    """A network of every kind of layer, its weights rounded for good, and what the exporter makes of it."""
    network = settled(str(request.param))
    RoundedComputation(network, windows()).round_weights()
    return network, quantize(to_onnx(network, 64, 64), iter(windows()))


def constants(model: ModelProto) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def layers(network: Student) -> dict[str, nn.Conv2d | nn.Linear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


def test_the_activations_rounded_are_those_of_the_exported_file(pair: tuple[Student, ModelProto]) -> None:
    network, model = pair
    rounded = RoundedComputation(network, windows())
    rounded.measure()
    values = constants(model)
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    exported = {(float(values[node.input[1]]), int(values[node.input[2]])) for node in nodes}
    ours = set(rounded._steps)
    assert len(ours) == len(exported)
    for step, zero in ours:
        assert any(zero == theirs and step == pytest.approx(found, rel=1e-5) for found, theirs in exported)


def test_the_weights_rounded_for_good_are_those_of_the_exported_file(pair: tuple[Student, ModelProto]) -> None:
    network, model = pair
    values = constants(model)
    *quantized, _ = layers(network)
    for name in quantized:
        codes = codes_of(layers(network)[name].weight.detach())
        exported = values[f"{name}.weight_quantized"].reshape(codes.shape)
        # A negative scale of batch normalisation, which the file has folded in, turns the sign of a channel.
        np.testing.assert_array_equal(np.abs(codes), np.abs(exported.astype(int)))


def codes_of(weight: torch.Tensor) -> FloatArray:
    """Return rounded weights in steps, (outputs, terms)."""
    step = weight.abs().flatten(1).amax(1) / 64
    codes = (weight.flatten(1) / step[:, None]).numpy()
    assert np.abs(codes - codes.round()).max() < 1e-3
    return codes.round()


@pytest.mark.parametrize("name", ["resnet9", "mobilenet15"])
def test_weights_are_rounded_to_the_nearest_step_and_only_once(name: str) -> None:
    network = settled(name)
    before = {name: layer.weight.detach().clone() for name, layer in layers(network).items()}
    rounded = RoundedComputation(network, windows())
    rounded.round_weights()
    *quantized, logits = layers(network)
    for layer in quantized:
        weight, original = layers(network)[layer].weight.detach(), before[layer]
        step = original.abs().flatten(1).amax(1) / 64
        assert 0.3 < float(((weight - original).flatten(1).abs().amax(1) / step).max()) < 0.501
        codes_of(weight)
    assert torch.equal(layers(network)[logits].weight, before[logits])

    again = {name: layer.weight.detach().clone() for name, layer in layers(network).items()}
    rounded.round_weights()
    for layer in layers(network):
        torch.testing.assert_close(layers(network)[layer].weight, again[layer], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["resnet9", "mobilenet15"])
def test_rounding_ends_with_its_block(name: str) -> None:
    network = settled(name)
    inputs = torch.from_numpy(windows()[0])[None, None]
    rounded = RoundedComputation(network, windows())
    rounded.measure()
    with torch.no_grad():
        before = network(inputs)
        with rounded:
            first = network(inputs)
        with rounded:
            second = network(inputs)
        assert torch.equal(first, second)
        assert torch.equal(network(inputs), before) and not torch.equal(first, before)
        assert (first - before).norm() < 0.1 * before.norm()


def test_values_on_the_steps_stay_and_others_move_by_half_a_step_at_most() -> None:
    class Layers(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self[0](x.flatten()[None]))
            return self[1](seen[-1])  # whose steps, for the logits, are powers of two

    seen: list[torch.Tensor] = []
    one = nn.Linear(4, 4, bias=False)
    nn.init.eye_(one.weight)
    network = Layers(one, nn.Linear(4, 4, bias=False))
    nn.init.eye_(network[1].weight)
    # 256 steps of 0.1 from -5.1 to 20.4: zero is the 51st.
    signal = np.array([[-5.1, 20.4], [0.0, 1.234]], np.float32)
    rounded = RoundedComputation(network, [signal])
    rounded.measure()
    with rounded:
        network(torch.from_numpy(signal))
    with rounded:
        network(torch.from_numpy(signal * 2))
    assert seen[-2].tolist()[0] == pytest.approx([-5.1, 20.4, 0.0, 1.2], abs=1e-5)
    assert seen[-1].tolist()[0] == pytest.approx([-5.1, 20.4, 0.0, 2.5], abs=1e-5)  # clipped, as the device clips


def test_gradients_pass_the_rounding() -> None:
    network = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer, weight in zip(network, ([[0.64, 0.333]], [[1.0]]), strict=True):
        layer.weight.data = torch.tensor(weight)
    inputs = torch.tensor([[2.55, 1.004]])

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x.reshape(1, 2))

    rounded = RoundedComputation(Flat(), [inputs.numpy()])
    rounded.measure()
    with rounded:
        network(inputs).sum().backward()
    # As if the rounded inputs, 2.55 and 1.00, had met the weights in float.
    assert network[0].weight.grad.tolist()[0] == pytest.approx([2.55, 1.0], abs=1e-6)


def test_a_network_without_layers_is_refused() -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain

    with pytest.raises(UsageError, match=r"^Nothing computes without convolutions and linear layers, so there is noth"):
        RoundedComputation(Nothing(), windows()).measure()
