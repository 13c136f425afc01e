"""Write a valid model file of a stream by hand: one convolution over time with a state, and one linear layer.

It recognises nothing; it is for trying out what reads such files, without torch and without a corpus.

    python tools/tiny_stream.py tiny-stream.onnx
"""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from tiny_artifact import LABELS, tiny_artifact

from edge_runtime.artifact import METADATA_KEY, Artifact, GoldenVector, golden_signal
from edge_runtime.backends import STREAM_KEY
from edge_runtime.frontend import FloatArray, log_mel
from edge_runtime.model_file import seal

STRIDE = 16
"""Frames per feature, and as many are remembered."""

CHANNELS = 6


def tiny_stream_model(artifact: Artifact | None = None, form: dict[str, Any] | None = None) -> ModelProto:
    """Return the model.

    Args:
        artifact: its description; a correct one when None.
        form: changes of what is said of the stream itself.
    """
    head = _model([helper.make_node("ReduceMean", ["features", "time"], ["mean"], keepdims=0), _linear()], "head")
    said = {"stride": STRIDE, "reset": [0], "head": base64.b64encode(head.SerializeToString()).decode()}
    trunk = _model(_trunk(), "trunk")
    description = (artifact or tiny_stream_artifact()).to_json()
    helper.set_model_props(trunk, {METADATA_KEY: description, STREAM_KEY: json.dumps(said | (form or {}))})
    return trunk


def tiny_features(frames: FloatArray) -> FloatArray:
    """Return the features (channels, n) of normalised frames (frames, mel_bands), by the formula."""
    loudness = np.concatenate([np.zeros(STRIDE), frames.mean(axis=1)])
    pieces = [loudness[k * STRIDE : (k + 2) * STRIDE] for k in range(len(frames) // STRIDE)]
    return np.maximum(np.stack(pieces) @ _weights()["kernel"].T, 0).T.astype(np.float32)


def tiny_logits(features: FloatArray) -> FloatArray:
    """Return the logits of features (channels, n), by the formula."""
    weights = _weights()
    return np.asarray(features.mean(axis=1) @ weights["weights"] + weights["bias"], np.float32)


def tiny_stream_artifact(window_samples: int = 32000, prior_frames: int = 0) -> Artifact:
    """Return the description of the model, with the golden vector worked out in numpy."""
    artifact = tiny_artifact(window_samples)
    artifact = replace(artifact, normalization=replace(artifact.normalization, prior_frames=prior_frames))
    frames = log_mel(golden_signal(window_samples))
    logits = tiny_logits(tiny_features(artifact.normalization.apply(frames)))
    return replace(
        artifact,
        golden=GoldenVector(tuple(frames.mean(axis=0).tolist()), tuple(logits.tolist())),
        form="stream",
        stride=STRIDE,
        context_frames=STRIDE,
        receptive_field=2 * STRIDE,
    )


def _weights() -> dict[str, FloatArray]:
    random = np.random.default_rng(3)
    return {
        "kernel": random.normal(0, 0.3, (CHANNELS, 2 * STRIDE)).astype(np.float32),
        "weights": random.normal(0, 1, (CHANNELS, len(LABELS))).astype(np.float32),
        "bias": random.normal(0, 0.1, len(LABELS)).astype(np.float32),
    }


def _trunk() -> list[NodeProto]:
    """The mean over frequency comes first: it and a convolution over time alone may change places."""
    return [
        helper.make_node("ReduceMean", ["logmel", "frequency"], ["loudness"], keepdims=1),
        helper.make_node("Transpose", ["state_0"], ["past"], perm=[0, 3, 1, 2]),
        helper.make_node("Concat", ["past", "loudness"], ["both"], axis=2),
        helper.make_node("Slice", ["both", "last", "end", "time"], ["kept"]),
        helper.make_node("Transpose", ["kept"], ["next_state_0"], perm=[0, 2, 3, 1]),
        helper.make_node("Conv", ["both", "kernel"], ["maps"], kernel_shape=[2 * STRIDE, 1], strides=[STRIDE, 1]),
        helper.make_node("Relu", ["maps"], ["rectified"]),
        helper.make_node("ReduceMean", ["rectified", "frequency"], ["features"], keepdims=0),
    ]


def _linear() -> NodeProto:
    return helper.make_node("Gemm", ["mean", "weights", "bias"], ["logits"])


def value(name: str, shape: list[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _model(nodes: list[NodeProto], name: str) -> ModelProto:
    weights = _weights()
    weights["kernel"] = weights["kernel"].reshape(CHANNELS, 1, 2 * STRIDE, 1)
    indices = {"time": 2, "frequency": 3, "last": -STRIDE, "end": np.iinfo(np.int64).max}
    constants = weights | {key: np.array([index], np.int64) for key, index in indices.items()}
    features, logits = value("features", [1, CHANNELS, "n"]), value("logits", [1, len(LABELS)])
    state: list[int | str] = [1, STRIDE, 1, 1]
    inputs, outputs = [features], [logits]
    if name == "trunk":
        inputs = [value("logmel", [1, 1, "frames", 64]), value("state_0", state)]
        outputs = [features, value("next_state_0", state)]
    read = {tensor for node in nodes for tensor in node.input}
    initializers = [numpy_helper.from_array(np.asarray(v), key) for key, v in constants.items() if key in read]
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(seal(tiny_stream_model().SerializeToString()))
