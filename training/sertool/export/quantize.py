"""Static 8-bit quantisation: which clips to measure the activations on, and the quantised model."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import onnx
import onnxruntime
from onnx import ModelProto
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
    must give one answer on desk and board. The layer that makes the logits stays float: it holds a few hundred
    weights a class, and a logit beyond the range seen in calibration would be clipped, the largest error of all.

    Args:
        model: what :func:`sertool.export.onnx.to_onnx` returns; left as it is.
        windows: normalised log-Mel windows (frames, mel_bands) of training speakers, of several lengths.

    Returns:
        a checked model with the same input and output.
    """
    logits_layer = [node.name for node in model.graph.node if OUTPUT in node.output]
    onnxruntime.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory() as folder, quiet():
        # By files, because the quantizer moves the weights of a model in memory to a file that it then deletes.
        source, path = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
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
    onnx.checker.check_model(quantized, full_check=True)
    return quantized
