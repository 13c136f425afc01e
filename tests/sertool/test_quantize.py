"""Quantisation: what no processor may decide for itself. The other tests of it are those of the export."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from random_networks import settle

from sertool.export.onnx import to_onnx
from sertool.export.quantize import _round_to_exact, quantize
from sertool.networks import build_network


@pytest.fixture(scope="module", params=["resnet9", "cnn6"])
def quantized(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """A small network with settled batch normalisation, quantised on noise."""
    torch.manual_seed(0)
    network = settle(build_network(request.param, 4, "causal", 0.125))
    windows = np.random.default_rng(0).normal(size=(4, 64, 64)).astype(np.float32)
    return quantize(to_onnx(network, 64, 64), windows)


def steps(model: onnx.ModelProto, operator: str) -> list[np.float32]:
    """Return the sizes of the 8-bit steps that operators of a kind read."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    read = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    names = [name for node in model.graph.node if node.op_type == operator for name in node.input]
    return [constants[read[name]] for name in names if name in read]


def written(model: onnx.ModelProto, operator: str) -> list[np.float32]:
    """Return the sizes of the 8-bit steps that the results of operators of a kind are rounded to."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    read = {node.input[0]: node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    return [constants[read[node.output[0]]] for node in model.graph.node if node.op_type == operator]


def test_the_terms_of_a_mean_are_exact(quantized: onnx.ModelProto) -> None:
    (step,) = steps(quantized, "ReduceMean")
    assert np.frexp(step)[0] == 0.5
    terms = np.random.default_rng(0).integers(0, 256, 60000).astype(np.float32) * step
    # One by one, backwards, and pairwise.
    sums = {float(np.cumsum(terms)[-1]), float(np.cumsum(terms[::-1])[-1]), float(terms.sum())}
    assert sums == {float(terms.astype(np.float64).sum())}


def test_no_residual_addition_falls_between_two_steps(quantized: onnx.ModelProto) -> None:
    pairs = np.reshape(steps(quantized, "Add"), (-1, 2))
    results = written(quantized, "Add")
    assert len(pairs) == len(results) == (3 if any("residual" in i.name for i in quantized.graph.initializer) else 0)
    terms = np.arange(-255, 256)
    for (first, second), result in zip(pairs.astype(np.float64), results, strict=True):
        sums = (terms[:, None] * first + terms * second) / result
        assert np.abs(np.abs(sums - np.round(sums)) - 0.5).min() > 0.4 / 255


def test_logits_do_not_depend_on_the_order_of_their_terms(quantized: onnx.ModelProto) -> None:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    (layer,) = (node for node in quantized.graph.node if "logits" in node.output)
    weights, bias = (constants[name] for name in layer.input[1:])
    step = steps(quantized, "Gemm")[-1]
    assert_exact(weights, bias, step, np.random.default_rng(0))


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.floats(-6, 6), st.floats(-6, 6))
@settings(max_examples=50, deadline=None)
def test_rounded_layers_are_exact_and_close(seed: int, inputs: int, size: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.normal(size=(3, inputs)) * 10**size).astype(np.float32)
    bias = (rng.normal(size=3) * 10 ** (size + offset)).astype(np.float32)
    step = np.float32(2.0 ** rng.integers(-12, 4))
    rounded = [values.astype(np.float32) for values in _round_to_exact(weights, bias, step)]
    assert_exact(*rounded, step, rng)
    largest = 255 * np.abs(weights).sum(axis=1) * step + np.abs(bias)
    assert np.all(np.abs(rounded[0] - weights) * step <= largest[:, None] * 2.0**-23)
    assert np.all(np.abs(rounded[1] - bias) <= largest * 2.0**-23)


def test_a_class_of_zeros_stays_one() -> None:
    weights, bias = _round_to_exact(np.zeros((1, 2), np.float32), np.zeros(1, np.float32), np.float32(1))
    assert not weights.any() and not bias.any()


def assert_exact(weights: np.ndarray, bias: np.ndarray, step: np.float32, rng: np.random.Generator) -> None:
    for x in (rng.integers(0, 256, weights.shape[1]), np.where(weights[0] > 0, 255, 0), np.full(weights.shape[1], 255)):
        terms = np.column_stack([bias, weights * (x.astype(np.float32) * step)])
        expected = terms.astype(np.float64).sum(axis=1)
        for order in (np.arange(terms.shape[1]), rng.permutation(terms.shape[1])):
            np.testing.assert_array_equal(np.cumsum(terms[:, order], axis=1, dtype=np.float32)[:, -1], expected)
