"""Weights in half precision: half the file, the same arithmetic."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from sertool.export.parity import ExportError


def to_half(model: ModelProto) -> ModelProto:
    """Store weights and biases as float16 and widen them when the model is loaded.

    This is a form of storage: inference libraries fold the widening when they load the file and then compute in
    float32, as fast and on the same processors as before. LiteRT wants a layer's bias of the type of its weights.

    Args:
        model: a float model, left as it is.

    Returns:
        a checked model with the same input and output.

    Raises:
        ExportError: a weight lies beyond the largest float16, 65504.
    """
    half = ModelProto()
    half.CopyFrom(model)
    casts = []
    for tensor in half.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.dims:
            weights = numpy_helper.to_array(tensor)
            if not np.abs(weights).max() <= np.finfo(np.float16).max:
                raise ExportError(f"{tensor.name} holds a weight that float16 cannot; use --precision fp32")
            stored = f"{tensor.name}_float16"
            casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(weights.astype(np.float16), stored))
    nodes = [*casts, *half.graph.node]
    half.graph.ClearField("node")
    half.graph.node.extend(nodes)
    checker.check_model(half, full_check=True)
    return half
