"""Networks with random weights: they cost what trained ones cost, and settled ones show what is computed wrongly."""

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


def settle(network: Student, items: int = 2, frames: int = 64, bias_std: float = 0.2) -> Student:
    """Give fresh batch normalisations weights and statistics that a wrong folding would show.

    Args:
        network: with fresh weights; changed.
        items: windows of noise that the statistics are taken of.
        frames: of each.
        bias_std: deviation of the biases.

    Returns:
        The network, in evaluation mode.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=bias_std)
    with torch.no_grad():
        network.train()(torch.randn(items, 1, frames, FRONT_END.mel_bands))
    return network.eval()


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
