"""Static 8-bit quantisation: which clips to measure the activations on, and the quantised model."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from edge_runtime.errors import SerError
from edge_runtime.frontend import FloatArray
from sertool.audio import content_hash
from sertool.corpora.manifest import Clip
from sertool.export.onnx import INPUT, MIN_FRAMES, OUTPUT, quiet
from sertool.export.rounding import round_weights
from sertool.run import Run

SHORT_WINDOWS = (1.0, 1.0, 0.5, 1.0, 1.0, 0.25)
"""Share of the window kept of the first, second, ... calibration clip, and so on again. The fewer frames are averaged,
the wider the pooled features spread: ranges measured on whole windows alone would clip those of short ones."""


def balanced_choice(clips: Sequence[Clip], count: int) -> list[Clip]:
    """Choose clips evenly over labels and, within them, over speakers: the same ones every time.

    Args:
        clips: to choose from, in any order.
        count: how many; all clips when there are fewer.

    Returns:
        the clips in order of choice; a shorter choice is the beginning of a longer one.
    """
    remaining = sorted(clips, key=_shuffled)
    labels: Counter[str] = Counter()
    cells: Counter[tuple[str, str]] = Counter()
    speakers: Counter[str] = Counter()
    chosen: list[Clip] = []
    while remaining and len(chosen) < count:
        clip = min(remaining, key=lambda c: (labels[c.label], cells[c.label, c.speaker], speakers[c.speaker]))
        remaining.remove(clip)
        chosen.append(clip)
        labels[clip.label] += 1
        cells[clip.label, clip.speaker] += 1
        speakers[clip.speaker] += 1
    return chosen


def _shuffled(clip: Clip) -> bytes:
    """Return a sort key without order in it, the same wherever the corpus lies."""
    return hashlib.sha256(f"{clip.path.name} {clip.start} {clip.end}".encode()).digest()


def training_clips(run: Run) -> list[Clip]:
    """Return the clips that an export may look at: those of the run's training speakers.

    Raises:
        SerError: a clip of a validation or test speaker is among them.
    """
    clips = run.clips("train")
    held_out = {clip.speaker for clip in clips} & {*run.fold.validation, *run.fold.test}
    if held_out:
        raise SerError(f"{run.path}: speaker {min(held_out)!r} both trains and tests; make the split again")
    return clips


def fingerprint(clips: Sequence[Clip]) -> str:
    """Return a hash of what the clips sound like: file contents and times, not names or places.

    Raises:
        AudioError: a file is missing.
    """
    lines = sorted(f"{content_hash(clip.path)} {clip.start} {clip.end}" for clip in clips)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def with_short_windows(windows: Iterable[FloatArray]) -> Iterator[FloatArray]:
    """Cut some windows (frames, mel_bands) as :data:`SHORT_WINDOWS` says, to no less than the network takes."""
    for window, share in zip(windows, cycle(SHORT_WINDOWS), strict=False):
        yield window[: max(MIN_FRAMES, int(share * len(window)))]


class _Windows:
    """What onnxruntime calls a CalibrationDataReader, by its one method."""

    def __init__(self, windows: Iterable[FloatArray]) -> None:
        self._windows = iter(windows)

    def get_next(self) -> dict[str, FloatArray] | None:
        window = next(self._windows, None)
        return None if window is None else {INPUT: window[None, None]}


def quantize(model: ModelProto, windows: Iterable[FloatArray]) -> ModelProto:
    """Quantise to 8-bit activations and weights (QDQ form), by the smallest and largest value seen.

    Activations are unsigned, because onnxruntime runs signed ones partly in float on x86, and ARM has kernels for
    both. Weights are signed, with one scale a channel, and use 7 of their 8 bits: x86 without VNNI adds two products in
    16 bits, where full 8-bit weights overflow silently (measured on a MobileNet-15: 7 dB instead of 31), and a file
    must give one answer on desk and board; how they are rounded says :mod:`sertool.export.rounding`. The layer that
    makes the logits stays float: it holds a few hundred weights a class, and a logit beyond the range seen in
    calibration would be clipped, the largest error of all. The file answers the same on every processor, see
    :func:`_agree_everywhere`.

    Args:
        model: what :func:`sertool.export.onnx.to_onnx` returns; left as it is.
        windows: normalised log-Mel windows (frames, mel_bands) of training speakers, of several lengths.

    Returns:
        a checked model with the same input and output.
    """
    windows = list(windows)
    logits_layer = [node.name for node in model.graph.node if OUTPUT in node.output]
    onnxruntime.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory() as folder, quiet():
        # By files, because the quantizer moves the weights of a model in memory to a file that it then deletes.
        source, path = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(round_weights(model, windows), source)
        quantize_static(
            source,
            path,
            _Windows(windows),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=logits_layer,
        )
        quantized = onnx.load(path)
    quantized.ClearField("metadata_props")
    _agree_everywhere(quantized.graph)
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def _agree_everywhere(graph: GraphProto) -> None:
    """Choose the sizes of 8-bit steps so that processors that add in another order or round otherwise still agree.

    Three kinds of sums are float in a quantised network: the means over frequency and time, residual additions, and the
    logits. Left alone, the last bit of one is another on ARM than on x86, and where it decides between two 8-bit steps,
    all logits differ in the third or fourth digit.

    Means and logits are made exact in float32: with steps of a power of two before a mean, 2^16 terms fit; the logits'
    weights are rounded to the finest power of two for which no sum can pass 24 bits, about ten bits of their own. An
    addition gets steps that are multiples of 1/255 of the result's: 255 is odd, so no sum lies nearer to the middle
    between two steps than 1/510, far more than any library is off. A network of the user's own that is built otherwise
    stays as it is.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    steps = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    results = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
    layers = [node for node in graph.node if node.op_type in {"Conv", "Gemm"} and OUTPUT not in node.output]
    # Their biases are quantised, too, with this step as a factor.
    fixed = {steps[node.input[0]] for node in layers if node.input[0] in steps}
    # Backwards: an addition's terms depend on its result's step, which a mean may change.
    for node in reversed(graph.node):
        free = [constants[steps[name]] for name in node.input if steps.get(name, "") not in {"", *fixed}]
        if node.op_type == "ReduceMean" or OUTPUT in node.output:
            for step in free:
                _replace(step, step_of_exact_sum(numpy_helper.to_array(step)))
        elif node.op_type == "Add" and node.output[0] in results:
            result = numpy_helper.to_array(constants[results[node.output[0]]])
            for step in free:
                _replace(step, step_of_term(numpy_helper.to_array(step), result))
        if node.op_type == "Gemm" and OUTPUT in node.output and free and len(node.input) == 3:
            layer = [constants[name] for name in node.input[1:]]
            weights, bias, step = (numpy_helper.to_array(tensor) for tensor in (*layer, *free))
            for tensor, values in zip(layer, _round_to_exact(weights, bias, step), strict=True):
                _replace(tensor, values)


def step_of_exact_sum(step: FloatArray) -> FloatArray:
    """Return the power of two, not less than a step, by which means and logits are exact in float32.

    Example:
        >>> step_of_exact_sum(np.array([0.2, 0.25]))
        array([0.25, 0.25])
    """
    return np.asarray(2.0 ** np.ceil(np.log2(step)))


def step_of_term(step: FloatArray, result: FloatArray) -> FloatArray:
    """Return the step of an addition's term: a multiple of 1/255 of the result's, and not less than its own.

    Example:
        >>> step_of_term(np.array([0.5, 0.7]), np.array(1.275))
        array([0.5, 0.7])
    """
    return np.asarray(np.ceil(255 * step / result) / 255 * result)


def _round_to_exact(weights: FloatArray, bias: FloatArray, step: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Round a layer (classes, inputs) so that ``weights @ x + bias`` is exact for any 8-bit ``x`` in units of ``step``.

    Example:
        >>> _round_to_exact(np.array([[1.0, 1 / 3]]), np.array([0.1]), np.float32(0.5))
        (array([[1.        , 0.33334351]]), array([0.1000061]))
    """
    largest = np.maximum(255 * np.abs(weights).sum(axis=1) + np.abs(bias / step), np.finfo(np.float32).tiny)
    # Rounding may add half a unit to every term.
    terms = 128 * weights.shape[1] + 1
    unit = 2.0 ** np.ceil(np.log2(largest / (2**24 - terms)))
    return (
        np.round(weights / unit[:, None]) * unit[:, None],
        np.round(bias / (unit * step)) * (unit * step),
    )


def _replace(tensor: TensorProto, values: NDArray[np.floating]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
