"""Files of networks with random weights, which cost what trained ones cost: for what measures cost alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from edge_runtime.frontend import FloatArray, FrontEnd
from sertool.export.artifact import file_content
from sertool.export.onnx import to_onnx
from sertool.export.quantize import quantize, with_short_windows
from sertool.export.stream import to_stream
from sertool.networks import Student, build_network
from sertool.recipe import PAPER_WINDOW_SAMPLES

FRONT_END = FrontEnd()
FRAMES = FRONT_END.frames(PAPER_WINDOW_SAMPLES)
FRAMES_A_SECOND = FRONT_END.frame_rate

KINDS = ("onnx fp32", "onnx int8", "tflite fp32", "tflite int8")


def noise(frames: int) -> FloatArray:
    """Return normalised log-Mel frames (frames, mel_bands)."""
    return np.random.default_rng(0).normal(size=(frames, FRONT_END.mel_bands)).astype(np.float32)


def random_network(name: str) -> Student:
    """Return a causal network, which every form can be made from."""
    torch.manual_seed(0)
    return build_network(name, 7, "causal").eval()


def write_files(network: Student, folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write a network as a window and as a stream, without description, and return both files of each of KINDS."""
    model = to_onnx(network, FRAMES, FRONT_END.mel_bands)
    models = {"fp32": model, "int8": quantize(model, with_short_windows([noise(FRAMES)] * 3))}
    files = {}
    for kind in KINDS:
        suffix, precision = kind.split()
        forms = {"window": models[precision], "stream": to_stream(models[precision])}
        paths = [folder / f"{precision}-{form}.{suffix}" for form in forms]
        for path, form in zip(paths, forms.values(), strict=True):
            path.write_bytes(file_content(form, path.suffix, FRAMES))
        files[kind] = (paths[0], paths[1])
    return files
