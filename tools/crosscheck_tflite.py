"""Compare our TFLite files of all four networks with those of the official converter, litert-torch.

litert-torch brings 1.2 GB that nothing else here needs, so it gets an environment of its own:

    python -m venv --system-site-packages /tmp/official       # from the project's environment
    /tmp/official/bin/pip install 'litert-torch==0.10.0'
    /tmp/official/bin/python tools/crosscheck_tflite.py

Prints sizes, operators and largest differences of the logits; exit code 1 where one exceeds 1e-5 of the largest logit.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from random_networks import settle

from edge_runtime.frontend import FloatArray
from edge_runtime.litert import WINDOW
from sertool.export.onnx import to_onnx
from sertool.export.tflite import to_tflite
from sertool.networks import NETWORKS, Student, TimePadding, build_network, predict

FRAMES, MEL_BANDS, WINDOWS, CLASSES = 373, 64, 4, 7
LARGEST_DIFFERENCE = 1e-5


def official(network: Student, folder: Path) -> bytes:
    """Return the official converter's file."""
    try:
        import litert_torch
    except ModuleNotFoundError:
        sys.exit("crosscheck_tflite: litert-torch is not installed; see the first lines of this file")
    path = folder / "official.tflite"
    litert_torch.convert(network, (torch.zeros(1, 1, FRAMES, MEL_BANDS),)).export(str(path))
    return path.read_bytes()


def logits(content: bytes, windows: FloatArray) -> FloatArray:
    """Return what a file of either order of axes answers; with one channel the orders hold the same numbers."""
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    taken, given = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    found = []
    for window in windows:
        interpreter.set_tensor(taken["index"], window.reshape(taken["shape"]))
        interpreter.invoke()
        found.append(interpreter.get_tensor(given["index"]))
    return np.concatenate(found)


def operators(content: bytes) -> str:
    """Count a file's operators."""
    plain: Any = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=plain)
    kinds = Counter(operator["op_name"] for operator in interpreter._get_ops_details())
    return ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    windows = np.random.default_rng(0).normal(size=(WINDOWS, FRAMES, MEL_BANDS)).astype(np.float32)
    worst = 0.0
    for name in NETWORKS:
        for padding in get_args(TimePadding):
            network = settle(build_network(name, CLASSES, padding), items=4, frames=96, bias_std=1.0)
            expected = predict(network, windows)
            with tempfile.TemporaryDirectory() as folder:
                theirs = official(network, Path(folder))
            ours = to_tflite({WINDOW: (to_onnx(network, FRAMES, MEL_BANDS), FRAMES)})
            for whose, content in (("ours", ours), ("official", theirs)):
                off = float(np.abs(logits(content, windows) - expected).max() / np.abs(expected).max())
                print(
                    f"{name:<12} {padding:<7} {whose:<9} {len(content) / 1e6:6.2f} MB  {off:.1e}  {operators(content)}"
                )
            between = logits(ours, windows) - logits(theirs, windows)
            worst = max(worst, float(np.abs(between).max() / np.abs(expected).max()))
    print(f"largest difference between the two, relative to the largest logit: {worst:.1e}")
    if not worst <= LARGEST_DIFFERENCE:
        sys.exit(f"crosscheck_tflite: more than {LARGEST_DIFFERENCE:g}")


if __name__ == "__main__":
    main()
