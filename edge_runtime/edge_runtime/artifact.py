"""The model file's own description: everything a runtime needs, as JSON under one metadata key.

The exporter writes it (:meth:`Artifact.to_json`), the runtime reads it (:meth:`Artifact.from_json`) and checks at
load, with :func:`check_golden`, that this machine computes what the exporting machine computed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from edge_runtime.errors import ArtifactError, UsageError
from edge_runtime.frontend import FloatArray, FrontEnd, Normalization, log_mel

METADATA_KEY = "ser_artifact"
SCHEMA_VERSION = 2

FORMS = ("window", "stream")

UNSEALED = "sha256:" + 64 * "0"
"""What stands for the hash of the file until :func:`edge_runtime.model_file.seal` puts it in."""

LARGEST_SIZE = 16_000_000
"""Samples or bands beyond which a description is damaged: 1000 s at 16 kHz."""

LONGEST_WINDOW = 100_000
"""Frames beyond which a description is damaged; their spectrogram takes 26 MB."""


LARGEST_FRAME = 8192
"""Samples beyond which a description is damaged: half a second at 16 kHz."""

MOST_BANDS = 512
"""Mel bands beyond which a description is damaged: with the largest frame, their filters take 17 MB."""


@dataclass(frozen=True)
class GoldenVector:
    """What the exported model gives for :func:`golden_signal`, and how closely a runtime must agree.

    Attributes:
        log_mel_mean: mean over time of each mel band of the signal, dB, before normalisation.
        logits: the exported file's logits for it.
        log_mel_tolerance: largest accepted difference per band, dB.
        logits_tolerance: largest accepted difference per logit.
    """

    log_mel_mean: tuple[float, ...]
    logits: tuple[float, ...]
    log_mel_tolerance: float = 1e-3
    logits_tolerance: float = 1e-2


@dataclass(frozen=True)
class Artifact:
    """The self-description inside a model file.

    Attributes:
        labels: class names in the order of the logits.
        front_end: parameters of the log-Mel spectrogram.
        normalization: what is applied to it.
        window_samples: length of the network's input as samples; clips are tiled or cut to it.
        network: name of the architecture, e.g. ``resnet9``.
        precision: ``fp32``, ``fp16`` (weights stored in 16 bits) or ``int8``.
        licence: licence of the weights, as their training data allow.
        golden: self-test computed at export.
        temperature: divides the logits before the softmax, so that probabilities mean what they say.
        thresholds: smallest probability per label at which the label is given, else the answer is ``uncertain``.
        parameters: number of weights.
        macs: multiply-accumulate operations for one window.
        provenance: corpora and their licences, split hash, teacher, recipe, versions.
        metrics: results on test speakers with their intervals.
        form: ``window``, a network that takes whole windows, or ``stream``, one that carries its past in states and
            takes every frame once.
        stride: of a stream, frames per feature; 0 for a window.
        context_frames: of a stream, frames before a window that its features still depend on, in whole strides.
        receptive_field: of a stream, frames that one feature depends on.
        card: the model card, Markdown.
        content_hash: of the file; empty in files of schema 1, which carry none.
        schema: version of this description.

    Example:
        >>> from edge_runtime import Recognizer
        >>> artifact = Recognizer("model.onnx").artifact
        >>> artifact.labels, artifact.window_samples / artifact.front_end.sample_rate
        (('anger', 'joy', 'neutral', 'sadness'), 2.0)
    """

    labels: tuple[str, ...]
    front_end: FrontEnd
    normalization: Normalization
    window_samples: int
    network: str
    precision: str
    licence: str
    golden: GoldenVector
    temperature: float = 1.0
    thresholds: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    macs: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    form: str = "window"
    stride: int = 0
    context_frames: int = 0
    receptive_field: int = 0
    card: str = ""
    content_hash: str = UNSEALED
    schema: int = SCHEMA_VERSION

    @property
    def window_seconds(self) -> float:
        """Length of the network's window in seconds."""
        return self.window_samples / self.front_end.sample_rate

    @property
    def window_frames(self) -> int:
        """Length of the network's window in log-Mel frames."""
        return self.front_end.frames(self.window_samples)

    @property
    def window_features(self) -> int:
        """Length of the network's window in features of a stream."""
        return self.window_frames // self.stride

    def to_json(self) -> str:
        """Return the description as JSON text with sorted keys, ``content_hash`` as it is: see :data:`UNSEALED`."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str = "model") -> Artifact:
        """Read a description back and check that it is whole and of a known schema.

        Args:
            text: what :meth:`to_json` wrote.
            where: how to name the file in errors.

        Raises:
            ArtifactError: not JSON, a newer schema, a missing field, or fields that contradict each other.
        """
        try:
            content = json.loads(text)
            schema = int(content["schema"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ArtifactError(f"{where}: its {METADATA_KEY!r} description is damaged; export it again") from error
        if schema > SCHEMA_VERSION:
            raise ArtifactError(
                f"{where}: schema {schema} is newer than {SCHEMA_VERSION}, the newest this version of ser-edge "
                "reads; upgrade ser-edge"
            )
        if schema < 2:
            content["content_hash"] = ""
        try:
            content["labels"] = tuple(content["labels"])
            content["front_end"] = FrontEnd(**content["front_end"])
            content["normalization"] = Normalization(**as_tuples(content["normalization"]))
            content["golden"] = GoldenVector(**as_tuples(content["golden"]))
            known = {f.name for f in fields(cls)}
            artifact = cls(**{key: value for key, value in content.items() if key in known})
            wrong = artifact._contradiction()
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split())  # it may quote the file
            raise ArtifactError(
                f"{where}: its description lacks or garbles a field ({reason}); export it again"
            ) from error
        if wrong:
            raise ArtifactError(f"{where}: {wrong}; export it again")
        return artifact

    def _contradiction(self) -> str | None:
        """Say what no export could have written, or None; TypeError where a number is none."""
        front_end, bands, classes = self.front_end, self.front_end.mel_bands, len(self.labels)
        vectors = {
            "normalization.mean": (self.normalization.mean, bands),
            "normalization.std": (self.normalization.std, bands),
            "golden.log_mel_mean": (self.golden.log_mel_mean, bands),
            "golden.logits": (self.golden.logits, classes),
        }
        for name, (values, expected) in vectors.items():
            if len(values) != expected:
                return f"{name} has {len(values)} values, expected {expected}"
            if not all(math.isfinite(value) for value in values):
                return f"{name} holds a value that is not finite"
        sizes = (front_end.sample_rate, front_end.window, front_end.hop, bands, self.window_samples)
        stream = (self.stride, self.context_frames, self.receptive_field)
        plausible = {
            "labels": classes >= 1
            and len(set(self.labels)) == classes
            and all(isinstance(n, str) for n in self.labels),
            "front_end": all(type(size) is int and 0 < size <= LARGEST_SIZE for size in sizes)
            and 0 <= front_end.min_hz < front_end.max_hz <= front_end.sample_rate / 2
            and front_end.window <= LARGEST_FRAME
            and bands <= MOST_BANDS
            and front_end.floor > 0,
            "window_samples": front_end.window <= self.window_samples and self.window_frames <= LONGEST_WINDOW,
            "card": isinstance(self.card, str),
            "content_hash": isinstance(self.content_hash, str),
            "normalization.std": min(self.normalization.std) > 0,
            "normalization.prior_frames": all(
                type(frames) is int and 0 <= frames <= LARGEST_SIZE
                for frames in (self.normalization.prior_frames, self.normalization.memory_frames)
            ),
            "normalization.personal": isinstance(self.normalization.personal, bool),
            "temperature": 0 < self.temperature < math.inf,
            "thresholds": all(0 <= value <= 1 for value in self.thresholds.values()),
            "form": self.form in FORMS,
            "stride": all(type(frames) is int and 0 <= frames <= LARGEST_SIZE for frames in stream)
            and (self.form == "window" or 1 <= self.stride <= self.window_frames),
        }
        return next((f"{name} cannot be right" for name, right in plausible.items() if not right), None)


def as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON made of a dataclass with its lists as the tuples they were.

    Example:
        >>> as_tuples({"mean": [0.5, 1.0], "prior_frames": 8})
        {'mean': (0.5, 1.0), 'prior_frames': 8}
    """
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def golden_signal(samples: int, sample_rate: int = 16000) -> FloatArray:
    """Return the self-test signal: a rising chirp with a 3 Hz envelope over a steady 1.8 kHz tone.

    A formula instead of stored samples, so that exporter and runtime agree on it without carrying it around.

    Args:
        samples: length.
        sample_rate: Hz.

    Returns:
        float32 (samples,) within [-0.45, 0.45].

    Example:
        >>> golden_signal(16000).shape
        (16000,)
    """
    time = np.arange(samples) / sample_rate
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * time)
    chirp = np.sin(2 * np.pi * (200 * time + 150 * time**2))
    return (0.35 * envelope * chirp + 0.1 * np.sin(2 * np.pi * 1800 * time)).astype(np.float32)


def check_golden(
    artifact: Artifact, logits_of: Callable[[FloatArray], FloatArray], where: str = "model"
) -> tuple[float, float]:
    """Check that this machine's front-end and inference library reproduce the export.

    Args:
        artifact: the description with the expected values.
        logits_of: maps a normalised log-Mel window (frames, mel_bands) to its logits (classes,).
        where: how to name the file in errors.

    Returns:
        the largest difference of the log-Mel spectrogram, dB, and of the logits.

    Raises:
        ArtifactError: either differs by more than its tolerance.
    """
    golden = artifact.golden
    signal = golden_signal(artifact.window_samples, artifact.front_end.sample_rate)
    try:
        frames = log_mel(signal, artifact.front_end)
    except UsageError as error:
        raise ArtifactError(f"{where}: {error}; export it again") from error
    log_mel_off = float(np.max(np.abs(frames.mean(axis=0) - np.asarray(golden.log_mel_mean))))
    if not log_mel_off <= golden.log_mel_tolerance:
        raise ArtifactError(
            f"{where}: the self-test's log-Mel spectrogram differs by {log_mel_off:.2g} dB "
            f"(at most {golden.log_mel_tolerance:g}); file and ser-edge do not belong together"
        )
    logits = logits_of(artifact.normalization.apply(frames))
    if logits.shape != (len(artifact.labels),):
        raise ArtifactError(f"{where}: gives logits of shape {logits.shape} for {len(artifact.labels)} labels")
    off = float(np.max(np.abs(logits - np.asarray(golden.logits))))
    if not off <= golden.logits_tolerance:
        raise ArtifactError(
            f"{where}: the self-test's logits differ by {off:.2g} (at most {golden.logits_tolerance:g}); "
            "the file is damaged or this inference library computes it wrongly"
        )
    return log_mel_off, off
