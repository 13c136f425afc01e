"""Rounded weights that make up for one another, so that 8 bits cost fewer of a network's answers.

Rounding every weight to the nearest step leaves errors that add up where a layer's inputs go together, and neighbouring
mel bands and frames do: of the logits' error of a quantised CNN-6, nine tenths came from the 25 weights a channel that
read the spectrogram. Here weights are rounded one after the other, and those still to be rounded move so that the
layer's output, on the calibration windows, changes as little as it can. It costs nothing at inference. After GPTQ
(Frantar et al., *GPTQ: Accurate Post-Training Quantization*, 2023) for each layer's own inputs in the float network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_runtime.errors import SerError
from edge_runtime.frontend import FloatArray
from sertool.export.onnx import INPUT, OUTPUT, attributes_of

WEIGHT_LIMIT = 64
"""Weights are rounded to -64 ... 64: see :func:`sertool.export.quantize.quantize` on why not to -127 ... 127."""

MAX_TERMS = 2048
"""Layers of longer sums are rounded to the nearest step: it takes minutes there, and of so many errors few are left."""

PLACES = 200
"""Of an image of features, so many places are looked at for each window."""

DAMPING = 0.01
"""Share of the inputs' mean power that is added to each input's own, so that no weight moves far for little."""

Moments = NDArray[np.float64]


@dataclass(frozen=True)
class _Layer:
    """A layer to be rounded.

    Attributes:
        node: a Conv or Gemm.
        weights: (groups, outputs of a group, terms of an output's sum).
        rows_are_outputs: whether the first axis of the node's weights is that of its outputs.
    """

    node: NodeProto
    weights: FloatArray
    rows_are_outputs: bool = True


def round_weights(model: ModelProto, windows: Sequence[FloatArray]) -> ModelProto:
    """Round the weights of a float model to the steps that quantisation to 8 bits will give them.

    Args:
        model: what :func:`sertool.export.onnx.to_onnx` returns; left as it is.
        windows: normalised log-Mel windows (frames, mel_bands) of training speakers.

    Returns:
        the same model, whose weights quantisation then rounds to themselves. The layer of the logits, and layers with
        more than :data:`MAX_TERMS` terms a sum, are left as they are.

    Raises:
        SerError: the network overflows.
    """
    rounded = ModelProto()
    rounded.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in rounded.graph.initializer}
    layers = _layers(rounded.graph)
    for layer, moments in zip(layers, _moments(model, layers, windows), strict=True):
        groups = zip(layer.weights, moments, strict=True)
        values = np.concatenate([round_together(*group) for group in groups])
        tensor = constants[layer.node.input[1]]
        values = values.reshape(tensor.dims) if layer.rows_are_outputs else values.T
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return rounded


def round_together(weights: FloatArray, moments: Moments) -> NDArray[np.float64]:
    """Round the weights of one layer to multiples of 1/64 of each output's largest.

    Args:
        weights: (outputs, terms).
        moments: mean products of the layer's inputs, (terms, terms).

    Returns:
        float64 (outputs, terms).

    Example:
        Two inputs that are always equal: what one weight loses, the other gains.

        >>> weights = np.array([[64.0, 3.4, 3.4]])
        >>> round_together(weights, np.eye(3))
        array([[64.,  3.,  3.]])
        >>> round_together(weights, np.array([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]]))
        array([[64.,  3.,  4.]])
    """
    exact = weights.astype(np.float64)
    outputs, terms = exact.shape
    largest = np.abs(exact).argmax(axis=1)
    steps = np.maximum(np.abs(exact).max(axis=1), np.finfo(np.float32).tiny) / WEIGHT_LIMIT
    damped = moments + np.eye(terms) * (DAMPING * np.trace(moments) / terms or 1.0)
    # Upper triangle: column j says how an error in each earlier weight moves weight j (GPTQ, section 3.3).
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    errors, rounded = np.zeros((outputs, terms)), np.empty((outputs, terms))
    for term in range(terms):
        wanted = exact[:, term] - errors[:, :term] @ factor[:term, term]
        nearest = np.clip(np.round(wanted / steps), -WEIGHT_LIMIT, WEIGHT_LIMIT) * steps
        # The largest weight stays, because it decides on the step.
        rounded[:, term] = np.where(largest == term, exact[:, term], nearest)
        errors[:, term] = (wanted - rounded[:, term]) / factor[term, term]
    return rounded


def _layers(graph: GraphProto) -> list[_Layer]:
    """Return the layers that are to be rounded."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    layers = []
    for node in graph.node:
        if node.op_type not in {"Conv", "Gemm"} or OUTPUT in node.output:
            continue
        if node.input[1] in constants and readers[node.input[1]] == 1 and _is_plain(node):
            layer = _layer(node, numpy_helper.to_array(constants[node.input[1]]))
            if layer.weights.shape[-1] <= MAX_TERMS:
                layers.append(layer)
    return layers


def _is_plain(node: NodeProto) -> bool:
    """Tell whether :func:`_patches` sees what the node's sums are made of."""
    attributes = attributes_of(node)
    if node.op_type == "Gemm":
        return not attributes.get("transA")
    return (
        len(attributes.get("kernel_shape", ())) == 2
        and set(attributes.get("dilations", (1,))) == {1}
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
    )


def _layer(node: NodeProto, weights: FloatArray) -> _Layer:
    attributes = attributes_of(node)
    if node.op_type == "Gemm" and not attributes.get("transB"):
        return _Layer(node, weights.T[None], rows_are_outputs=False)
    groups = attributes.get("group", 1)
    return _Layer(node, weights.reshape(groups, len(weights) // groups, -1))


def _moments(model: ModelProto, layers: Sequence[_Layer], windows: Sequence[FloatArray]) -> list[Moments]:
    """Return the mean products of each layer's inputs, (groups, terms, terms), over places in all windows."""
    read = sorted({layer.node.input[0] for layer in layers} - {INPUT})
    watched = ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in read)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    sums = [np.zeros((*layer.weights.shape[::2], layer.weights.shape[2])) for layer in layers]
    counts = np.zeros(len(layers))
    for window in windows:
        inputs = {INPUT: window[None, None]}
        logits, *values = session.run([OUTPUT, *read], inputs)
        if not np.isfinite(logits).all():
            raise SerError(
                "the network gives logits without end on training clips; train it anew, at a lower learning rate"
            )
        seen = inputs | dict(zip(read, values, strict=True))
        for number, layer in enumerate(layers):
            patches = _patches(seen[layer.node.input[0]], layer, random)
            sums[number] += patches.transpose(0, 2, 1) @ patches
            counts[number] += patches.shape[1]
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def _patches(inputs: FloatArray, layer: _Layer, random: np.random.Generator) -> FloatArray:
    """Return what a layer multiplies with its weights, (groups, places, terms), at some places drawn from all."""
    groups, _, terms = layer.weights.shape
    if layer.node.op_type == "Gemm":
        return inputs[None]
    attributes = attributes_of(layer.node)
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    padded = np.pad(inputs[0], ((0, 0), (top, bottom), (left, right)))
    down, across = attributes.get("strides", (1, 1))
    every = sliding_window_view(padded, attributes["kernel_shape"], axis=(1, 2))[:, ::down, ::across]
    places = random.integers(every.shape[1:3], size=(PLACES, 2))
    drawn = every[:, places[:, 0], places[:, 1]]  # (channels, places, kernel height, kernel width)
    grouped = drawn.reshape(groups, -1, PLACES, drawn[0, 0].size).transpose(0, 2, 1, 3)
    return grouped.reshape(groups, PLACES, terms)
