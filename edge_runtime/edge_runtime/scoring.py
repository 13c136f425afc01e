"""How the speech segments of a session are scored: window by window, or as a stream.

Positions and lengths are samples of the segment, from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.frontend import FloatArray, RunningNormalizer
from edge_runtime.recognizer import Recognizer

Audio = Callable[[int, int], FloatArray]
"""Gives the segment's samples from one position to another; at least the last window of them is there."""


class WindowScoring:
    """Every score hears the last window of the segment as a clip of its own.

    Args:
        recognizer: of either form.
        hop: samples between scores.
        min_audio: samples before the first.

    Attributes:
        hop: samples from one score to the next.
        first: samples before the first score.
        shortest: samples of a segment that can be scored at its end.
    """

    def __init__(self, recognizer: Recognizer, hop: int, min_audio: int) -> None:
        self._recognizer = recognizer
        self._window = recognizer.artifact.window_samples
        self.hop = hop
        self.first = self.shortest = min_audio

    def heard(self, length: int) -> int:
        """Return how much of a segment of ``length`` a score of it hears the end of: all."""
        return length

    def begin(self) -> WindowScoring:
        """Return what scores a new segment."""
        return self

    def reset(self) -> None:
        """Do nothing: windows know nothing of each other."""

    def keep_up(self, length: int, audio: Audio) -> None:
        """Do nothing: a window is heard when it is scored."""

    def score(self, length: int, audio: Audio) -> tuple[FloatArray, bool]:
        """Return the probabilities of a segment so far, and whether they heard a whole window."""
        start = max(0, length - self._window)
        return self._recognizer.probabilities(audio(start, length)), length - start == self._window


class StreamScoring:
    """A segment is a stream that begins from a reset; every score pools the features of its last window.

    Scores fall where a feature is complete, so the hop is the nearest multiple of the stride. What comes after the last
    complete feature of a segment, less than a stride, is not heard: its rest would have to be made up.

    Args:
        recognizer: of a stream.
        hop: samples wished between scores.
        min_audio: samples before the first.

    Attributes:
        hop: samples from one score to the next.
        first: samples before the first score.
        shortest: samples of a segment that can be scored at its end: one feature, at least.
    """

    def __init__(self, recognizer: Recognizer, hop: int, min_audio: int) -> None:
        self._recognizer = recognizer
        front_end, stride = recognizer.artifact.front_end, recognizer.artifact.stride
        self._front_end, self._stride = front_end, stride
        self._normalizer = RunningNormalizer(recognizer.artifact.normalization)
        self.hop = max(1, round(hop / (stride * front_end.hop))) * stride * front_end.hop
        self.shortest = max(min_audio, front_end.samples(stride))
        features = front_end.frames(self.shortest) // stride
        complete = front_end.samples(features * stride) == self.shortest
        self.first = front_end.samples((features if complete else features + 1) * stride)

    def heard(self, length: int) -> int:
        """Return how much of a segment of ``length`` its complete features hear."""
        return self._front_end.samples(self._front_end.frames(length) // self._stride * self._stride)

    def reset(self) -> None:
        """Forget the speaker: what comes is another stream."""
        self._normalizer.reset()

    def begin(self) -> StreamSegment:
        """Return what scores a new segment, from a reset; only the statistics of the speech before it go on."""
        self._normalizer.forget()
        return StreamSegment(self._recognizer, self.heard, self._normalizer)


class StreamSegment:
    """The stream of one segment: nothing is computed before a score needs it, and then in one pass.

    Args:
        recognizer: of a stream.
        heard: see :meth:`StreamScoring.heard`.
        normalizer: what all segments are normalised by.
    """

    def __init__(self, recognizer: Recognizer, heard: Callable[[int], int], normalizer: RunningNormalizer) -> None:
        self._stream = recognizer.stream(normalizer=normalizer)
        self._window = recognizer.artifact.window_samples
        self._window_features = recognizer.artifact.window_features
        self._heard_of = heard
        self._heard = 0

    def keep_up(self, length: int, audio: Audio) -> None:
        """Hear the segment up to ``length`` where a window waits: audio is not kept for longer."""
        if self._heard_of(length) - self._heard >= self._window:
            self._hear(length, audio)

    def score(self, length: int, audio: Audio) -> tuple[FloatArray, bool]:
        """Return the probabilities of a segment so far, and whether they heard a whole window."""
        self._hear(length, audio)
        return self._stream.probabilities(), self._stream.count >= self._window_features

    def _hear(self, length: int, audio: Audio) -> None:
        heard = self._heard_of(length)
        if heard > self._heard:
            self._stream.push(audio(self._heard, heard))
            self._heard = heard
