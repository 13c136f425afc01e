"""From samples to probabilities: front-end, normalisation and network of one artifact, put together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.artifact import METADATA_KEY, Artifact, check_golden
from edge_runtime.backends import Backend, load_backend
from edge_runtime.errors import ArtifactError
from edge_runtime.frontend import FloatArray, as_samples, log_mel, tile_or_cut


class Recognizer:
    """One model file, loaded and checked. It keeps no state between calls.

    Args:
        path: an artifact written by ``sertool export``.
        threads: threads per inference; 1 is best on a board that does other work too.

    Attributes:
        artifact: the file's description.
        path: the file.

    Raises:
        ArtifactError: the file is missing, damaged, not one of ours, of a newer schema, or fails its self-test.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.path = Path(path)
        self._backend: Backend = load_backend(self.path, threads)
        description = self._backend.metadata.get(METADATA_KEY)
        if description is None:
            raise ArtifactError(f"{path}: carries no {METADATA_KEY!r} description; make it with: sertool export")
        self.artifact = Artifact.from_json(description, str(path))
        check_golden(self.artifact, lambda window: self._backend.predict(window[None])[0], str(path))

    def logits(self, samples: object) -> FloatArray:
        """Return the logits of a clip, tiled or cut to the network's window as in training.

        Args:
            samples: (n,) samples at the artifact's rate, in [-1, 1], n >= 1.

        Returns:
            float32 (classes,).

        Raises:
            AudioError: an empty clip, several channels, or samples that are not finite.
        """
        artifact = self.artifact
        window = tile_or_cut(as_samples(samples), artifact.window_samples)
        frames = artifact.normalization.apply(log_mel(window, artifact.front_end))
        logits: FloatArray = self._backend.predict(frames[None])[0]
        return logits

    def probabilities(self, samples: object) -> FloatArray:
        """Return the calibrated probability of each label for a clip; see :meth:`logits` for the arguments."""
        return softmax(self.logits(samples) / self.artifact.temperature)


def softmax(logits: FloatArray) -> FloatArray:
    """Return ``exp(logits) / sum(exp(logits))`` along the last axis.

    Example:
        >>> softmax(np.array([0.0, 0.0], np.float32))
        array([0.5, 0.5], dtype=float32)
    """
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)
