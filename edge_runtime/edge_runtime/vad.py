"""Silero VAD as the second of three stages: it judges whether what is loud enough for the gate is a voice.

The model is Silero's own file, which is not part of this package: ``pip download --no-deps silero-vad`` and take
``silero_vad/data/silero_vad.onnx`` out of the wheel (MIT licence; https://github.com/snakers4/silero-vad).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.backends import open_session
from edge_runtime.errors import ArtifactError
from edge_runtime.frontend import FloatArray
from edge_runtime.gate import BLOCK
from edge_runtime.model_file import read_model_file

SAMPLE_RATE = 16000

CONTEXT = 64
"""Samples before a block that the network hears again with it."""

NEW_CONTEXT = np.zeros(CONTEXT, np.float32)
NEW_STATE = np.zeros((2, 1, 128), np.float32)

HOLD_BLOCKS = 16
"""Quiet blocks, 0.5 s, through which it goes on to listen: after the gap between two words it still knows the voice."""

LATENCY_BLOCKS = 4
"""How late it knows a voice, 0.13 s: after the gate, in the median over clips of EmoDB, RAVDESS and EMOVO, 2 to 4
blocks. A segment reaches back over them, so that its padding is what it is without."""


class SileroVad:
    """Judges blocks of ``BLOCK`` samples at 16 kHz, which is what Silero VAD, version 5 and 6, takes at once.

    It hears only what is loud, and the gaps in it; after half a second of quiet it sleeps and forgets. So silence costs
    nothing, and what it says of a sound does not depend on what was long before.

    Args:
        path: Silero's ONNX file.
        threshold: probability from which a block is speech.

    Raises:
        ArtifactError: no such file, or another network than Silero's.
        MissingDependencyError: onnxruntime is not installed.

    Example:
        >>> vad = SileroVad("silero_vad.onnx", threshold=0.5)  # doctest: +SKIP
        >>> vad.is_speech(block, loud=gate.is_speech(block))  # doctest: +SKIP
        True
    """

    def __init__(self, path: str | Path, threshold: float) -> None:
        model = read_model_file(path)
        if model.path.suffix != ".onnx":
            raise self._foreign(path)
        self._session = open_session(model.content, model.path, threads=1)
        self._path = path
        self._threshold = threshold
        names = {each.name for each in self._session.get_inputs()}
        if names - {"sr"} != {"input", "state"} or len(self._session.get_outputs()) != 2:
            raise self._foreign(path)
        self._rate = {"sr": np.array(SAMPLE_RATE, np.int64)} if "sr" in names else {}
        self.reset()
        self.probability(np.zeros(BLOCK, np.float32))
        self.reset()

    def reset(self) -> None:
        """Forget the voice and sleep."""
        self._state = NEW_STATE
        self._context = NEW_CONTEXT
        self._quiet = HOLD_BLOCKS

    def is_speech(self, block: FloatArray, loud: bool) -> bool:
        """Judge the next ``BLOCK`` samples, in [-1, 1]; ``loud`` is what the gate says of them."""
        if not block.any():  # no audio at all: what comes after it must not depend on what was before
            self.reset()
            return False
        self._quiet = 0 if loud else self._quiet + 1
        if self._quiet < HOLD_BLOCKS:
            return self.probability(block) >= self._threshold and loud
        self._state, self._context = NEW_STATE, block[-CONTEXT:]
        return False

    def probability(self, block: FloatArray) -> float:
        """Return the probability of a voice in the next ``BLOCK`` samples, whether they are loud or not."""
        heard = np.concatenate([self._context, block])[None]
        try:
            found, state = self._session.run(None, {"input": heard, "state": self._state, **self._rate})
        except Exception as error:  # onnxruntime raises its own undocumented classes
            raise self._foreign(self._path) from error
        if found.shape != (1, 1) or state.shape != NEW_STATE.shape:
            raise self._foreign(self._path)
        self._state, self._context = state, block[-CONTEXT:]
        return float(found[0, 0])

    @staticmethod
    def _foreign(path: str | Path) -> ArtifactError:
        return ArtifactError(f"{path}: not Silero VAD; take silero_vad.onnx, version 5 or 6, of: silero-vad on PyPI")
