"""Weights rounded together: what layers compute is kept, where rounding each by itself would lose it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from edge_runtime.errors import SerError
from sertool.export.rounding import MAX_TERMS, WEIGHT_LIMIT, round_together, round_weights

seeds = st.integers(0, 2**32 - 1)


def nearest(weights: np.ndarray) -> np.ndarray:
    steps = np.abs(weights).max(axis=1, keepdims=True) / WEIGHT_LIMIT
    return np.round(weights / steps) * steps


def inputs_that_go_together(rng: np.random.Generator, terms: int) -> np.ndarray:
    """A random walk: neighbours are alike, as mel bands are."""
    return rng.normal(size=(2000, 1)) + rng.normal(size=(2000, terms)).cumsum(axis=1) / terms**0.5


@given(seeds, st.integers(1, 6), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_inputs_that_are_independent_are_rounded_one_by_one(seed: int, outputs: int, terms: int) -> None:
    weights = np.random.default_rng(seed).normal(size=(outputs, terms))
    np.testing.assert_allclose(round_together(weights, 3 * np.eye(terms)), nearest(weights), rtol=1e-12, atol=0)


@given(seeds, st.integers(1, 6), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_weights_on_steps_stay_for_any_inputs(seed: int, outputs: int, terms: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = inputs_that_go_together(rng, terms)
    weights = nearest(rng.normal(size=(outputs, terms))).astype(np.float32)
    np.testing.assert_allclose(round_together(weights, inputs.T @ inputs), weights, rtol=1e-6, atol=0)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_outputs_change_less_where_inputs_go_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs, weights = inputs_that_go_together(rng, 25), rng.normal(size=(64, 25))
    rounded = round_together(weights, inputs.T @ inputs / len(inputs))
    steps = np.abs(weights).max(axis=1, keepdims=True) / WEIGHT_LIMIT
    np.testing.assert_allclose(rounded / steps, np.round(rounded / steps), atol=1e-9)
    np.testing.assert_allclose(np.abs(rounded).max(axis=1), np.abs(weights).max(axis=1))

    def lost(found: np.ndarray) -> float:
        return float(np.square(inputs @ (found - weights).T).mean())

    assert lost(rounded) < 0.3 * lost(nearest(weights))


def test_dead_inputs_and_outputs_are_no_trouble() -> None:
    assert not round_together(np.zeros((2, 3)), np.zeros((3, 3))).any()
    np.testing.assert_array_equal(round_together(np.array([[64.0, 1.4, 0]]), np.zeros((3, 3))), [[64, 1, 0]])


# --- in a model ----------------------------------------------------------------------------------------------------


def model_of(node: onnx.NodeProto, weights: np.ndarray, output: list[int | str]) -> onnx.ModelProto:
    """A layer that reads the input, and a layer of the logits after it."""
    logits = helper.make_node("Identity", ["features"], ["logits"])
    graph = helper.make_graph(
        [node, logits],
        "model",
        [helper.make_tensor_value_info("logmel", TensorProto.FLOAT, ["batch", 1, "frames", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(weights.astype(np.float32), "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def weights_in(model: onnx.ModelProto) -> np.ndarray:
    return numpy_helper.to_array(model.graph.initializer[0])


@pytest.fixture
def windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(frames, 64)).astype(np.float32).cumsum(axis=1) / 8 for frames in (40, 60, 90)]


def test_a_convolution_with_padding_and_strides_loses_less_of_its_output(windows: list[np.ndarray]) -> None:
    weights = np.random.default_rng(1).normal(size=(8, 1, 5, 5))
    layer = helper.make_node(
        "Conv", ["logmel", "weights"], ["features"], kernel_shape=[5, 5], strides=[1, 2], pads=[4, 2, 0, 2]
    )
    model = model_of(layer, weights, ["batch", 8, "rows", "columns"])
    rounded = weights_in(round_weights(model, windows))
    np.testing.assert_array_equal(weights_in(model), weights.astype(np.float32))

    padded = [functional.pad(torch.from_numpy(window)[None, None], (2, 2, 4, 0)) for window in windows]

    def lost(found: np.ndarray) -> float:
        change = torch.from_numpy(found - weights).float()
        return sum(float(functional.conv2d(x, change, stride=(1, 2)).square().sum()) for x in padded)

    assert lost(rounded) < 0.3 * lost(nearest(weights.reshape(8, -1)).reshape(weights.shape))


def test_each_group_of_a_depthwise_convolution_has_inputs_of_its_own(windows: list[np.ndarray]) -> None:
    """Bands as channels: what one channel's weights lose, only its own make good."""
    turned = helper.make_node("Transpose", ["logmel"], ["bands"], perm=[0, 3, 2, 1])
    weights = np.random.default_rng(1).normal(size=(64, 1, 3, 1))
    layer = helper.make_node("Conv", ["bands", "weights"], ["features"], kernel_shape=[3, 1], group=64)
    model = model_of(layer, weights, ["batch", 64, "rows", 1])
    model.graph.node.insert(0, turned)
    for window in windows:
        window[:, :32] = 2.0  # of these bands, every weight sees the same
    rounded = weights_in(round_weights(model, windows))[:, 0, :, 0].astype(np.float64)
    steps = np.abs(weights).max(axis=(1, 2, 3)) / WEIGHT_LIMIT
    left_over = np.abs((rounded - weights[:, 0, :, 0]).sum(axis=1)) / steps
    # Half a step is what the last rounding leaves; a weight at its limit cannot give way.
    assert np.sum(left_over[:32] > 0.51) <= 1
    assert np.sum(left_over[32:] > 0.51) >= 8


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_linear_layer_either_way_round(windows: list[np.ndarray], transposed: int) -> None:
    flat = helper.make_node("ReduceMean", ["logmel", "axes"], ["means"], keepdims=0)
    weights = np.random.default_rng(1).normal(size=(5, 64))
    layer = helper.make_node("Gemm", ["means", "weights"], ["features"], transB=transposed)
    model = model_of(layer, weights if transposed else weights.T, ["batch", 5])
    model.graph.node.insert(0, flat)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "axes"))
    rounded = weights_in(round_weights(model, windows))
    rounded = rounded if transposed else rounded.T
    steps = np.abs(weights).max(axis=1, keepdims=True) / WEIGHT_LIMIT
    np.testing.assert_allclose(rounded / steps, np.round(rounded / steps), atol=1e-4)
    means = np.stack([window.mean(axis=0) for window in windows])
    errors = [np.square(means @ (found - weights).T).sum() for found in (rounded, nearest(weights))]
    assert errors[0] < 0.1 * errors[1]


def test_what_cannot_be_or_need_not_be_rounded_here_is_left(windows: list[np.ndarray]) -> None:
    dilated = helper.make_node("Conv", ["logmel", "weights"], ["features"], kernel_shape=[3, 3], dilations=[2, 2])
    small, large = np.random.default_rng(1).normal(size=(2, 1, 3, 3)), np.ones((1, 1, 33, 64))
    long = helper.make_node("Conv", ["logmel", "weights"], ["features"], kernel_shape=[33, 64])
    assert large.size > MAX_TERMS
    logits = helper.make_node("Conv", ["logmel", "weights"], ["logits"], kernel_shape=[3, 3])
    for layer, weights in ((dilated, small), (long, large), (logits, small)):
        model = model_of(layer, weights, ["batch", len(weights), "rows", "columns"])
        if layer is logits:
            del model.graph.node[1]
        np.testing.assert_array_equal(weights_in(round_weights(model, windows)), weights.astype(np.float32))


@pytest.mark.parametrize("weight", [1e38, np.nan])
def test_a_network_that_overflows_is_refused(windows: list[np.ndarray], weight: float) -> None:
    layer = helper.make_node("Conv", ["logmel", "weights"], ["features"], kernel_shape=[3, 3])
    model = model_of(layer, np.full((1, 1, 3, 3), weight), ["batch", 1, "rows", "columns"])
    with pytest.raises(SerError, match="logits without end on training clips; train it anew"):
        round_weights(model, [1e3 * window for window in windows])
