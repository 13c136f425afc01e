"""Write a valid model file by hand: the mean over time of the log-Mel frames, and one linear layer.

It recognises nothing; it is for trying out what reads model files, without torch and without a corpus.

    python tools/tiny_artifact.py tiny.onnx       # or tiny.tflite
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.artifact import METADATA_KEY, Artifact, GoldenVector, golden_signal
from edge_runtime.frontend import FrontEnd, Normalization, log_mel
from edge_runtime.litert import WINDOW
from edge_runtime.model_file import seal
from sertool.export.tflite import to_tflite

LABELS = ("anger", "joy", "neutral", "sadness")


def tiny_model(artifact: Artifact | None = None, description: str | None = None, **changes: Any) -> onnx.ModelProto:
    """Return the model.

    Args:
        artifact: its description; a correct one when None.
        description: the description's text, instead of the artifact's.
        **changes: fields of the artifact to set otherwise.
    """
    artifact = artifact or tiny_artifact()
    weights, bias = _layer(len(artifact.labels))
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["logmel", "axes"], ["mean"], keepdims=0),
            helper.make_node("Gemm", ["mean", "weights", "bias"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("logmel", TensorProto.FLOAT, ["N", 1, "frames", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(artifact.labels)])],
        [
            numpy_helper.from_array(np.array([1, 2]), "axes"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {METADATA_KEY: description or replace(artifact, **changes).to_json()})
    return model


def tiny_file(suffix: str = ".onnx", **changes: Any) -> bytes:
    """Return the whole file of a format, sealed; see :func:`tiny_model`."""
    model = tiny_model(**changes)
    if suffix == ".onnx":
        return seal(model.SerializeToString())
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return seal(to_tflite({WINDOW: (model, tiny_artifact().window_frames)}, metadata))


def _layer(classes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    return (
        random.normal(0, 0.3, (64, classes)).astype(np.float32),
        random.normal(0, 0.1, classes).astype(np.float32),
    )


def tiny_artifact(window_samples: int = 32000) -> Artifact:
    """Return the description of the tiny model, with the golden vector worked out in numpy."""
    normalization = Normalization((-40.0,) * 64, (20.0,) * 64)
    frames = log_mel(golden_signal(window_samples))
    weights, bias = _layer(len(LABELS))
    logits = normalization.apply(frames).mean(axis=0) @ weights + bias
    return Artifact(
        labels=LABELS,
        front_end=FrontEnd(),
        normalization=normalization,
        window_samples=window_samples,
        network="tiny",
        precision="fp32",
        licence="CC0-1.0",
        golden=GoldenVector(tuple(frames.mean(axis=0).tolist()), tuple(logits.tolist())),
        parameters=weights.size + bias.size,
        macs=weights.size,
        card="# tiny\n\nIt recognises nothing.\n",
        provenance={"recipe": "written by hand"},
        metrics={"test": {"uar": 0.25, "uar_interval": [0.2, 0.3], "items": 8, "speakers": 2}},
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(tiny_file(Path(sys.argv[1]).suffix))
