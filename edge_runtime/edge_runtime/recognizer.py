"""From samples to probabilities: front-end, normalisation and network of one artifact, put together.

Every artifact answers clips; one that holds a stream also hears audio that goes on, every frame once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import copy
from pathlib import Path

import numpy as np

from edge_runtime.artifact import Artifact, check_golden
from edge_runtime.backends import StreamBackend, open_backend
from edge_runtime.calibration import Calibration
from edge_runtime.errors import ArtifactError, UsageError
from edge_runtime.frontend import (
    FloatArray,
    FrontEnd,
    LogMelStream,
    RunningNormalizer,
    as_samples,
    log_mel,
    tile_or_cut,
)
from edge_runtime.installed import RUNS_ON
from edge_runtime.model_file import read_model_file

LogMel = Callable[[FloatArray, FrontEnd], FloatArray]
"""What computes the spectrogram of a signal, as :func:`~edge_runtime.frontend.log_mel` does."""


class Recognizer:
    """One model file, loaded and checked. It keeps no state between calls.

    Args:
        path: an artifact written by ``sertool export``.
        threads: threads per inference; 1 is best on a board that does other work too.

    Attributes:
        artifact: the file's description.
        path: the file.
        self_test: how far this machine's log-Mel spectrogram (dB) and logits are off those of the export.

    Raises:
        ArtifactError: the file is missing, damaged, not one of ours, of a newer schema, or fails its self-test.

    Example:
        >>> recognizer = Recognizer("model.onnx")
        >>> probabilities = recognizer.probabilities(samples)  # of a clip
        >>> probabilities.shape, round(float(probabilities.sum()), 3)
        ((4,), 1.0)
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.path = Path(path)
        model = read_model_file(path)
        self.artifact = model.artifact()
        self._backend = open_backend(model, threads)
        stride = self._backend.stride if isinstance(self._backend, StreamBackend) else 0
        if (stride > 0) != (self.artifact.form == "stream") or stride != self.artifact.stride:
            raise ArtifactError(f"{path}: its description is that of another form of network; export it again")
        self.self_test = check_golden(self.artifact, self._predict, str(path))

    @property
    def name(self) -> str:
        """What tells it from other models: the file's name, or that of the package it is installed in."""
        return self.path.parent.name if self.path.name in RUNS_ON else self.path.name

    def calibrated(self, calibration: Calibration) -> Recognizer:
        """Return the same model with the constants of a person and a microphone in the place of its own.

        Raises:
            UsageError: the model was not trained for it, or hears another spectrogram.
        """
        personal = copy(self)
        personal.artifact = calibration.applied_to(self.artifact, str(self.path))
        return personal

    def logits(self, samples: object, log_mel: LogMel = log_mel) -> FloatArray:
        """Return the logits of a clip.

        A window hears the clip tiled or cut to its length, as in training. A stream hears it once, from its beginning
        and for at most a window, as it hears a segment; only a clip that is shorter than a stride is tiled, to one.

        Args:
            samples: (n,) samples at the artifact's rate, in [-1, 1], n >= 1.
            log_mel: what computes the spectrogram of a window, where several models share it.

        Returns:
            float32 (classes,).

        Raises:
            AudioError: an empty clip, several channels, or samples that are not finite.
        """
        artifact, clip = self.artifact, as_samples(samples)
        if artifact.form == "window":
            window = tile_or_cut(clip, artifact.window_samples)
            return self._predict(artifact.normalization.apply(log_mel(window, artifact.front_end)))
        stream = self.stream()
        shortest = artifact.front_end.samples(artifact.stride)
        stream.push(tile_or_cut(clip, min(max(len(clip), shortest), artifact.window_samples)))
        return stream.logits()

    def probabilities(self, samples: object, log_mel: LogMel = log_mel) -> FloatArray:
        """Return the calibrated probability of each label for a clip; see :meth:`logits` for the arguments."""
        return softmax(self.logits(samples, log_mel) / self.artifact.temperature)

    def stream(self, keep: int | None = None, normalizer: RunningNormalizer | None = None) -> FeatureStream:
        """Return a new stream, which has heard nothing. Any number may go on beside each other.

        Args:
            keep: features to keep, at least 1; one window when None.
            normalizer: what knows the speaker from earlier stretches of audio; a new one when None.

        Raises:
            UsageError: the file holds a network for windows.
        """
        if not isinstance(self._backend, StreamBackend):
            raise UsageError(f"{self.path}: takes whole windows only; export it with: sertool export --form stream")
        return FeatureStream(self._backend, self.artifact, keep, normalizer)

    def _predict(self, window: FloatArray) -> FloatArray:
        logits: FloatArray = self._backend.predict(window[None])[0]
        return logits


class FeatureStream:
    """One stretch of audio as the network's features in time, each computed once.

    Audio comes in pieces of any size; the features are the same. The newest are kept, and answers are pooled from all
    of them or from any choice: a shorter window, several windows at once, or the loud frames alone. Feature ``i`` is
    complete with frame ``(i + 1) * stride - 1`` of the spectrogram and knows the ``receptive_field`` frames up to it.

    Args:
        backend: the network.
        artifact: its description.
        keep: features to keep, at least 1; one window when None.
        normalizer: what knows the speaker from earlier stretches of audio; a new one when None.

    Raises:
        UsageError: ``keep`` is less than 1.

    Attributes:
        count: features so far, kept or not.

    Example:
        >>> stream = recognizer.stream()  # doctest: +SKIP
        >>> stream.push(samples)  # doctest: +SKIP
        3
        >>> whole, newest = stream.probabilities(), stream.probabilities(stream.features[:, -2:])  # doctest: +SKIP
    """

    def __init__(
        self,
        backend: StreamBackend,
        artifact: Artifact,
        keep: int | None = None,
        normalizer: RunningNormalizer | None = None,
    ) -> None:
        self._backend = backend
        self._artifact = artifact
        self._normalizer = normalizer or RunningNormalizer(artifact.normalization)
        if keep is not None and keep < 1:
            raise UsageError(f"keep is {keep}; valid: at least 1 feature, or None for a window")
        self._features: deque[FloatArray] = deque(maxlen=keep or artifact.window_features)
        self.reset()

    def reset(self) -> None:
        """Forget everything heard but the speaker: after a gap, or for another stretch of audio."""
        self._log_mel = LogMelStream(self._artifact.front_end)
        self._frames = np.zeros((0, self._artifact.front_end.mel_bands), np.float32)
        self._states = self._backend.start()
        self._features.clear()
        self.count = 0

    def push(self, samples: object) -> int:
        """Take the next samples and return how many features they complete.

        What waits is computed in one pass, at most a window at a time.

        Args:
            samples: (n,) at the artifact's rate, in [-1, 1], any n.

        Raises:
            AudioError: several channels, or samples that are no audio; the stream is as before.
        """
        return self.push_frames(self._log_mel.push(samples))

    def push_frames(self, log_mel: FloatArray) -> int:
        """Take the next frames (n, mel_bands) of a spectrogram in dB in the place of samples; see :meth:`push`.

        For a spectrogram that several streams share.
        """
        frames = np.concatenate([self._frames, self._normalizer.push(log_mel)])
        stride, longest = self._backend.stride, self._artifact.window_features
        complete = len(frames) // stride
        for first in range(0, complete, longest):
            piece = frames[first * stride : min(first + longest, complete) * stride]
            features, self._states = self._backend.advance(piece, self._states)
            self._features.extend(features.T)
        self._frames = frames[complete * stride :]
        self.count += complete
        return complete

    @property
    def features(self) -> FloatArray:
        """The newest features, float32 (channels, n), in the order of time.

        Raises:
            UsageError: not one is complete yet.
        """
        if not self._features:
            seconds = self._artifact.front_end.samples(self._backend.stride) / self._artifact.front_end.sample_rate
            raise UsageError(f"no feature is complete before {seconds:.2f} s of audio")
        return np.stack(self._features, axis=1)

    def logits(self, features: FloatArray | None = None) -> FloatArray:
        """Return the logits (classes,) of ``features`` (channels, n), n >= 1; of all that are kept when None."""
        return self._backend.classify(self.features if features is None else features)

    def probabilities(self, features: FloatArray | None = None) -> FloatArray:
        """Return the calibrated probability of each label; see :meth:`logits`."""
        return softmax(self.logits(features) / self._artifact.temperature)


def softmax(logits: FloatArray) -> FloatArray:
    """Return ``exp(logits) / sum(exp(logits))`` along the last axis.

    Example:
        >>> softmax(np.array([0.0, 0.0], np.float32))
        array([0.5, 0.5], dtype=float32)
    """
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)
