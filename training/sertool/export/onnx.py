"""A trained network as one ONNX model: any batch, any length of window, batch normalisation folded in."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import nn

from edge_runtime.errors import SerError

INPUT = "logmel"
OUTPUT = "logits"

MIN_FRAMES = 32
"""Shortest window: the deepest networks halve the time axis five times."""


def to_onnx(network: nn.Module, frames: int, mel_bands: int) -> ModelProto:
    """Convert a network by ``torch.onnx.export(dynamo=True)``.

    Args:
        network: in evaluation mode; maps float32 (B, 1, frames, mel_bands) to (B, classes).
        frames: length of the window it was trained on; the model takes any length from :data:`MIN_FRAMES`.
        mel_bands: bands of the spectrogram.

    Returns:
        a checked model with input ``logmel`` (batch, 1, frames, mel_bands) and output ``logits`` (batch, classes),
        all weights inside.

    Raises:
        SerError: the network computes something that ONNX cannot express for windows of any length.
    """
    # An example batch of 1 would be taken for a constant.
    example = torch.zeros(2, 1, frames, mel_bands)
    dynamic = {0: torch.export.Dim("batch"), 2: torch.export.Dim("frames", min=MIN_FRAMES)}
    with quiet():
        try:
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=(dynamic,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
        except Exception as error:  # whatever operators, guards and shapes may bring up
            cause = error.__cause__ or error
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise SerError(f"network {type(network).__name__} cannot be written as ONNX: {reason}") from error
    assert program is not None  # without dynamo it would be
    model = program.model_proto
    _fold_pads(model)
    _forget_source(model)
    onnx.checker.check_model(model, full_check=True)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of torch's exporter and onnxruntime's quantizer, which ask nothing of the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name.

    Example:
        >>> attributes_of(helper.make_node("Gemm", ["a", "b"], ["c"], transB=1))
        {'transB': 1}
    """
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _fold_pads(model: ModelProto) -> None:
    """Turn the zeros that causal padding puts before a convolution or a max-pool into its own padding.

    The exporter's optimiser does so for convolutions only, and not in every version. A Pad left alone keeps the
    quantised kernels around it apart. A pool pads with minus infinity instead of zero; after the ReLU that every
    pool of these networks follows, it makes no difference.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    pads = {node.output[0]: node for node in graph.node if node.op_type == "Pad"}
    for node in list(graph.node):
        if node.op_type in {"Conv", "MaxPool"} and node.input[0] in pads:
            pad = pads.pop(node.input[0])
            _widen(node, numpy_helper.to_array(constants[pad.input[1]]))
            node.input[0] = pad.input[0]
            graph.node.remove(pad)


def _widen(node: NodeProto, pads: NDArray[np.int64]) -> None:
    """Add a Pad's zeros (8,: begins of the four axes, then ends) to a node's (4,: of time and frequency)."""
    own = next(attribute for attribute in node.attribute if attribute.name == "pads")
    more = pads.reshape(2, 4)[:, 2:].ravel()
    own.CopyFrom(helper.make_attribute("pads", (np.array(own.ints) + more).tolist()))


def _forget_source(model: ModelProto) -> None:
    """Delete the exporter's notes: stack traces with the paths of this machine."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
